"""The application as a deployment of Ray Serve, on a cluster of this machine: every replica answers as one server does, and a request
goes where its adapter is."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from smidgen.errors import ConfigError, MissingExtraError
from smidgen.serving.library import Library
from smidgen.serving.requests import TextRequest

from ..helpers import METHODS, chat_adapter, copied

NEEDED = "Serving on a cluster is tried where Ray Serve is installed: pip install 'smidgen[ray]'"
PORT = 8123
HAS_RAY = find_spec("ray") is not None
ray_only = pytest.mark.skipif(not HAS_RAY, reason=NEEDED)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "smidgen.serving.ray" or name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smidgen\[serve,ray\]'"):
        import smidgen.serving.ray  # noqa: F401


@ray_only
def test_what_a_cluster_is_told_is_checked(tmp_path: Path) -> None:
    from smidgen.serving.ray import answering, application, model_of

    with pytest.raises(ConfigError, match="replicas: Input should be greater than or equal to 1"):
        application({"folder": tmp_path, "bases": "debug-chat", "replicas": 0})
    with pytest.raises(ConfigError, match="replica: Extra inputs are not permitted"):
        application({"folder": tmp_path, "replica": 2})
    with pytest.raises(ConfigError, match="say --base"):
        application({"folder": tmp_path})
    assert answering([(b"content-type", b"text/plain")]) == []
    assert [
        model_of(body) for body in (b"", b"[1]", b'{"model": 3}', b"\xff", b'{"model": "' + b"a" * 600 + b'"}')
    ] == [""] * 5


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two replicas that may each have three adapters in memory, as far as Ray knows."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # no token in the home folder; it listens on this machine alone
    import ray
    from ray import serve

    from smidgen.serving.ray import application

    root = copied(folder / "talk", tmp_path_factory.mktemp("cluster") / "talk").parent
    own: dict[str, Any] = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else own))
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(application({"folder": root, "bases": "debug-chat", "replicas": 2, "residents": 3}))
    yield root
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def client(cluster: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as found:
        yield found


def ask(client: httpx.Client, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "what is 3 plus", "temperature": 0, "max_tokens": 5} | more
    return client.post("/v1/completions", json=body)


def replica_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-smidgen-replica"]


def of_each(client: httpx.Client, path: str) -> dict[str, httpx.Response]:
    """What each of the two replicas says to a request that any may answer."""
    found: dict[str, httpx.Response] = {}
    until = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < until, f"only {list(found)} answered"
        answer = client.get(path)
        found[replica_of(answer)] = answer
    return found


@pytest.mark.slow
@ray_only
class TestCluster:
    def test_adapters_and_the_base_answer_as_in_one_library(self, client: httpx.Client, cluster: Path) -> None:
        models = [*(f"talk/{method}" for method in METHODS), "debug-chat"]
        with Library(cluster, ["debug-chat"]) as library:
            asked = [TextRequest(model, "what is 3 plus", temperature=0.0, max_tokens=5) for model in models]
            expected = [result.text for result in library.generate_all(asked)]
        assert len(set(expected)) > 1
        with ThreadPoolExecutor(14) as threads:
            answers = list(threads.map(lambda model: ask(client, model), models * 2))
        for model, text, answer in zip(models * 2, expected * 2, answers, strict=True):
            assert answer.status_code == 200, answer.text
            assert (answer.json()["choices"][0]["text"], answer.headers["x-smidgen-adapter"]) == (text, model)
        assert of_each(client, "/v1/models")

    def test_a_request_goes_where_its_adapter_is(self, client: httpx.Client) -> None:
        homes = {}
        for name in ("talk/svfit", "talk/lora", "talk/oft"):
            homes[name] = replica_of(ask(client, name))
            time.sleep(1.0)  # until all know
        for _ in range(5):
            for name, home in homes.items():
                assert replica_of(ask(client, name)) == home, name
        by_header = client.get("/v1/models", headers={"serve_multiplexed_model_id": "talk/oft"})
        assert replica_of(by_header) == homes["talk/oft"]

    def test_what_ray_forgets_leaves_memory(self, client: httpx.Client) -> None:
        for method in METHODS * 2:
            ask(client, f"talk/{method}")
        for answer in of_each(client, "/v1/adapters").values():
            assert sum(one["resident"] for one in answer.json()["adapters"]) <= 3

    def test_nobody_else_answers_for_an_unknown_adapter(self, client: httpx.Client) -> None:
        answer = ask(client, "talk/svfti")
        assert answer.status_code == 404 and "'talk/svfit'" in answer.json()["error"]["message"]
        large = client.post("/v1/completions", content=b"x" * (2**20 + 1))
        assert large.status_code == 413 and "larger than" in large.json()["error"]["message"]
        assert client.get("/nothing").status_code == 404

    def test_streams_and_who_leaves_one(self, client: httpx.Client) -> None:
        body = {"model": "talk/lora", "prompt": "what is 3 plus", "temperature": 0, "max_tokens": 5, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
        assert lines[-1] == "data: [DONE]" and len(pieces) > 2
        assert "".join(pieces) == ask(client, "talk/lora").json()["choices"][0]["text"]
        with client.stream(
            "POST", "/v1/completions", json=body | {"n": 64, "max_tokens": 100, "temperature": 2.0}
        ) as answer:
            next(answer.iter_lines())
        until = time.monotonic() + 60
        while any("smidgen_library_active 0.0" not in answer.text for answer in of_each(client, "/metrics").values()):
            assert time.monotonic() < until, "nobody waits, and it is computed"

    def test_what_is_uploaded_at_one_replica_is_served_by_all(self, client: httpx.Client, tmp_path: Path) -> None:
        folder = chat_adapter(tmp_path / "new", "svfit", 99)
        files = [
            ("files", (name, (folder / name).read_bytes()))
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
        made = client.post("/v1/adapters/new", files=files)
        assert made.status_code == 201, made.text
        said = of_each(client, "/v1/adapters/new")
        assert {answer.json()["fingerprint"] for answer in said.values()} == {made.json()["fingerprint"]}
        assert ask(client, "new").headers["x-smidgen-adapter"] == "new"
        assert client.delete("/v1/adapters/new").status_code == 200
        assert [ask(client, "new").status_code for _ in range(4)] == [404] * 4

    def test_a_killed_replica_costs_its_requests_alone(self, client: httpx.Client) -> None:
        import ray

        home = replica_of(ask(client, "talk/seeded"))
        (name,) = [
            one["name"]
            for one in ray.util.list_named_actors(all_namespaces=True)
            if one["name"].endswith(f"Replica#{home}")
        ]
        ray.kill(ray.get_actor(name, namespace="serve"))
        until, said = time.monotonic() + 120, [0]
        while said[-1] != 200:
            assert time.monotonic() < until, said
            answer = ask(client, "talk/seeded")
            said.append(answer.status_code)
        assert set(said[1:]) <= {200, 503} and answer.headers["x-smidgen-adapter"] == "talk/seeded"
