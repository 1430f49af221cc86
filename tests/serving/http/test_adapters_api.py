"""Adapters that come and go over HTTP, and uploads that are made to hurt."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from smidgen.serving.library import Library

from .hostile import CONFIG, HOSTILE, archive, good, of_folder, zipped
from .served import BASES, listening

MOST = 2 * 2**20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Two adapters to begin with, and nothing around them but a folder that may be read from."""
    root = tmp_path_factory.mktemp("upload")
    for name in ("talk/lora", "face-0"):
        shutil.copytree(folder / name, root / "adapters" / name)
    shutil.copytree(folder / "face-1", root / "others" / "face-1")
    (root / "others" / "link").symlink_to(folder / "face-1")
    (root / "others" / "linked").mkdir()
    for file in (folder / "face-1").iterdir():
        (root / "others" / "linked" / file.name).symlink_to(file)
    (root / "others" / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def http(place: Path) -> Iterator[httpx.Client]:
    with (
        Library(place / "adapters", BASES) as library,
        listening(library, max_upload=MOST, adapters_root=place / "others") as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def files_below(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_size if path.is_file() else -1
        for path in sorted(root.rglob("*"))
    }  # fmt: skip


def said(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_and_leaves_nothing(
    name: str, folder: Path, place: Path, http: httpx.Client
) -> None:
    before, outside = files_below(place), set(os.listdir("/tmp")) | set(os.listdir("."))
    answer = http.post("/v1/adapters/evil", files=HOSTILE[name](folder / "face-1"))
    assert 400 <= answer.status_code < 500, answer.text
    assert 15 < len(said(answer)) < 2500 and "upload-" not in answer.text
    assert files_below(place) == before
    new = {
        one for one in (set(os.listdir("/tmp")) | set(os.listdir("."))) - outside if "evil" in one or "upload" in one
    }
    assert not new
    assert http.get("/v1/adapters/evil").status_code == 404
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("name", [
    "..", "%2e%2e", "%2e%2e%2fevil", "a/../../evil", "/etc/evil", ".hidden", "a/.hidden", "a b", "a%00b", "x" * 300, "a/b/c/d/e",
    "a%5cb", "-evil", "%ff%fe", "debug-chat", "embedded",
])  # fmt: skip
def test_a_name_that_is_none_is_refused(name: str, folder: Path, place: Path, http: httpx.Client) -> None:
    before = files_below(place)
    request = http.build_request("POST", "/v1/adapters/x", files=of_folder(folder / "face-1"))
    request.url = request.url.copy_with(raw_path=b"/v1/adapters/" + name.encode())
    answer = http.send(request)
    assert 400 <= answer.status_code < 500, answer.text
    assert files_below(place) == before


def test_an_upload_is_served_as_what_it_is_and_deleted(folder: Path, http: httpx.Client) -> None:
    source = folder / "talk/tlora"
    body = {"model": "new/one", "messages": [{"role": "user", "content": "what is 1 plus 2 ?"}], "temperature": 0}
    prints, report = set(), b'{"kind": "instruction", "base": "debug-chat"}'
    for files in (
        [*of_folder(source), ("files", ("report.json", report))],
        archive(*good(source), ("report.json", report)),
        archive(
            *good(source, "tlora/"), ("tlora/report.json", report),
            ("tlora/README.md", b"a card"), ("tlora/loss.png", b"a picture"), ("__MACOSX/tlora/._README.md", b""),
        ),
    ):  # fmt: skip
        answer = http.post("/v1/adapters/new/one", files=files)
        assert answer.status_code == 201, answer.text
        assert answer.json()["method"] == "tlora" and answer.headers["x-smidgen-adapter"] == "new/one"
        prints.add(answer.headers["x-smidgen-fingerprint"])
        assert http.get("/v1/adapters/new/one").json() == answer.json() | {
            k: http.get("/v1/adapters/new/one").json()[k] for k in ("resident",)
        }
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200 and reply.headers["x-smidgen-fingerprint"] in prints
        taken = http.post("/v1/adapters/new/one", files=files)
        assert 400 <= taken.status_code < 500
        assert http.post("/v1/adapters/new/one", files=files, data={"overwrite": "true"}).status_code == 201
        assert http.delete("/v1/adapters/new/one").json() == {"name": "new/one", "deleted": True}
        assert http.post("/v1/chat/completions", json=body).status_code == 404
        assert http.delete("/v1/adapters/new/one").status_code == 404
    assert len(prints) == 1


def test_what_replaces_an_adapter_answers_from_then_on(folder: Path, http: httpx.Client) -> None:
    body = {"model": "face", "prompt": "a portrait", "seed": 1, "steps": 2}

    def put(name: str, **more: str) -> str:
        answer = http.post("/v1/adapters/face", files=zipped(folder / name), data=more)
        assert answer.status_code == 201, answer.text
        drawn = http.post("/v1/images/generations", json=body)
        assert drawn.headers["x-smidgen-fingerprint"] == answer.headers["x-smidgen-fingerprint"]
        return drawn.json()["data"][0]["b64_json"]

    one, two = put("face-1"), put("face-2", overwrite="true")
    assert one != two and put("face-1", overwrite="true") == one
    assert http.delete("/v1/adapters/face").status_code == 200


def test_too_large_is_413_by_its_length_and_by_what_comes(http: httpx.Client, folder: Path, place: Path) -> None:
    before = files_below(place)
    large = [("files", (CONFIG, b"{}")), ("files", ("adapter_model.safetensors", bytes(4 * MOST)))]
    assert http.post("/v1/adapters/large", files=large).status_code == 413
    bomb = archive(good(folder / "talk/lora")[0], ("adapter_model.safetensors", bytes(4 * MOST)))
    assert http.post("/v1/adapters/large", files=bomb).status_code == 413
    assert files_below(place) == before


def test_what_vllm_calls(http: httpx.Client, place: Path) -> None:
    def load(path: str, name: str = "brought", **more: bool) -> httpx.Response:
        return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    before = files_below(place)
    for path in (
        "/etc", "..", ".", "", "../adapters/face-0", str(place / "adapters" / "face-0"), "link", "linked", "nowhere", "a\0b",
        "face-1/adapter_config.json", "empty", "~",
    ):  # fmt: skip
        answer = load(path)
        assert answer.status_code in (400, 403), (path, answer.text)
        assert http.get("/v1/adapters/brought").status_code == 404
    assert files_below(place) == before
    assert load("face-1").text == "Success: LoRA adapter 'brought' added successfully."
    assert load(str(place / "others" / "face-1")).status_code == 400  # it is there
    assert load(str(place / "others" / "face-1"), load_inplace=True).status_code == 200
    drawn = http.post("/v1/images/generations", json={"model": "brought", "prompt": "a portrait", "steps": 1})
    assert drawn.status_code == 200 and drawn.headers["x-smidgen-adapter"] == "brought"

    def unload(name: str) -> httpx.Response:
        return http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    assert unload("face-0").status_code == 400 and (place / "adapters" / "face-0").is_dir()
    assert unload("brougth").status_code == 404
    assert unload("brought").text == "Success: LoRA adapter 'brought' removed successfully."
    assert unload("brought").status_code == 404 and (place / "others" / "face-1").is_dir()
    assert files_below(place) == before


def test_an_adapter_predicted_from_a_photo(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/images/generations", json={"model": "embedded", "prompt": "a portrait", "seed": 1, "steps": 10}
    )
    photo = base64.b64decode(answer.json()["data"][0]["b64_json"])
    made = http.post(
        "/v1/predict", data={"name": "people/ann", "seed": "3"}, files=[("photos", ("../../x.png", photo))]
    )
    assert made.status_code == 201, made.text
    assert made.json()["base"] == "embedded" and made.headers["x-smidgen-adapter"] == "people/ann"
    body = {"model": "people/ann", "prompt": "a portrait", "seed": 1, "steps": 2}
    shown = http.post("/v1/images/generations", json=body)
    assert shown.headers["x-smidgen-fingerprint"] == made.headers["x-smidgen-fingerprint"]
    base = http.post("/v1/images/generations", json=body | {"model": "embedded"})
    assert shown.json()["data"][0]["b64_json"] != base.json()["data"][0]["b64_json"]
    notes = made.json()["notes"]
    assert any("hair" in note for note in notes) and not any("/" in note for note in notes), notes
    flat = io.BytesIO()
    Image.new("RGB", (64, 64)).save(flat, "PNG")
    for photos in (b"no picture", b"", flat.getvalue()):
        refused = http.post("/v1/predict", data={"name": "bob"}, files=[("photos", ("x.png", photos))])
        assert refused.status_code == 400 and "photo" in said(refused), refused.text
        assert "/" not in said(refused).partition(" cannot")[0], "the server's own paths are nobody's business"
        assert "--" not in said(refused), "a form has no flags"
    assert http.get("/v1/adapters/bob").status_code == 404
    grey = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("L").save(grey, "PNG")
    files = [("photos", ("x.png", grey.getvalue()))]
    refused = http.post("/v1/predict", data={"name": "bob"}, files=files)
    assert refused.status_code == 400 and "unchecked=true goes on all the same" in said(refused), refused.text
    sure = http.post("/v1/predict", data={"name": "bob", "unchecked": "true"}, files=files)
    assert sure.status_code == 201 and any(note.startswith("Unchecked: ") for note in sure.json()["notes"]), sure.text
    http.delete("/v1/adapters/bob")


def test_the_list_says_what_is_refused_too(http: httpx.Client, place: Path) -> None:
    broken = place / "adapters" / "broken"
    broken.mkdir()
    (broken / CONFIG).write_text("{")
    try:
        found = http.get("/v1/adapters").json()
        assert {one["name"] for one in found["adapters"]} >= {"talk/lora", "face-0"}
        assert list(found["refused"]) == ["broken"]
        answer = http.post("/v1/completions", json={"model": "broken", "prompt": "a"})
        assert answer.status_code == 400 and "adapter_model.safetensors" in said(answer)
    finally:
        shutil.rmtree(broken)
