"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smidgen.errors import ConfigError
from smidgen.training.ranges import check

MIB = 2**20


@dataclass(frozen=True)
class Server:
    """Where a server listens, who may ask it, and how much at once."""

    host: str = "127.0.0.1"  # address to listen on; any but this machine's own needs --keys or --open
    port: int = 8000  # 0 takes a free one
    keys: Path | None = None  # file of API keys that `smidgen keys` writes; none: whoever reaches the server may ask
    open: bool = False  # let everybody in who can reach --host, without keys
    adapters_root: Path | None = None  # folder below which load_lora_adapter may take adapters; none: it takes none
    max_body: int = MIB  # bytes of a request
    max_upload: int = 256 * MIB  # bytes of an uploaded adapter, packed and unpacked
    max_pixels: int = 2**22  # of an image that is drawn
    max_requests: int = 1024  # requests at once; one more is answered with 429
    max_uploads: int = 4  # uploads and predictions at once
    body_seconds: float = 60.0  # for a client to send its request
    request_seconds: float = 300.0  # for an answer
    shutdown_seconds: float = 30.0  # for what runs when the server is stopped
    log_prompts: bool = False  # write prompts and messages to the log
    generator: Path | None = None  # what predicts adapters from photos; none: the one that comes with the package

    def __post_init__(self) -> None:
        check(self)
        for name in (
            "max_body", "max_upload", "max_pixels", "max_requests", "max_uploads", "body_seconds", "request_seconds", "shutdown_seconds",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}.")
        if self.keys is None and not self.open and not self.is_local:
            raise ConfigError(
                f"host {self.host} is reached from other machines: give --keys FILE (`smidgen keys add` writes one), or --open "
                "to let everybody in."
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")
