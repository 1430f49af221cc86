"""A library of small adapters, and a server of it on a loopback port: what the tests of the server share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.serving.library import Library
from smidgen.serving.running import prepared
from smidgen.serving.settings import Server

from ..helpers import METHODS, chat_adapter, classifier

BASES = ("debug-chat", "debug-text", "embedded")
TALKERS = [f"talk/{method}" for method in METHODS]
FACES = [f"face-{number}" for number in range(3)]
MOODS = ["mood-0", "mood-1"]


def make_folder(root: Path) -> Path:
    """Adapters of six methods that talk, some that draw, two that sort."""
    for seed, method in enumerate(METHODS):
        chat_adapter(root / "talk" / method, method, seed)
    base = load_base("embedded")
    for seed, name in enumerate(FACES):
        smidgen.adapt(base.model, "svfit")
        smidgen.save(testing.perturb(base.model, seed, size=0.5), root / name)
        remove(base.model, "default")
    for seed, name in enumerate(MOODS):
        classifier(root / name, ("good", "bad"), seed)
    return root


@contextmanager
def listening(library: Library, **settings: Any) -> Iterator[str]:
    """The address of a server of ``library``, which runs in a thread until the block ends."""
    server, listener = prepared(library, Server(port=0, **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()
