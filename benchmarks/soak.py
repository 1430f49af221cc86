"""Everything at once on a server on this machine: 3,000 requests of 1,000 adapters, uploads, deletions, slow clients, clients that
go away, hostile uploads, and a worker that is killed in the middle. Every answer is compared with its adapter's, asked alone
before.

    make bench NAME=soak
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ctypes
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

import smidgen
from benchmarks._harness import write_result
from smidgen.bases.families import load_base
from smidgen.bases.transformers import load_language_model
from smidgen.serving.library import Library
from smidgen.serving.requests import EmbedRequest, ImageRequest, TextRequest
from smidgen.serving.running import prepared
from smidgen.serving.settings import Server
from smidgen.tasks.chatting import Chat
from smidgen.testing import perturb

CHAT, DRAW = "debug-chat", "embedded"
METHODS = {"svfit": {"r": 4}, "lora": {"r": 2}, "loldu": {"r": 4}}
QUESTION = "what is 3 plus 4 ?"
TEXT, TOKENS, STEPS, FACES = "the film was good", 10, 2, 8
BUDGET = 600_000  # bytes for adapters: about half of them
FILES = ("adapter_config.json", "adapter_model.safetensors")


# ---- the adapters, and what each answers alone -----------------------------------------------------------------------


def make(folder: Path, count: int) -> None:
    """``count`` adapters of three methods that talk, and some that draw; no two have the same parameters."""
    for place, (method, options) in enumerate(METHODS.items()):
        model = load_language_model(CHAT, "no", None).model
        smidgen.adapt(model, method, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for number in range(place, count, len(METHODS)):
            draws = torch.Generator().manual_seed(number)
            for name, p in model.named_parameters():
                if name in start:
                    p.data = start[name] + 0.3 * torch.randn(p.shape, generator=draws)
            smidgen.save(model, folder / f"talk/{number:04}")
    base = load_base(DRAW)
    for number in range(FACES):
        smidgen.adapt(base.model, "svfit", f"face{number}")
        perturb(base.model, number, 0.5, f"face{number}")
        smidgen.save(base.model, folder / f"face/{number}", f"face{number}")


@dataclass
class Known:
    """What each adapter answers when it is asked alone."""

    text: dict[str, str] = field(default_factory=dict)
    vector: dict[str, np.ndarray] = field(default_factory=dict)
    image: dict[str, np.ndarray] = field(default_factory=dict)


def asked_alone(folder: Path) -> Known:
    """One request at a time, one row in each batch; texts of some are compared with transformers' own loop."""
    known, messages = Known(), [{"role": "user", "content": QUESTION}]
    with Library(folder, [CHAT, DRAW], batch=1) as library:
        for name in [info.name for info in library.adapters() if info.base == CHAT] + [CHAT]:
            known.text[name] = library.generate(TextRequest(name, messages, TOKENS)).result().text
            known.vector[name] = np.array(library.embed(EmbedRequest(name, TEXT)).result().vector)
        for name in [f"face/{number}" for number in range(FACES)] + [DRAW]:
            drawn = library.draw(ImageRequest(name, "a portrait", seed=1, steps=STEPS)).result().image
            known.image[name] = np.asarray(drawn, dtype=np.float64) / 255
    for name in [one for one in known.text if one != CHAT][::97]:
        said = Chat(folder / name, CHAT, max_new_tokens=TOKENS).say(QUESTION)
        assert said.strip() == known.text[name].strip(), f"{name} alone in the library is not {name} in transformers"
    return known


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """The server's process. SIGUSR1 raises SystemExit in the thread that computes texts, wherever it is."""
    library = Library(folder, [CHAT, DRAW], budget_bytes=BUDGET, batch=32)
    server, listener = prepared(library, Server(port=0, body_seconds=15.0, max_upload=2**20))

    def kill(*_: object) -> None:
        worker = next(thread for thread in threading.enumerate() if thread.name == f"smidgen-{CHAT}")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(SystemExit))

    signal.signal(signal.SIGUSR1, kill)
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])
    library.close(10)


# ---- the clients -----------------------------------------------------------------------------------------------------


class Clients:
    """Asks and compares. ``counts`` says what came of it: wrong and lost are to stay 0."""

    def __init__(self, http: httpx.AsyncClient, known: Known, folder: Path, seed: int) -> None:
        self.http, self.known, self.folder = http, known, folder
        self.chance = random.Random(seed)
        self.names = [name for name in known.text if name != CHAT]
        self.counts: Counter[str] = Counter()
        self.killing = False  # a worker was killed: its requests end in errors until it is back
        self.uploaded = 0

    async def one(self, kind: str) -> None:
        """One request of a kind, or those that belong together."""
        try:
            await asyncio.wait_for(getattr(self, f"ask_{kind}")(), 120)
        except TimeoutError:
            self.say("lost", kind)
        except httpx.HTTPError as error:
            self.say("lost", f"{kind}: {error!r}")

    def say(self, what: str, why: str) -> None:
        self.counts[what] += 1
        if what in ("wrong", "lost", "unexpected"):
            print(f"{what}: {why}", file=sys.stderr)

    def right(self, answer: httpx.Response, name: str, is_right: bool, what: str) -> None:
        """Counts an answer that came: of the adapter that was asked, and as when it was asked alone."""
        said = answer.headers.get("x-smidgen-adapter")
        self.say("right" if is_right and said == name else "wrong", f"{what} of {name}, answered by {said}")

    def failed(self, status: int, message: str) -> None:
        """Counts an error that says what it is; there are to be none but those of the killed worker."""
        expected = self.killing and status in (500, 503)
        self.say("errors of the killed worker" if expected else "unexpected", f"{status} {message[:300]}")

    async def post(self, path: str, **more: Any) -> httpx.Response:
        self.counts["requests"] += 1
        return await self.http.post(path, **more)

    def body(self, name: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": QUESTION}]
        return {"model": name, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **more}

    def any(self) -> str:
        return self.chance.choice(self.names) if self.chance.random() > 0.03 else CHAT

    async def ask_text(self, name: str | None = None, like: str | None = None, **more: Any) -> bool:
        name = name or self.any()
        answer = await self.post("/v1/chat/completions", json=self.body(name), **more)
        if answer.status_code != 200:
            self.failed(answer.status_code, answer.text)
            return False
        said = answer.json()["choices"][0]["message"]["content"]
        self.right(answer, name, said == self.known.text[like or name], f"{said!r}")
        return True

    async def ask_stream(self, pause: float = 0.0, name: str | None = None, like: str | None = None) -> None:
        name, said, error = name or self.any(), "", ""
        self.counts["requests"] += 1
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(name, stream=True)) as answer:
            if answer.status_code != 200:
                self.failed(answer.status_code, (await answer.aread()).decode())
                return
            last = ""
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line[6:])
                    error = found.get("error", {}).get("message", "")
                    said += (found.get("choices") or [{"delta": {}}])[0]["delta"].get("content", "")
                last = line or last
                await asyncio.sleep(pause)
        if error:
            self.failed(503, error)
        elif last != "data: [DONE]":
            self.say("lost", f"a stream of {name} that does not end")
        else:
            self.right(answer, name, said == self.known.text[like or name], f"{said!r} (streamed)")

    async def ask_vector(self) -> None:
        name = self.any()
        body = {"model": name, "input": TEXT, "encoding_format": "base64"}
        answer = await self.post("/v1/embeddings", json=body)
        if answer.status_code != 200:
            self.failed(answer.status_code, answer.text)
            return
        found = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), dtype="<f4")
        self.right(answer, name, bool(np.abs(found - self.known.vector[name]).max() < 1e-5), "a vector")

    async def ask_image(self) -> None:
        name = self.chance.choice(list(self.known.image))
        body = {"model": name, "prompt": "a portrait", "seed": 1, "steps": STEPS}
        answer = await self.post("/v1/images/generations", json=body)
        if answer.status_code != 200:
            self.failed(answer.status_code, answer.text)
            return
        file = io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        away = np.abs(np.asarray(Image.open(file), dtype=np.float64) / 255 - self.known.image[name])
        self.right(answer, name, bool(away.max() < 1.01 / 255 and away.mean() < 1e-4), f"an image ({away.max():.4f})")

    async def ask_upload(self) -> None:
        """A new adapter is there, answers, is deleted while it answers, and is not there any more."""
        self.uploaded += 1
        name, like = f"new/{self.uploaded}", self.chance.choice(self.names)
        files = [("files", (file, (self.folder / like / file).read_bytes())) for file in FILES]
        answer = await self.post(f"/v1/adapters/{name}", files=files)
        if answer.status_code != 201:
            self.failed(answer.status_code, answer.text)
            return
        self.counts["uploads"] += 1
        await self.ask_text(name, like)
        running = asyncio.create_task(self.stream_that_may_fail(name, like))
        await asyncio.sleep(0.01)
        self.counts["requests"] += 1
        deleted = await self.http.delete(f"/v1/adapters/{name}")
        await running
        if deleted.status_code != 200:
            self.failed(deleted.status_code, deleted.text)
            return
        self.counts["deletions"] += 1
        gone = await self.post("/v1/chat/completions", json=self.body(name))
        self.say("refused" if gone.status_code == 404 else "wrong", f"{gone.status_code} after {name} was deleted")

    async def stream_that_may_fail(self, name: str, like: str) -> None:
        """Of an adapter that is being deleted: the right answer, or an error in words (not found, or replaced)."""
        self.counts["requests"] += 1
        answer = await self.http.post("/v1/chat/completions", json=self.body(name, stream=True))
        lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        if answer.status_code in (404, 409) or any("error" in line for line in lines):
            self.counts["deleted before their answer"] += 1
        elif answer.status_code != 200:
            self.failed(answer.status_code, answer.text)
        else:
            said = "".join(line["choices"][0]["delta"].get("content", "") for line in lines)
            self.right(answer, name, said == self.known.text[like], f"{said!r} (being deleted)")

    async def ask_hostile(self) -> None:
        raw = {file: (self.folder / self.names[0] / file).read_bytes() for file in FILES}
        raw |= self.chance.choice(
            [{FILES[1]: raw[FILES[1]][:-3]}, {FILES[0]: b"{"}, {FILES[1]: b"\xff" * 100}, {FILES[1]: bytes(3 * 2**20)}]
        )
        answer = await self.post("/v1/adapters/evil", files=[("files", one) for one in raw.items()])
        self.say(
            "refused" if 400 <= answer.status_code < 500 else "unexpected", f"{answer.status_code} of a hostile upload"
        )

    async def ask_unknown(self) -> None:
        answer = await self.post("/v1/chat/completions", json=self.body(f"talk/x{self.chance.random()}"))
        self.say("refused" if answer.status_code == 404 else "wrong", f"{answer.status_code} of nobody")

    async def ask_slowly(self) -> None:
        """A body that dribbles in, and an answer that dribbles out."""
        name = self.any()
        raw = json.dumps(self.body(name)).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(raw), 40):
                yield raw[start : start + 40]
                await asyncio.sleep(0.1)

        self.counts["requests"] += 1
        self.counts["slow clients"] += 2
        answer = await self.http.post(
            "/v1/chat/completions", content=pieces(), headers={"Content-Type": "application/json"}
        )
        if answer.status_code != 200:
            self.failed(answer.status_code, answer.text)
        else:
            said = answer.json()["choices"][0]["message"]["content"]
            self.right(answer, name, said == self.known.text[name], f"{said!r} (slowly)")
        await self.ask_stream(pause=0.05)

    async def ask_too_slowly(self) -> None:
        async def never() -> AsyncIterator[bytes]:
            yield b'{"model": '
            await asyncio.sleep(20)

        self.counts["slow clients"] += 1
        answer = await self.post("/v1/chat/completions", content=never(), headers={"Content-Type": "application/json"})
        self.say(
            "refused" if answer.status_code == 408 else "unexpected",
            f"{answer.status_code} of a body that does not come",
        )

    async def ask_and_leave(self) -> None:
        """Goes away before the answer, or after its first piece."""
        self.counts["disconnects"] += 1
        self.counts["requests"] += 1
        if self.chance.random() < 0.5:
            with suppress(httpx.TimeoutException):
                await self.http.post("/v1/chat/completions", json=self.body(self.any()), timeout=0.02)
            return
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(self.any(), stream=True)) as answer:
            async for _ in answer.aiter_lines():
                break


SHARES = {
    "text": 0.55, "stream": 0.17, "vector": 0.12, "image": 0.02, "upload": 0.02, "hostile": 0.02, "unknown": 0.02, "slowly": 0.02,
    "too_slowly": 0.005, "and_leave": 0.055,
}  # fmt: skip


async def soak(
    address: str, known: Known, folder: Path, requests: int, process: subprocess.Popen[str]
) -> dict[str, Any]:
    """Everything at once, from 24 clients; a worker is killed when half is done."""
    server, memory = psutil.Process(process.pid), []
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=24)
    async with httpx.AsyncClient(base_url=address, timeout=100, limits=limits) as http:
        clients = Clients(http, known, folder, seed=0)
        chance = random.Random(1)
        kinds = chance.choices(list(SHARES), list(SHARES.values()), k=requests)
        left = iter(enumerate(kinds))

        async def client() -> None:
            for number, kind in left:
                if number == requests // 2:
                    clients.killing = True
                    process.send_signal(signal.SIGUSR1)
                    clients.counts["killed workers"] += 1
                if number % 50 == 0:
                    memory.append(server.memory_info().rss / 2**20)
                await clients.one(kind)

        started, used = time.perf_counter(), server.cpu_times()
        await asyncio.gather(*(client() for _ in range(24)))
        clients.killing = False
        for name in clients.names[:20]:  # the worker that was started anew
            await clients.ask_text(name)
        seconds, after = time.perf_counter() - started, server.cpu_times()
        text = (await http.get("/metrics")).text
    told = dict(line.split(" ") for line in text.splitlines() if line.startswith("smidgen_library_"))
    third = len(memory) // 3  # the first is for all that is loaded and compiled once
    early, late = (float(np.median(part)) for part in (memory[third : 2 * third], memory[2 * third :]))
    return {
        **clients.counts,
        "seconds": seconds,
        "server_cpu_seconds": after.user + after.system - used.user - used.system,
        "adapters": len(clients.names) + FACES,
        "different_texts": len(set(known.text.values())),
        "loads": float(told["smidgen_library_loads"]),
        "evictions": float(told["smidgen_library_evictions"]),
        "still_queued": float(told["smidgen_library_queued"]) + float(told["smidgen_library_active"]),
        "memory_mib_second_third": early,
        "memory_mib_last_third": late,
        "memory_growth": late / early - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=Path, help="be the server of this folder")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--adapters", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.serve:
        serve(given.serve)
        return
    memory = Path("/dev/shm")  # where a save need not wait for a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        folder = Path(place) / "adapters"
        make(folder, given.adapters)
        print("adapters are made", file=sys.stderr)
        known = asked_alone(folder)
        print("all were asked alone", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.soak", "--serve", str(folder)]
        with (Path(place) / "server.log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                assert process.stdout is not None
                address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
                figures = asyncio.run(soak(address, known, folder, given.requests, process))
            finally:
                process.terminate()
                process.wait(60)
        tracebacks = (Path(place) / "server.log").read_text().count("Traceback")
        left_over = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    figures = {name.replace(" ", "_"): value for name, value in figures.items()}
    figures = (
        {"wrong": 0, "lost": 0, "unexpected": 0} | figures | {"tracebacks": tracebacks, "left_over": len(left_over)}
    )
    print(json.dumps(figures, indent=1))
    whole = given.requests >= 3000 and given.adapters >= 1000
    if whole:
        print(write_result("soak", figures, "make bench NAME=soak"))
    bad = {name: figures[name] for name in ("wrong", "lost", "unexpected", "left_over") if figures[name]}
    if bad:
        raise SystemExit(f"Not as it should be: {bad}")


if __name__ == "__main__":
    main()
