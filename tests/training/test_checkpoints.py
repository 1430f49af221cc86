"""Checkpoints: whole or absent, exact, and outspoken when something is wrong."""

import errno
import json
import os

import pytest
import torch
from damage import rewrite

from smidgen.adapters.atomic import replace_file
from smidgen.errors import CheckpointError
from smidgen.training import checkpoints
from smidgen.training.checkpoints import Checkpoint, CheckpointStore, resolve


def checkpoint(step: int, identity: dict | None = None) -> Checkpoint:
    trained = {"w": torch.full((3,), float(step)), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    moments = {"w::exp_avg": torch.arange(3.0), "w::step": torch.tensor(float(step))}
    return Checkpoint(step, trained, moments, identity or {"seed": 0, "data.size": 3}, [0.1, 1 / 3], 2.5)


def test_a_checkpoint_comes_back_to_the_bit_and_holds_no_pickle(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.write(checkpoint(5))
    found = store.latest({"seed": 0, "data.size": 3})
    assert found.step == 5 and found.losses == [0.1, 1 / 3] and found.seconds == 2.5
    for name, tensor in checkpoint(5).trained.items():
        assert found.trained[name].dtype == tensor.dtype and torch.equal(found.trained[name], tensor)
    assert torch.equal(found.optimizer["w::step"], torch.tensor(5.0))
    assert sorted(file.name for file in path.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "trained.safetensors",
    ]


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 10):
        store.write(checkpoint(step))
    assert store.steps() == [2, 10]
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "state", "delete", "edit"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path)
    store.write(checkpoint(1))
    newest = store.write(checkpoint(2))
    weights, state = newest / "trained.safetensors", newest / "state.json"
    if damage == "truncate":
        rewrite(weights, weights.read_bytes()[:-4])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        rewrite(weights, content)
    elif damage == "state":
        state.write_text(state.read_text()[:40])
    elif damage == "delete":
        weights.unlink()
    else:
        state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 3}))
    assert store.latest().step == 1
    assert "checkpoint-2 is damaged" in caplog.text
    store.write(checkpoint(2))  # the damaged one is replaced
    assert store.latest().step == 2


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.write(checkpoint(1)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
        store.latest()


def test_resuming_with_another_setting_names_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.write(checkpoint(1))
    with pytest.raises(CheckpointError, match=r"data\.size: 3 then, 4 now"):
        resolve(tmp_path, "latest", 2, {"seed": 0, "data.size": 4})
    assert resolve(tmp_path, "latest", 2, {"seed": 0, "data.size": 3}).step == 1
    assert resolve(tmp_path, "checkpoint-1", 2, {"seed": 0, "data.size": 3}).step == 1
    assert resolve(tmp_path, None, 2, {}) is None
    with pytest.raises(CheckpointError, match="Did you mean 'checkpoint-1'"):
        resolve(tmp_path, "checkpoint-12", 2, {})


def test_a_full_disk_is_said_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.write(checkpoint(1))
    real = checkpoints.write_file

    def full(path, content):
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*checkpoint-1 is intact"):
        store.write(checkpoint(2))
    assert store.steps() == [1] and store.latest().step == 1
    assert not list(tmp_path.glob(".checkpoint*"))


def test_what_a_killed_process_left_is_swept_and_never_read(tmp_path):
    store = CheckpointStore(tmp_path)
    store.write(checkpoint(1))
    half = tmp_path / ".checkpoint-2.tmp"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    assert store.steps() == [1]
    store.write(checkpoint(2))
    assert store.latest().step == 2 and not half.exists()


def test_replace_file_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    replace_file(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        replace_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]
