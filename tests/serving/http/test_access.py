"""Who may ask whom, what is written down of it, and what a server says of itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from smidgen.serving.access import logger as access_log
from smidgen.serving.app import create_app
from smidgen.serving.keys import add_key, remove_key
from smidgen.serving.library import Library
from smidgen.serving.settings import Server

from .hostile import zipped
from .served import TALKERS

BODY = {"prompt": "what is 1", "max_tokens": 2, "temperature": 0}


def run(library: Library, test: Callable[[httpx.AsyncClient], Awaitable[None]], **settings: Any) -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(library, Server(**settings))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:80") as http:
            yield http

    async def go() -> None:
        async with opened() as http:
            await test(http)

    asyncio.run(asyncio.wait_for(go(), 60))


def test_keys_open_what_they_say_and_nothing_else(library: Library, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    reader, writer = add_key(file, "reader", ["talk/lora", "debug-*"]), add_key(file, "writer", ["mine/*"], write=True)

    async def test(http: httpx.AsyncClient) -> None:
        async def ask(model: str, key: str | None) -> tuple[int, str]:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = await http.post("/v1/completions", json={"model": model, **BODY}, headers=headers)
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        for wrong in (None, "", "sk-smidgen-x", reader + "x", reader[:-1]):
            assert (await ask("talk/lora", wrong))[0] == 401
        assert (await ask("talk/lora", reader))[0] == 200 and (await ask("debug-chat", reader))[0] == 200
        hidden, missing = await ask("talk/svfit", reader), await ask("talk/svfjt", reader)
        assert hidden[0] == missing[0] == 404
        assert hidden[1].replace("svfit", "") == missing[1].replace("svfjt", ""), (
            "what is hidden looks like what is not there"
        )
        assert "tlora" not in (await ask("talk/loras", reader))[1]
        mixed = {"model": "talk/lora", "adapters": {"talk/lora": 0.5, "talk/svfit": 0.5}, **BODY}
        headers = {"Authorization": f"Bearer {reader}"}
        assert (await http.post("/v1/completions", json=mixed, headers=headers)).status_code == 404
        listed = (await http.get("/v1/models", headers=headers)).json()["data"]
        assert {one["id"] for one in listed} == {"talk/lora", "debug-chat", "debug-text"}
        assert (await http.get("/v1/models/talk/svfit", headers=headers)).status_code == 404
        assert (await http.get("/v1/adapters/talk/svfit", headers=headers)).status_code == 404
        assert [a["name"] for a in (await http.get("/v1/adapters", headers=headers)).json()["adapters"]] == [
            "talk/lora"
        ]

        async def change(method: str, path: str, key: str, **more: Any) -> int:
            return (await http.request(method, path, headers={"Authorization": f"Bearer {key}"}, **more)).status_code

        files = zipped(folder / "face-0")
        assert await change("POST", "/v1/adapters/talk/lora", reader, files=files) == 403
        assert await change("DELETE", "/v1/adapters/talk/lora", reader) == 403
        assert await change("POST", "/v1/load_lora_adapter", reader, json={"lora_name": "a", "lora_path": "b"}) == 403
        assert await change("DELETE", "/v1/adapters/talk/lora", writer) == 404
        assert await change("POST", "/v1/adapters/theirs", writer, files=files) == 403
        assert await change("POST", "/v1/adapters/mine/face", writer, files=files) == 201
        assert await change("DELETE", "/v1/adapters/mine/face", writer) == 200
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers=headers)).status_code == 200
        assert (await http.get("/elsewhere")).headers["www-authenticate"].startswith("Basic")
        assert (await http.get("/health")).status_code == 200
        remove_key(file, "reader")
        assert (await ask("talk/lora", reader))[0] == 401

    run(library, test, keys=file)


def test_a_name_that_hides_another_is_refused_without_naming_it(library: Library, folder: Path, tmp_path: Path) -> None:
    file, files = tmp_path / "keys.json", zipped(folder / "face-0")
    alone, whole = add_key(file, "alone", ["talk"], write=True), add_key(file, "whole", ["talk", "talk/*"], write=True)

    async def test(http: httpx.AsyncClient) -> None:
        for key, named in ((alone, False), (whole, True)):
            answer = await http.post("/v1/adapters/talk", headers={"Authorization": f"Bearer {key}"}, files=files)
            assert answer.status_code == 400 and ("talk/" in answer.text) is named, answer.text

    run(library, test, keys=file)


def test_a_body_is_not_read_before_the_key(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "ann")
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield bytes(1000)

    async def test(http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/adapters/evil", content=body())).status_code == 401
        assert read <= 1

    run(library, test, keys=file)


def test_pages_of_others_do_not_get_in_without_keys(library: Library) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        for headers, status in (
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Origin": "http://127.0.0.1:80", "Host": "127.0.0.1:80"}, 200),
            ({"Host": "localhost:8000"}, 200),
            ({"Host": "[::1]:8000"}, 200),
        ):
            assert (await http.get("/v1/models", headers=headers)).status_code == status, headers

    run(library, test)


def test_the_log_says_who_and_how_long_and_not_what(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        said = {"model": "talk/lora", "messages": [{"role": "user", "content": "what is 3 plus 4 ?"}], "temperature": 0}
        answer = await http.post("/v1/chat/completions", json=said)
        text = answer.json()["choices"][0]["message"]["content"]
        await http.post("/v1/chat/completions", json=said | {"stream": True})
        await http.post("/v1/images/generations", json={"model": "nobody", "prompt": "what is 3"})
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == access_log.name]
        assert [line["status"] for line in lines] == [200, 200, 404]
        assert lines[0]["adapter"] == "talk/lora" and lines[0]["key"] == "anyone" and lines[0]["tokens"] > 0
        assert lines[0]["route"] == "/v1/chat/completions" and lines[0]["seconds"] > 0
        assert lines[1]["tokens"] == lines[0]["tokens"] and lines[0]["request"] == answer.headers["x-request-id"]
        assert ("what is 3" in caplog.text, "prompt" in caplog.text) == (wanted, wanted)
        assert [line.get("answer") for line in lines[:2]] == [[text] if wanted else None] * 2

    for wanted in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, access_log.name):
            run(library, ask, log_prompts=wanted)


def test_metrics_and_readiness(library: Library) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        await http.post("/v1/completions", json={"model": "talk/lora", **BODY})
        await http.post("/v1/completions", json={"model": "nobody", **BODY})
        await http.get("/secret/path/of/somebody")
        text = (await http.get("/metrics")).text
        assert 'smidgen_requests_total{method="POST",route="/v1/completions",status="200"} 1.0' in text
        assert 'smidgen_requests_total{method="POST",route="/v1/completions",status="404"} 1.0' in text
        assert 'smidgen_request_seconds_count{route="/v1/completions"} 2.0' in text
        assert "smidgen_library_tokens " in text and "smidgen_library_resident " in text
        assert not any(name in text for name in (*TALKERS, "nobody", "secret"))
        assert (await http.get("/ready")).status_code in (200, 503)
        assert (await http.get("/openapi.json")).json()["paths"]["/v1/chat/completions"]

    run(library, test)


def test_what_there_is_not_is_said_in_the_same_form(library: Library) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 404)):
            answer = await http.request(method, path)
            assert answer.status_code == status and path in answer.json()["error"]["message"]
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b'"a"',
            b"\xff",
            b"1" * 5000,
            b'{"model": NaN}',
            b'{"model": "\\ud800"}',
        ):
            answer = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["message"], content

    run(library, test)
