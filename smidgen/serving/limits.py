"""How large a request may be, how long it may take, how many there may be: below the routes, before anything is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smidgen.serving.answers import Refusal, busy, late, refuse
from smidgen.serving.settings import Server

LIMITED = ("/v1/", "/classify")  # paths of the API; what is mounted beside it has limits of its own
UPLOADS = ("/v1/adapters/", "/v1/predict")  # paths that take files
OPEN = ("/health", "/ready")  # paths that are always answered, whoever asks
GRACE = 5.0  # seconds beyond the time for an answer, for a stream to end in words


class Limits:
    """An ASGI application with limits: 413 for what is too large, 408 for what comes too slowly, 429 for one too many, 503
    for what takes too long; an answer that has begun is broken off."""

    def __init__(self, app: ASGIApp, settings: Server) -> None:
        self.app, self.settings = app, settings
        self.running = self.uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(LIMITED):
            await self.app(scope, receive, send)
            return
        upload = scope["method"] in ("POST", "PUT") and scope["path"].startswith(UPLOADS)
        try:
            self._admit(upload)
            most = self.settings.max_upload + self.settings.max_body if upload else self.settings.max_body
            _check_length(scope, most)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        self.running += 1
        self.uploads += upload
        try:
            await self._timed(scope, _counted(receive, most, self.settings.body_seconds), send)
        finally:
            self.running -= 1
            self.uploads -= upload

    def _admit(self, upload: bool) -> None:
        if self.running >= self.settings.max_requests:
            raise busy(f"{self.running} requests are being answered, which is all at once; try again soon.")
        if upload and self.uploads >= self.settings.max_uploads:
            raise busy(f"{self.uploads} uploads are being read, which is all at once; try again soon.", 5)

    async def _timed(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(self.settings.body_seconds + self.settings.request_seconds + GRACE):
                await self.app(scope, receive, noted)
        except TimeoutError:
            if begun:
                raise  # the connection is closed: whoever reads knows that the answer is not whole
            await refuse(late(self.settings.request_seconds), scope, receive, send)


def _check_length(scope: Scope, most: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
            raise _too_large(most)


def _too_large(most: int) -> Refusal:
    # the connection stays: one that is closed while the client still sends is reset, and the client never reads why
    return Refusal(413, f"The request is larger than {most:,} bytes.")


def _counted(receive: Receive, most: int, seconds: float) -> Callable[[], Awaitable[Message]]:
    """``receive`` for a body of at most ``most`` bytes that is there within ``seconds``."""
    size, whole, deadline = 0, False, time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                message = await receive()
        except TimeoutError:
            whole = True
            raise Refusal(
                408, f"The request was not there within {seconds:g} s.", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > most:
                raise _too_large(most)
        return message

    return counted
