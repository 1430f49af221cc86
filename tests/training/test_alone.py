"""Two runs into one folder: the second is refused at once, names the first, and changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from smidgen import cli
from smidgen.errors import ConfigError, SmidgenError
from smidgen.training.alone import LOCK, OWNER, alone, runs_alone
from smidgen.training.processes import run_folder

HOLD = "import sys, time; from pathlib import Path; from smidgen.training.alone import alone\n"
HOLD += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
TRAINING = {  # what each takes before --out
    "personalize": ["pictures"],
    "train text-classification": ["texts.csv"],
    "train image-classification": ["pictures"],
    "train instruction": ["texts.csv"],
    "train control": ["pictures", "--control", "canny"],
    "generator train": [],
    "zoo evaluate": ["zoo"],
}


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process at work in ``tmp_path / "out"``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_training_command_is_refused_while_another_works(holder: Any, tmp_path: Path, capsys: Any) -> None:
    before = files(tmp_path)
    for name, words in TRAINING.items():  # none of the inputs is there: nothing is looked at before the lock
        assert cli.main([*name.split(), *words, "--out", str(tmp_path / "out")]) == 2, name
        said = capsys.readouterr().err
        assert f"Another run is at work in {tmp_path / 'out'}: process {holder.pid} on " in said, said
        assert "choose another --out" in said and "Traceback" not in said
        assert files(tmp_path) == before, name


def test_the_embedded_bases_recipe_too(holder: Any, tmp_path: Path) -> None:
    from smidgen.lab.embedded_base.cli import main

    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        main(["--stage", "card", "--work", str(tmp_path / "out"), "--out", str(tmp_path / "shipped")])


def test_a_killed_run_stops_nobody(holder: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (out / OWNER).exists(), "what the killed run left"
    with alone(out):
        assert json.loads((out / OWNER).read_text())["pid"] == os.getpid()
    assert files(tmp_path) == {}


def test_a_run_may_ask_again_but_no_other_thread(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with alone(tmp_path):
                refused.append("not at all")
        except ConfigError as error:
            refused.append(str(error))

    with alone(tmp_path), run_folder(tmp_path, None, False), alone(tmp_path / "." / "inner" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in refused[0]
    assert not list(tmp_path.iterdir()) or not {LOCK, OWNER} & {path.name for path in tmp_path.iterdir()}


def test_what_a_refused_recipe_made_is_taken_away(tmp_path: Path) -> None:
    class Settings:
        out = tmp_path / "new" / "out"

    @runs_alone
    def recipe(folder: Path, config: Settings) -> str:
        assert (config.out / LOCK).exists()
        if folder.name == "wrong":
            raise SmidgenError("no")
        (config.out / "made").touch()
        return "done"

    with pytest.raises(SmidgenError, match="no"):
        recipe(Path("wrong"), config=Settings())
    assert not list(tmp_path.iterdir())
    assert recipe(Path("right"), Settings()) == "done"
    assert files(tmp_path) == {"new/out/made": b""}


def test_an_out_that_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match=r"Nothing can be written to .*choose another --out"), alone(out):
            pass
    assert files(tmp_path) == {"file": b""}


def test_only_the_main_process_of_a_run_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone(tmp_path):
        monkeypatch.setenv("RANK", "1")
        worker = threading.Thread(target=lambda: alone(tmp_path).__enter__())
        worker.start()
        worker.join()
