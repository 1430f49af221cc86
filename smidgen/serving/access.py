"""Around every request: who asks, what is counted, and one line of JSON for the log.

A line says which route, adapter and key, how long and how much, and never what was asked, unless the settings want that.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smidgen.serving.answers import Refusal, refuse, response_of
from smidgen.serving.keys import Key, Keyring
from smidgen.serving.limits import OPEN
from smidgen.serving.metrics import Metrics
from smidgen.serving.settings import Server

logger = logging.getLogger("smidgen.serving.access")
LOCAL = ("127.0.0.1", "localhost", "::1")


class Access:
    """An ASGI application behind keys, counters and a log.

    Routes find ``request.state.key`` (who asks) and put what they know into ``request.state.facts``.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, metrics: Metrics, settings: Server) -> None:
        self.app, self.keyring, self.metrics, self.settings = app, keyring, metrics, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["facts"] = facts = {"request": secrets.token_hex(8)}
        try:
            state["key"] = key = self._key(scope)
        except Refusal as refusal:
            if scope["type"] == "http":
                await self._told(scope, receive, send, facts, refusal)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": str(refusal.detail)})
            return
        if scope["type"] == "http" and scope["path"] not in OPEN:
            facts["key"] = key.name
            await self._told(scope, receive, send, facts)
        else:
            await self.app(scope, receive, send)

    def _key(self, scope: Scope) -> Key:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] in OPEN:
            return Key("nobody", adapters=())
        if self.keyring.path is None and not self.settings.open:
            self._check_origin(headers)
        key = self.keyring.find(headers.get(b"authorization"))
        if key is None:
            given = b"authorization" in headers
            scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="smidgen", charset="UTF-8"'
            raise Refusal(
                401,
                "This API key is not known here." if given else "Send an API key: Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": scheme},
            )
        return key

    def _check_origin(self, headers: dict[bytes, str]) -> None:
        """A page of another site, open in a browser on this machine, is not let in: nothing else keeps it out without keys."""
        host = headers.get(b"host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.settings.is_local and name not in LOCAL:
            raise Refusal(
                403, f"This server is asked as {name[:100]!r}, and is one for this machine alone; use --keys or --open."
            )
        origin = headers.get(b"origin")
        if origin and urlsplit(origin).netloc != host:
            raise Refusal(403, f"A page of {origin[:100]} may not ask this server, which has no keys.")

    async def _told(
        self, scope: Scope, receive: Receive, send: Send, facts: dict[str, Any], refusal: Refusal | None = None
    ) -> None:
        status, whole, started = 0, False, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", facts["request"].encode())]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self.metrics.running.inc()
        try:
            if refusal is not None:
                await refuse(refusal, scope, receive, noted)
            else:
                await self.app(scope, receive, noted)
        except Exception as error:
            logger.exception("request %s failed", facts["request"])
            if not status:
                await response_of(error)(scope, receive, noted)
        finally:
            self.metrics.running.dec()
            self._count(scope, status, time.monotonic() - started, whole, facts)

    def _count(self, scope: Scope, status: int, seconds: float, whole: bool, facts: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "") or "other"
        method = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "DELETE") else "other"
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if not whole:
            self.metrics.disconnects.inc()
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts, "method": method, "route": route,
            "status": status, "seconds": round(seconds, 4), "whole": whole,
        }  # fmt: skip
        logger.info(json.dumps(line, ensure_ascii=False))
