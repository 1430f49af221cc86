"""`smidgen serve` as a process: what it says, what it logs, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from smidgen.cli import main
from smidgen.serving.library import Library
from smidgen.serving.running import prepared
from smidgen.serving.settings import Server
from smidgen.serving.text_batching import TextBatch

BODY = {"model": "talk/lora", "prompt": "what is 3 plus", "temperature": 0, "max_tokens": 5}


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its address."""
    command = [sys.executable, "-m", "smidgen", "serve", str(folder), "--base", "debug-chat", "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_answers_and_ends_what_runs_when_it_is_told_to_stop(folder: Path) -> None:
    said: list[str] = []

    def read(address: str, first: threading.Event) -> None:
        body = BODY | {"stream": True, "n": 32, "max_tokens": 50, "temperature": 2.0}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                said.append(line)
                first.set()

    with serving(folder) as (process, address):
        answer = httpx.post(f"{address}/v1/completions", json=BODY, timeout=60)
        assert answer.status_code == 200 and answer.headers["x-smidgen-adapter"] == "talk/lora"
        assert httpx.get(f"{address}/ready").json() == {"ready": True, "bases": {"debug-chat": True}}
        first = threading.Event()
        reader = threading.Thread(target=read, args=(address, first))
        reader.start()
        assert first.wait(60)
        process.send_signal(signal.SIGTERM)
        reader.join(60)
        out, log = process.communicate(timeout=60)
        assert process.returncode == 0 and "The server has stopped." in out
        assert [line for line in said if line][-1] == "data: [DONE]"
        assert sum('"finish_reason": "' in line for line in said) == 32
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert lines[0]["adapter"] == "talk/lora" and lines[0]["tokens"] == answer.json()["usage"]["completion_tokens"]
        assert "what is 3" not in log and "Traceback" not in log
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_a_stream_that_outlasts_the_server_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TextBatch._forward

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return forward(*args)

    monkeypatch.setattr(TextBatch, "_forward", slow)
    said: list[str] = []
    body = BODY | {"stream": True, "max_tokens": 400, "temperature": 2.0}
    with Library(folder, ["debug-chat"]) as library:
        server, listener = prepared(library, Server(port=0, shutdown_seconds=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():  # ends well: nothing is cut
                said.append(line)
                server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()
    events = [line.removeprefix("data: ") for line in said if line]
    assert "error" in json.loads(events[-1]), events[-2:]


def test_what_keeps_it_from_starting_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["serve", *words]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "choose another --port" in said(str(folder), "--base", "debug-chat", "--port", port)
    (tmp_path / "empty").mkdir()
    assert "say --base" in said(str(tmp_path / "empty"))
    assert "give --keys FILE" in said(str(folder), "--host", "0.0.0.0")
    (tmp_path / "keys.json").write_text("[]")
    assert "holds no API keys" in said(str(folder), "--base", "debug-chat", "--keys", str(tmp_path / "keys.json"))
    assert "got 'much'" in said(str(folder), "--memory", "much")
