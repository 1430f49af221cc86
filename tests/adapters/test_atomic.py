"""Files that are whole or not there."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.adapters.atomic import new_file, new_files, replace_file, replace_folder


def held(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    replace_file(path, "old")
    with pytest.raises(KeyError), new_file(path) as beside:
        beside.write_text("half")
        assert beside.parent == path.parent and path.read_text() == "old"
        raise KeyError
    assert held(tmp_path) == {"deep/a.txt": "old"}
    replace_file(path, b"new")
    assert held(tmp_path) == {"deep/a.txt": "new"}


def test_a_file_has_the_mode_of_ordinary_files_and_names_its_writer(tmp_path):
    with new_file(tmp_path / "a.safetensors") as beside:
        save_file({"x": torch.ones(2)}, beside)  # a mode of its own
        assert beside.name.startswith(".") and beside.name.endswith(f".{os.getpid()}.tmp")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "plain")}
    assert len(modes) == 1 and load_file(tmp_path / "a.safetensors")["x"].sum() == 2


def test_threads_that_write_the_same_file_leave_one_of_theirs(tmp_path):
    def write(letter: str) -> None:
        for _ in range(50):
            replace_file(tmp_path / "a", letter * 5000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(held(tmp_path)) == ["a"] and (tmp_path / "a").read_text() in {letter * 5000 for letter in "xyz"}


def test_files_of_a_folder_come_together_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyError), new_files(out) as scratch:
        (scratch / "a").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with new_files(out) as scratch:
            (scratch / "part").mkdir()
            (scratch / "part" / "a").write_text(text)
            (scratch / "b.json").write_text(text)
        (out / "mine").write_text("stays")
    assert held(tmp_path / "new") == {"out/b.json": "two", "out/mine": "stays", "out/part/a": "two"}


def test_configs_are_moved_last(tmp_path, monkeypatch):
    moved, move = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b)), move(a, b)))
    with new_files(tmp_path) as scratch:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (scratch / name).touch()
    assert [p.name for p in moved if not p.name.startswith(".")] == ["adapter_model.safetensors", "adapter_config.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with replace_folder(out) as scratch:
            (scratch / text).write_text(text)
        assert held(tmp_path) == {f"out/{text}": text}
    with pytest.raises(KeyError), replace_folder(out) as scratch:
        (scratch / "three").write_text("half")
        raise KeyError
    assert held(tmp_path) == {"out/two": "two"} and [p.name for p in tmp_path.iterdir()] == ["out"]
