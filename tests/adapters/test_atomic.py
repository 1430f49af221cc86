"""Files that are whole or not there."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.adapters import atomic
from smidgen.adapters.atomic import new_file, new_files, replace_file, replace_folder, settle


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


OLD, NEW = (
    {"a.json": "old", "b": "old", "sub/c": "old", "mine": "stays"},
    {"a.json": "new", "b": "new", "mine": "stays"},
)


def before(out: Path) -> None:
    for name, text in OLD.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


def save_new(out: Path) -> None:
    with new_files(out, gone=["sub/c", "never/there"]) as scratch:
        for name in ("a.json", "b"):
            (scratch / name).write_text("new")


def killed_at(line: int, out: Path) -> bool:
    """Runs ``save_new`` in a process that dies at the given line of the writer; whether it lived to the end."""
    child = os.fork()
    if not child:
        left = line

        def trace(frame, event, _):  # type: ignore[no-untyped-def]
            nonlocal left
            if frame.f_code.co_filename != atomic.__file__:
                return None
            left -= event == "line"
            if not left:
                os._exit(9)
            return trace

        sys.settrace(trace)
        save_new(out)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")
def test_a_writer_that_is_killed_at_any_line_leaves_the_old_files_or_the_new(tmp_path):
    seen = set()
    for line in range(1, 400):
        out = tmp_path / str(line)
        before(out)
        lived = killed_at(line, out)
        settle(out)
        left = {name: text for name, text in held(out).items() if not name.startswith(f".{out.name}-")}
        assert left in (OLD, NEW), f"line {line}: {left}"
        seen.add(left == NEW)
        if lived:
            break
    assert lived and seen == {True, False} and not (out / ".saving").exists()


def test_what_somebody_wrote_since_wins_over_unfinished_work(tmp_path, monkeypatch):
    for change, wanted in ((lambda: (tmp_path / "b").write_text("other"), "other"), (lambda: None, "new")):
        before(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "settle", lambda folder: None)
            save_new(tmp_path)
        assert held(tmp_path)["b"] == "old"
        change()
        settle(tmp_path)
        assert held(tmp_path)["b"] == wanted and held(tmp_path)["a.json"] == ("new" if wanted == "new" else "old")
        assert not (tmp_path / ".saving").exists()


@pytest.mark.parametrize(
    "record",
    ['{"../outside": [null, "x"]}', '{"link/x": [null, "x"]}', "[]", '{"a": 3}', "{", '{"/etc/x": [null, null]}', ""],
)
def test_unfinished_work_of_strangers_reaches_nothing_outside(tmp_path, record):
    out, outside = tmp_path / "out", tmp_path / "elsewhere"
    (out / ".saving" / "link").mkdir(parents=True)
    outside.mkdir()
    (out / "link").symlink_to(outside)
    for path in (out / ".saving" / "link" / "x", out / "outside"):
        path.write_text("evil")
    (out / ".saving" / ".record").write_text(record)
    settle(out)
    assert not list(outside.iterdir()) and not (tmp_path / "outside").exists() and not (out / ".saving").exists()


def test_a_folder_in_the_way_is_an_error_before_anything_moves(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b").write_text("old")
    with pytest.raises(IsADirectoryError):
        save_new(tmp_path)
    assert (tmp_path / "b").read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b"]
