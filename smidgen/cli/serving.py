"""The server, and the keys of those who may ask it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from smidgen.cli.build import Section


def serve(
    adapters: Path,
    /,
    server: Annotated[Any, Section("serving.settings:Server")],
    base: list[str] | None = None,
    memory: str = "1GB",
    batch: int = 64,
    queue: int = 1024,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
) -> None:
    """Serve the folder ADAPTERS over HTTP: OpenAI's API, with each adapter as a model. Adapters may be uploaded, deleted and
    predicted from photos while it runs.

    Args:
        adapters: a folder of adapters' folders.
        server: where it listens, who may ask, and limits.
        base: the bases to serve, as --base elsewhere (none: those that the adapters name).
        memory: for the adapters' numbers, such as 500MB or 4GB; the least recently used leave it.
        batch: requests that a base computes at once.
        queue: requests that wait; one more is answered with 429.
        mixed_precision: precision of the bases' weights.
    """
    from smidgen.adapters.budget import parse_bytes
    from smidgen.serving.library import Library
    from smidgen.serving.running import bases_in, run

    bases = base or bases_in(adapters)
    with Library(adapters, bases, parse_bytes(memory), batch, queue, mixed_precision) as library:
        run(library, server)


def add_key(file: Path, name: str, /, adapters: list[str] | None = None, write: bool = False) -> None:
    """Make an API key called NAME and keep its hash in FILE, which `smidgen serve --keys` reads. The key is printed once.

    Args:
        file: the keys' file; made when there is none.
        name: whose it is, for the log.
        adapters: names of adapters and bases that it may use, or patterns such as 'ann/*' (none: all).
        write: it may also upload, predict and delete those.
    """
    from smidgen.serving.keys import add_key as add

    print(add(file, name, adapters or ["*"], write))


def list_keys(file: Path, /) -> None:
    """List the keys in FILE: what each may use, not the keys themselves.

    Args:
        file: the keys' file.
    """
    from smidgen.serving.keys import read_keys

    for key in read_keys(file).values():
        print(f"{key.name}\t{'write' if key.write else 'use'}\t{' '.join(key.adapters)}")


def remove_key(file: Path, name: str, /) -> None:
    """Take the key called NAME out of FILE. A server that runs refuses it from then on.

    Args:
        file: the keys' file.
        name: whose it is.
    """
    from smidgen.serving.keys import remove_key as remove

    remove(file, name)
    print(f"{file} has no key {name!r} any more.")
