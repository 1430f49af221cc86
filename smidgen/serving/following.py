"""From the library's threads to the event loop: requests in progress are followed there, and cancelled when nobody waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from smidgen.serving.answers import Refusal, late
from smidgen.serving.handles import Handle
from smidgen.serving.requests import Event


async def events(handles: Sequence[Handle[Any]], seconds: float) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests as they come, each with its request's number; ends when all have ended.

    Raises:
        SmidgenError: what became of one of them.
        Refusal: 503, not all have ended after ``seconds``.
    """
    loop, changed, deadline = asyncio.get_running_loop(), asyncio.Event(), time.monotonic() + seconds

    def wake() -> None:
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(changed.set)

    for handle in handles:
        handle.on_change(wake)
    seen = [0] * len(handles)
    open_ = set(range(len(handles)))
    while open_:
        changed.clear()
        for number in sorted(open_):
            handle = handles[number]
            done = handle.done  # before the events are read, so that none comes after
            for event in handle.events(seen[number]):
                seen[number] += 1
                yield number, event
            if done:
                handle.result(0)  # raises what went wrong
                open_.remove(number)
        if open_:
            try:
                await asyncio.wait_for(changed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise late(seconds) from None


async def results(request: Request, handles: Sequence[Handle[Any]], seconds: float) -> list[Any]:
    """The results of several requests. All are cancelled when one fails, the client goes away, or time is up.

    Raises:
        SmidgenError, Refusal: as :func:`events`; 499 when nobody waits any more.
    """

    async def whole() -> None:
        async for _ in events(handles, seconds):
            pass

    work, gone = asyncio.ensure_future(whole()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "The client went away.")
        work.result()
        return [handle.result(0) for handle in handles]
    finally:
        for task in (work, gone):
            task.cancel()
        for handle in handles:
            handle.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of requests, which are cancelled when the stream ends in any way."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], handles: Sequence[Handle[Any]], headers: dict[str, str]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self.handles = handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for handle in self.handles:
                handle.cancel()
