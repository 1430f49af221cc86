"""Losses and metrics reach the trackers, on this machine alone; a tracker that is not there is an error."""

import pytest

from smidgen.errors import MissingExtraError
from smidgen.training.loop import LoopConfig, train
from tests.training import toys

STEPS = {"max_train_steps": 4, "lr_warmup_steps": 2, "lr_scheduler": "constant", "eval_steps": 2}


def run(folder, tracker):
    module = toys.model()
    config = LoopConfig(**STEPS, report_to=tracker)
    return train(toys.Judged(), module, toys.groups(module), config, folder, progress=False)


def test_tensorboard_holds_what_the_run_returned(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "smidgen"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "eval/error", "eval/size"}
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx(dict(enumerate(result.losses, start=1)), rel=1e-6)
    rates = [event.value for event in events.Scalars("lr")]
    assert rates == pytest.approx([0.01, 0.02, 0.02, 0.02])
    errors = {event.step: event.value for event in events.Scalars("eval/error")}
    expected = {found["step"]: found["error"] for found in result.evaluations}
    assert list(errors) == [0, 2, 4] and errors == pytest.approx(expected, rel=1e-6)


def test_trackio_writes_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import socket
    import sqlite3

    from trackio import sqlite_storage, utils

    def refuse(*_, **__):
        raise OSError("no network in this test")

    where = tmp_path / "trackio"
    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", where)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = run(tmp_path, "trackio")
    (database,) = where.glob("*.db")
    with sqlite3.connect(database) as rows:
        text = "\n".join(str(row) for row in rows.execute("select step, metrics from metrics order by step"))
    assert f"{result.evaluations[-1]['error']}" in text and f"{result.losses[-1]}" in text


def test_progress_can_be_watched_in_a_file(tmp_path):
    from smidgen.training.progress import read_progress

    result = run(tmp_path, "jsonl")
    found = read_progress(tmp_path)
    assert list(found) == [0, 1, 2, 3, 4] and "loss" not in found[0]  # before any step there is an evaluation alone
    trained = [found[step] for step in range(1, 5)]
    assert [row["loss"] for row in trained] == result.losses
    assert [row["lr"] for row in trained] == pytest.approx([0.01, 0.02, 0.02, 0.02])
    assert found[4]["eval/error"] == result.evaluations[-1]["error"]
    assert sorted(row["time"] for row in trained) == [row["time"] for row in trained]


@pytest.mark.parametrize("tracker, package", [("tensorboard", r"smidgen\[track\]"), ("trackio", r"smidgen\[track\]"), ("wandb", "wandb")])  # fmt: skip
def test_a_tracker_that_is_not_installed_names_what_to_install(tmp_path, monkeypatch, tracker, package):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(MissingExtraError, match=rf"--report-to {tracker} needs it: pip install '{package}'"):
        run(tmp_path, tracker)
    assert list(tmp_path.iterdir()) == []
