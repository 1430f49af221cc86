"""Runs on the disk: what a folder says of its run, whoever reads it and whenever."""

import json
import os
import time

import psutil
import pytest
import torch

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'smidgen[ui]'")

from smidgen.errors import ConfigError
from smidgen.serving.page import runs
from smidgen.training.checkpoints import Checkpoint, CheckpointStore


@pytest.fixture
def run(tmp_path):
    path = runs.new_run(tmp_path, "Ann")
    return runs.note(path, "personalize", "Ann", steps=10)


def worker(run, alive=True):
    """A child of the run: this very process, or one that is gone."""
    created = psutil.Process().create_time() - (0 if alive else 1000)
    (run.folder / runs.PROCESS).write_text(json.dumps({"pid": os.getpid(), "created": created}))


def progress(run, *steps):
    now = time.time()
    rows = [{"step": step, "time": now + 2 * at, "loss": 1 / step, "lr": 0.1} for at, step in enumerate(steps)]
    (run.folder / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def adapter(run):
    for name in ("adapter_config.json", "adapter_model.safetensors", "report.json"):
        (run.folder / name).write_text("{}")


def keep(run, step):
    CheckpointStore(run.folder).write(Checkpoint(step, {"w": torch.ones(1)}, {}, {}))


def test_names(tmp_path):
    assert [runs.new_run(tmp_path, "Ann B.").name for _ in range(3)] == ["ann-b", "ann-b-2", "ann-b-3"]
    assert runs.new_run(tmp_path, "../../etc").name == "etc" and (tmp_path / "etc").is_dir()
    for title in ("", "  ", "!!!"):
        with pytest.raises(ConfigError, match="Give it a name first"):
            runs.new_run(tmp_path, title)


def test_a_run_is_found_by_its_own_name_alone(tmp_path, run):
    assert runs.find(tmp_path, "ann") == run and runs.read_run(run.folder) == run
    for name in ("../ann", "/etc", "ann/..", ".", "bob"):
        with pytest.raises(ConfigError, match="There is no run"):
            runs.find(tmp_path, name)
    with pytest.raises(ConfigError, match="Choose one first"):
        runs.find(tmp_path, None)


def test_states(run):
    worker(run)
    assert run.status().state == runs.STARTING
    progress(run, 1, 2, 3)
    now = run.status()
    assert (now.state, now.step, now.total, now.losses) == (runs.TRAINING, 3, 10, (1, 1 / 2, 1 / 3))
    assert now.seconds_left == pytest.approx(14, rel=1e-3)
    progress(run, *range(1, 11))
    assert run.status().state == runs.FINISHING and run.status().at_work
    adapter(run)
    assert run.status().at_work  # the child is still there
    worker(run, alive=False)
    assert run.status().state == runs.DONE and run.finished


def test_steps_that_a_resumed_run_took_back_are_gone(run):
    worker(run)
    progress(run, 1, 2, 3, 4, 3)
    assert (run.status().step, len(run.status().losses)) == (3, 3)
    with (run.folder / "progress.jsonl").open("a") as file:
        file.write('{"step": 4, "ti')  # half a line
    assert run.status().step == 3


@pytest.mark.parametrize("log, kept, state, words", [
    ("smidgen: Stopped by SIGTERM after step 4. checkpoint-4 holds the whole run.", 4, runs.STOPPED, "Step 4 is kept"),
    ("smidgen: stopped by SIGTERM; the same command starts again.", 0, runs.STOPPED, "Nothing was kept yet"),
    ("INFO: reading\nsmidgen: There is no base 'x'.", 0, runs.FAILED, "There is no base 'x'."),
    ("Killed", 4, runs.FAILED, "without a word, as when the machine runs out of memory"),
])  # fmt: skip
def test_ends(run, log, kept, state, words):
    worker(run, alive=False)
    (run.folder / runs.LOG).write_text(log)
    if kept:
        keep(run, kept)
    assert run.status().state == state and words in run.status().words


def test_a_run_that_was_stopped_before_it_could_say_so(run, monkeypatch):
    worker(run)
    ended = []
    monkeypatch.setattr(psutil.Process, "terminate", lambda self: ended.append(self.pid))
    run.stop()
    assert ended == [os.getpid()]
    known = json.loads((run.folder / runs.PROCESS).read_text())
    (run.folder / runs.PROCESS).write_text(json.dumps(known | {"created": 0}))  # gone
    assert run.status().state == runs.STOPPED


def test_a_process_number_that_was_given_out_again_is_not_the_child(tmp_path, run):
    worker(run, alive=False)
    assert runs.at_work(tmp_path) is None
    with pytest.raises(ConfigError, match="not at work"):
        run.stop()
    worker(run)
    assert runs.at_work(tmp_path) == run


def test_one_at_a_time(tmp_path, run):
    from smidgen.tasks.personalize.settings import PRESETS

    worker(run)
    with pytest.raises(ConfigError, match="Ann is being trained, and one run at a time"):
        runs.start(tmp_path, runs.new_run(tmp_path, "Bob"), "personalize", "Bob", PRESETS["debug"])
    with pytest.raises(ConfigError, match="at work"):
        run.resume(tmp_path)


def test_what_the_command_line_made_is_in_the_history(tmp_path, run):
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "mine" / name).write_text("{}")
    runs.scratch(tmp_path).mkdir(parents=True)
    assert {found.name for found in runs.list_runs(tmp_path)} == {"ann", "mine"}
    assert runs.read_run(tmp_path / "mine").status().state == runs.DONE
    assert runs.list_runs(tmp_path / "nowhere") == []


def test_the_child_is_the_command_with_the_settings_in_the_folder(tmp_path, monkeypatch):
    """A whole run of the command line, without a model: the settings are refused, and the sentence comes back."""
    from dataclasses import replace

    from smidgen.tasks.personalize.settings import PRESETS, Data

    path = runs.new_run(tmp_path, "Ann")
    config = replace(PRESETS["debug"], data=Data(folder=tmp_path / "nowhere"))
    made = runs.start(tmp_path, path, "personalize", "Ann", config)
    assert made.status().state == runs.STARTING and runs.at_work(tmp_path) == made
    deadline = time.monotonic() + 120
    while made.status().at_work and time.monotonic() < deadline:
        time.sleep(0.2)
    assert made.status().state == runs.FAILED
    assert "is not a folder of pictures" in made.status().words
