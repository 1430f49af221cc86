"""A server in this process: uvicorn around the application, and a log of one JSON line for each request."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn

from smidgen.errors import ConfigError, SmidgenError
from smidgen.serving.app import create_app
from smidgen.serving.library import Library
from smidgen.serving.settings import Server
from smidgen.serving.shelf import Shelf

LAST_WORDS = 5  # seconds for answers to say why they end


def bases_in(folder: Path) -> list[str]:
    """The bases that the adapters in a folder are for. What comes later does not add to them.

    Raises:
        ConfigError: no adapter there names one.
    """
    shelf, found = Shelf(folder, sys.maxsize), set()
    for name in shelf.names():
        with suppress(SmidgenError):
            found.add(shelf.entry(name).origin.base)
    if not found - {""}:
        raise ConfigError(f"{folder} holds no adapter that names its base: say --base, such as --base embedded.")
    return sorted(found - {""})


def run(library: Library, settings: Server) -> None:
    """Serves until SIGINT or SIGTERM; what runs then has ``shutdown_seconds`` to end.

    Raises:
        ConfigError: the address is taken, or none of this machine's; the file of keys cannot be read.
    """
    server, listener = prepared(library, settings)
    with listener:
        log_to_stderr()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        count = len(library.shelf.names())
        bases = ", ".join(base.name for base in library.bases()) or "no base yet"
        print(
            f"{count:,} adapters of {bases} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C stops the server)"
        )
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again that has ended it in good order
            server.run(sockets=[listener])
    print("The server has stopped.")


def prepared(library: Library, settings: Server) -> tuple[uvicorn.Server, socket.socket]:
    """A server of ``library`` and the socket that it is to listen on: ``server.run(sockets=[listener])``, in any thread.

    Raises:
        ConfigError: as :func:`run`.
    """
    config = uvicorn.Config(
        create_app(library, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds) + LAST_WORDS,
    )
    return _Server(config, library, settings.shutdown_seconds), _listening(settings)


class _Server(uvicorn.Server):
    """Ends in words what still runs when its time is over, before connections are cut."""

    def __init__(self, config: uvicorn.Config, library: Library, seconds: float) -> None:
        super().__init__(config)
        self._library, self._seconds = library, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def end() -> None:
            await asyncio.sleep(self._seconds)
            await asyncio.to_thread(self._library.close, 0.0)

        ending = asyncio.create_task(end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def _listening(settings: Server) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)  # from now on who connects waits, and is not refused
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Nothing can listen at {settings.host}:{settings.port} ({error.strerror}); choose another --port or --host."
        ) from error
    return listener


def log_to_stderr() -> None:
    """Has the log of requests written to stderr, a line of JSON each."""
    log = logging.getLogger("smidgen.serving.access")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
