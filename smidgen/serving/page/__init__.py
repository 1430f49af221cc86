"""The page: adapters made, drawn with and taken along in a browser, on this machine alone.

    app = mount(fastapi.FastAPI(), Path("runs"), "/ui")    # beside other routes
    serve(Path("runs"), port=7860)                         # smidgen ui

A run is a folder below ``folder``. No request leaves the machine: the page brings its own fonts and scripts, Gradio's analytics are
off, and a Content-Security-Policy has the browser refuse everything from elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from smidgen.errors import ConfigError, MissingExtraError

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
UPLOAD = "64mb"  # of one dropped file


class _StayHere:
    """ASGI middleware: answers below ``path`` carry the policy that keeps the browser on this machine."""

    headers = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"))

    def __init__(self, app: Any, path: str) -> None:
        self.app, self.path = app, path

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
            await send(message)

        ours = scope["type"] == "http" and scope["path"].startswith(self.path)
        await self.app(scope, receive, guarded if ours else send)


def _quiet_end(record: logging.LogRecord) -> bool:
    """Streams to open tabs are cut when the server ends, which is no fault."""
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and "graceful shutdown" not in record.getMessage()


def mount(app: Any, folder: Path, path: str = "/") -> Any:
    """Put the page into a FastAPI application at ``path``; returns the application.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingExtraError("The page needs gradio: pip install 'smidgen[ui]'") from error
    from smidgen.serving.page.layout import CSS, HEAD, build, theme

    folder = folder.expanduser().resolve()
    app.add_middleware(_StayHere, path=path.rstrip("/") or "/")
    return gr.mount_gradio_app(
        app, build(folder), path, allowed_paths=[str(folder)], show_error=False, max_file_size=UPLOAD, ssr_mode=False,
        pwa=False, footer_links=[], run_history=False, theme=theme(), css_paths=[CSS], head=HEAD, enable_monitoring=False,
    )  # fmt: skip


def serve(folder: Path, host: str = "127.0.0.1", port: int = 7860, announce: Callable[[str], None] = print) -> None:
    """Serve the page until it is stopped; trainings it started go on.

    Raises:
        MissingExtraError: what serves is not installed.
        ConfigError: the folder cannot be written, or the port is taken.
    """
    try:
        import uvicorn
        from fastapi import FastAPI
    except ImportError as error:
        raise MissingExtraError("The page needs gradio, fastapi and uvicorn: pip install 'smidgen[ui]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Runs cannot be kept in {folder} ({error.strerror}); choose another --folder.") from error
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be used ({error.strerror}); choose another --port.") from error
    app = mount(FastAPI(openapi_url=None), folder)
    announce(
        f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}/ (runs are kept in {folder}; Ctrl-C ends the page)"
    )
    logging.getLogger("uvicorn.error").addFilter(_quiet_end)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
