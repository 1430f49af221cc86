"""Evaluations: their history is exact, they choose the best step and end the run, whatever happens to it."""

import math

import pytest
import torch

from smidgen.errors import CheckpointError, ConfigError, TrainingError
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.evaluation import Criterion, criterion, measured
from smidgen.training.loop import LoopConfig, train
from tests.training import toys

LOSS = Criterion("loss", greater_is_better=False)
CONFIG = LoopConfig(
    max_train_steps=60, lr_warmup_steps=3, lr_scheduler="constant", checkpointing_steps=7, eval_steps=4,
    max_grad_norm=10.0, early_stopping_patience=3,
)  # fmt: skip


def history(*values):
    return [{"step": 5 * number, "loss": value} for number, value in enumerate(values)]


def run(folder, task=None, config=CONFIG, **options):
    module = toys.model(dropout=0.1)
    groups = toys.groups(module, lr=0.05)
    return module, train(task or toys.Judged(), module, groups, config, folder, progress=False, **options)


def error(module):
    with torch.no_grad():
        return float(toys.Judged().evaluate(module.eval())["error"])


def test_the_best_is_the_first_of_the_best():
    assert LOSS.best_step([]) is None
    assert LOSS.best_step(history(3.0, 1.0, 2.0, 1.0)) == 5
    assert Criterion("loss", greater_is_better=True).best_step(history(3.0, 1.0, 3.0)) == 0


def test_patience_counts_the_evaluations_since_the_best():
    assert not LOSS.exhausted([], 1)
    assert not LOSS.exhausted(history(2.0, 1.0, 1.0), 2)
    assert LOSS.exhausted(history(2.0, 1.0, 1.0, 1.0), 2)
    assert not LOSS.exhausted(history(1.0, 2.0, 3.0, 4.0), 0)


def test_what_a_kept_checkpoint_needs_is_the_best_as_known_then():
    found = history(3.0, 1.0, 2.0, 0.5)
    assert LOSS.needed(found, [7, 12]) == {5}
    assert LOSS.needed(found, [2, 12, 20]) == {0, 5, 15}
    assert LOSS.needed([], [3]) == set()


def test_what_a_task_measures_is_checked():
    assert measured({"loss": 0.5, "size": 2.0}, LOSS, 8) == {"step": 8, "loss": 0.5, "size": 2.0}
    with pytest.raises(ConfigError, match=r"step 8 holds no 'loss', only 'lose'\. Did you mean 'lose'\?"):
        measured({"lose": 0.5}, LOSS, 8)
    with pytest.raises(TrainingError, match="step 8 measured loss = nan"):
        measured({"loss": math.nan}, LOSS, 8)
    with pytest.raises(ConfigError, match="cannot be called 'step'"):
        measured({"loss": 1.0, "step": 1.0}, LOSS, 8)
    with pytest.raises(ConfigError, match="Line cannot be evaluated: it has no metric, no greater_is_better"):
        criterion(toys.Line())
    with pytest.raises(ConfigError, match="early_stopping_patience 2 needs evaluations"):
        LoopConfig(early_stopping_patience=2)


def test_a_run_stops_early_and_ends_with_its_best_numbers(tmp_path):
    module, result = run(tmp_path)
    errors = {evaluation["step"]: evaluation["error"] for evaluation in result.evaluations}
    assert list(errors) == [*range(0, result.steps + 1, 4)] and result.evaluations[0]["size"] == 32.0
    assert errors[0] == error(toys.model(dropout=0.1))  # the untouched start is measured too
    assert result.best_step == min(errors, key=errors.get) == result.steps - 12
    assert 0 < result.best_step < result.steps < 60 and len(result.losses) == result.steps
    assert error(module) == errors[result.best_step] and module.training is False


def test_without_load_best_it_ends_with_its_last_numbers(tmp_path):
    config = LoopConfig(**{**vars(CONFIG), "load_best": False})
    module, result = run(tmp_path, config=config)
    assert error(module) == result.evaluations[-1]["error"] > result.evaluations[result.best_step // 4]["error"]


def test_evaluating_does_not_change_what_is_learned(tmp_path):
    quiet = LoopConfig(**{**vars(CONFIG), "eval_steps": 0, "early_stopping_patience": 0, "max_train_steps": 20})
    judged = LoopConfig(**{**vars(quiet), "eval_steps": 3, "load_best": False})
    assert toys.bits(run(tmp_path / "a", config=quiet)[0]) == toys.bits(run(tmp_path / "b", config=judged)[0])


def test_the_last_step_is_evaluated_too(tmp_path):
    config = LoopConfig(**{**vars(CONFIG), "max_train_steps": 6, "early_stopping_patience": 0})
    assert [evaluation["step"] for evaluation in run(tmp_path, config=config)[1].evaluations] == [0, 4, 6]


@pytest.mark.parametrize("moment", [0, 5, 13, 20, 24])
def test_killed_at_any_moment_it_ends_with_the_same_bits_history_and_stop(tmp_path, moment):
    whole, first = run(tmp_path / "whole")

    def kill(index):
        if index == moment:
            raise RuntimeError("killed")

    if moment < first.steps:
        with pytest.raises(RuntimeError):
            run(tmp_path / "cut", toys.Judged(on_batch=kill))
    resumed, second = run(tmp_path / "cut", resume="latest")
    assert toys.bits(resumed) == toys.bits(whole)
    assert (second.evaluations, second.losses) == (first.evaluations, first.losses)
    assert (second.best_step, second.steps) == (first.best_step, first.steps)


def test_a_run_that_stopped_early_resumes_to_its_result(tmp_path):
    module, first = run(tmp_path)
    task = toys.Judged()
    again, second = run(tmp_path, task, resume="latest")
    assert task.seen == [] and toys.bits(again) == toys.bits(module)
    assert second.evaluations == first.evaluations and second.resumed_from == first.steps == second.steps


def test_the_best_checkpoint_is_kept_from_rotation(tmp_path):
    _, result = run(tmp_path, config=LoopConfig(**{**vars(CONFIG), "checkpoints_total_limit": 1}))
    assert CheckpointStore(tmp_path).steps() == [result.best_step, result.steps]
    assert CheckpointStore(tmp_path).read(result.best_step).evaluations[-1]["step"] == result.best_step


def test_a_checkpoint_that_is_gone_on_from_still_has_its_best(tmp_path):
    """Every checkpoint that rotation leaves can be gone on from, also when the newest is damaged."""
    whole, first = run(tmp_path)
    newest = CheckpointStore(tmp_path).path(first.steps)
    (newest / "state.json").write_text("{}")
    resumed, second = run(tmp_path, resume="latest")
    assert second.resumed_from < first.steps and toys.bits(resumed) == toys.bits(whole)


def test_a_missing_best_checkpoint_is_said_before_training(tmp_path):
    _, result = run(tmp_path)
    store = CheckpointStore(tmp_path)
    (store.path(result.best_step) / "trained.safetensors").unlink()
    task = toys.Judged()
    with pytest.raises(CheckpointError, match=f"checkpoint-{result.best_step} is damaged"):
        run(tmp_path, task, resume=f"checkpoint-{result.steps}")
    assert task.seen == []


def test_a_checkpoint_of_another_folder_brings_its_best_along(tmp_path):
    whole, first = run(tmp_path / "a")
    moved, second = run(tmp_path / "b", resume=str(tmp_path / "a" / f"checkpoint-{first.steps}"))
    assert toys.bits(moved) == toys.bits(whole) and second.best_step == first.best_step


def test_an_evaluation_that_is_nan_leaves_the_last_good_numbers(tmp_path):
    class Broken(toys.Judged):
        def evaluate(self, model):
            return {"error": math.nan if 8 in self.seen else 1.0}

    module = toys.model()
    with pytest.raises(TrainingError, match="step 12 measured error = nan"):
        train(Broken(), module, toys.groups(module), CONFIG, tmp_path, progress=False)
    kept = CheckpointStore(tmp_path).latest()
    assert kept.step == 7 and all(torch.equal(kept.trained[name], p) for name, p in module.named_parameters())


def test_the_bar_shows_the_last_figure(tmp_path, capsys):
    module = toys.model()
    config = LoopConfig(max_train_steps=2, lr_warmup_steps=0, eval_steps=1)
    train(toys.Judged(), module, toys.groups(module), config, tmp_path)
    assert "error=" in capsys.readouterr().err
