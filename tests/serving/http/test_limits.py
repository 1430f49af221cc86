"""What the limits let through, and what they answer: on an application that only reads and waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from smidgen.errors import ConfigError
from smidgen.serving.answers import Refusal, response_of
from smidgen.serving.limits import Limits
from smidgen.serving.settings import Server


async def read(request: Request) -> Response:
    """Answers how many bytes came; waits for as long as a header says."""
    size = len(await request.body())
    await asyncio.sleep(float(request.headers.get("wait", 0)))
    return JSONResponse(size)


async def dribble(_request: Request) -> Response:
    async def lines() -> AsyncIterator[str]:
        while True:
            yield "more\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(lines())


def client(**settings: Any) -> httpx.AsyncClient:
    async def refused(_request: Request, error: Exception) -> Response:
        return response_of(error)

    routes = [
        Route(path, read, methods=["POST", "GET"])
        for path in ("/v1/completions", "/v1/adapters/ann", "/health", "/page")
    ] + [Route("/v1/dribble", dribble)]
    inner = Starlette(routes=routes, exception_handlers={Refusal: refused})
    app = Limits(inner, Server(**{"max_body": 1000, "max_upload": 5000, "body_seconds": 0.2} | settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def pieces(count: int, seconds: float = 0.0) -> AsyncIterator[bytes]:
    """A body of 100 bytes a piece, without a length."""
    for _ in range(count):
        yield b"x" * 100
        await asyncio.sleep(seconds)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_too_large_is_413_told_or_not() -> None:
    async def test() -> None:
        async with client() as http:
            assert (await http.post("/v1/completions", content=b"x" * 1000)).json() == 1000
            assert code(await http.post("/v1/completions", content=b"x" * 1001)) == (413, "too_large")
            assert code(await http.post("/v1/completions", content=pieces(11))) == (413, "too_large")
            assert (await http.post("/v1/adapters/ann", content=pieces(50))).json() == 5000
            assert code(await http.post("/v1/adapters/ann", content=pieces(70))) == (413, "too_large")
            assert (await http.post("/page", content=pieces(70))).json() == 7000, (
                "what is mounted beside has its own limits"
            )
            said = {"content-length": "9" * 30}
            assert code(await http.post("/v1/completions", headers=said, content=pieces(1))) == (413, "too_large")

    run(test)


def test_too_slow_is_408() -> None:
    async def test() -> None:
        async with client() as http:
            assert code(await http.post("/v1/completions", content=pieces(9, 0.1))) == (408, "request_timeout")

    run(test)


def test_one_too_many_is_429_and_health_is_always_answered() -> None:
    async def test() -> None:
        async with client(max_requests=2) as http:
            held = [asyncio.create_task(http.post("/v1/completions", headers={"wait": "0.3"})) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await http.post("/v1/completions")
            assert code(refused) == (429, "queue_full") and int(refused.headers["retry-after"]) >= 1
            assert (await http.get("/health")).status_code == 200
            assert [(await task).status_code for task in held] == [200, 200]
            assert (await http.post("/v1/completions")).status_code == 200

    run(test)


def test_uploads_have_a_limit_of_their_own() -> None:
    async def test() -> None:
        async with client(max_uploads=1) as http:
            held = asyncio.create_task(http.post("/v1/adapters/ann", headers={"wait": "0.3"}))
            await asyncio.sleep(0.1)
            assert code(await http.post("/v1/adapters/ann")) == (429, "queue_full")
            assert (await http.post("/v1/completions")).status_code == 200
            assert (await http.get("/v1/adapters/ann")).status_code == 200
            assert (await held).status_code == 200

    run(test)


def test_no_answer_in_time_is_503_and_a_stream_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smidgen.serving.limits.GRACE", 0.0)

    async def test() -> None:
        async with client(request_seconds=0.1) as http:
            assert code(await http.post("/v1/completions", headers={"wait": "5"})) == (503, "timeout")
            with pytest.raises(TimeoutError):
                await http.get("/v1/dribble")

    run(test)


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"max_body": 0}, {"request_seconds": float("nan")}, {"host": "0.0.0.0"}]
)
def test_settings_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Server(**wrong)


def test_other_machines_need_keys_or_an_open_door(tmp_path: Any) -> None:
    assert Server(host="0.0.0.0", open=True) and Server(host="0.0.0.0", keys=tmp_path / "keys.json")
