"""The loop on a toy task: it learns, resumes to the bit, stops cleanly and refuses what is not finite."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from smidgen.errors import CheckpointError, ConfigError, TrainingError
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.interrupts import TrainingInterrupted
from smidgen.training.loop import LoopConfig, learning_rate_factor, train
from smidgen.training.randomness import examples, stream
from tests.training import toys
from tests.training.two_processes import Masked

CONFIG = LoopConfig(max_train_steps=30, lr_warmup_steps=3, checkpointing_steps=10)


def run(folder, task=None, config=CONFIG, dropout=0.0, **options):
    module = toys.model(dropout)
    result = train(task or toys.Line(), module, toys.groups(module), config, folder, progress=False, **options)
    return module, result


def test_it_learns(tmp_path):
    _, result = run(tmp_path, config=LoopConfig(max_train_steps=300, lr_warmup_steps=3, max_grad_norm=10.0))
    assert result.steps == 300 and len(result.losses) == 300
    assert result.losses[-1] < 0.01 * result.losses[0]


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path):
    whole, first = run(tmp_path / "whole", dropout=0.3)

    def stop(index):
        if index == 17:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(tmp_path / "broken", toys.Line(on_batch=stop), dropout=0.3)
    task = toys.Line()
    resumed, second = run(tmp_path / "broken", task, dropout=0.3, resume="latest")
    assert task.seen == list(range(10, 30)) and second.resumed_from == 10
    assert toys.bits(resumed) == toys.bits(whole)
    assert second.losses == first.losses


def test_resume_without_any_checkpoint_starts_at_the_beginning(tmp_path):
    _, result = run(tmp_path, resume="latest")
    assert result.resumed_from is None and len(result.losses) == 30


def test_a_finished_run_resumes_to_itself(tmp_path):
    module, _ = run(tmp_path)
    task = toys.Line()
    again, _ = run(tmp_path, task, resume="latest")
    assert task.seen == [] and toys.bits(again) == toys.bits(module)


def test_another_identity_is_refused(tmp_path):
    run(tmp_path, identity={"rate": 1})
    with pytest.raises(CheckpointError, match="rate: 1 then, 2 now"):
        run(tmp_path, identity={"rate": 2}, resume="latest")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_that_goes_on_exactly(tmp_path, signum):
    whole, _ = run(tmp_path / "whole")
    task = toys.Line(on_batch=lambda index: os.kill(os.getpid(), signum) if index == 13 else None)
    before = signal.getsignal(signum)
    with pytest.raises(TrainingInterrupted, match="--resume-from-checkpoint latest") as caught:
        run(tmp_path / "cut", task)
    assert caught.value.signum == signum and signal.getsignal(signum) is before
    assert CheckpointStore(tmp_path / "cut").steps() == [10, 14]
    resumed, _ = run(tmp_path / "cut", resume="latest")
    assert toys.bits(resumed) == toys.bits(whole)


def test_a_loss_that_is_not_finite_rolls_back_and_names_step_and_files(tmp_path):
    module = toys.model()
    with pytest.raises(TrainingError, match=r"loss of step 26 is nan.*checkpoint-20.*row 25"):
        train(toys.Line(poison=frozenset({25})), module, toys.groups(module), CONFIG, tmp_path / "bad", progress=False)
    store = CheckpointStore(tmp_path / "bad")
    assert store.steps() == [10, 20]
    kept = store.latest().trained
    assert all(torch.equal(kept[name], parameter) for name, parameter in module.named_parameters())


def test_accumulated_batches_are_averaged_and_counted_on(tmp_path):
    task = toys.Line()
    config = LoopConfig(max_train_steps=5, lr_warmup_steps=0, gradient_accumulation_steps=3, max_grad_norm=1e9)
    module, _ = run(tmp_path, task, config)
    assert task.seen == list(range(15))
    by_hand = toys.model()
    optimizer = torch.optim.AdamW(toys.groups(by_hand))
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.02 * learning_rate_factor(config, step)
        optimizer.zero_grad()
        for part in range(3):
            (task.loss(by_hand, task.batch(3 * step + part)) / 3).backward()
        optimizer.step()
    for mine, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_batches_of_a_step_count_by_their_weights(tmp_path):
    """Two unequal batches accumulated equal one batch of their union."""
    config = LoopConfig(max_train_steps=12, lr_warmup_steps=2)
    small, halves = run(tmp_path / "a", Masked(3), replace(config, gradient_accumulation_steps=2))
    large, whole = run(tmp_path / "b", Masked(6), config)
    torch.testing.assert_close(list(small.parameters()), list(large.parameters()), rtol=1e-5, atol=1e-6)
    assert halves.losses == pytest.approx(whole.losses, rel=1e-5)
    alike = Masked(3)
    alike.batch = lambda index: {**Masked(3).batch(index), "weight": 1.0}
    other, _ = run(tmp_path / "c", alike, replace(config, gradient_accumulation_steps=2))
    assert not torch.allclose(other[0].weight, large[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_without_meaning_are_refused(tmp_path, weight):
    task = Masked(3)
    task.batch = lambda index: {**Masked(3).batch(index), "weight": weight}
    module = toys.model()
    with pytest.raises(TrainingError, match=r"The batches of step 1 weigh \[\["):
        train(task, module, toys.groups(module), CONFIG, tmp_path, progress=False)
    assert toys.bits(module) == toys.bits(toys.model())


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    module = toys.model()
    torch.manual_seed(3)
    train(toys.Line(), module, toys.groups(module), CONFIG, tmp_path, progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_previews_come_when_asked(tmp_path):
    task = toys.Line()
    run(tmp_path, task, LoopConfig(max_train_steps=7, lr_warmup_steps=0, preview_steps=3))
    assert task.previews == [0, 3, 6]


@pytest.mark.parametrize("kind, middle, end", [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("linear", 0.5, 0.0)])
def test_schedules(kind, middle, end):
    config = LoopConfig(max_train_steps=110, lr_warmup_steps=10, lr_scheduler=kind)
    assert learning_rate_factor(config, 0) == pytest.approx(0.1)
    assert learning_rate_factor(config, 10) == 1.0
    assert learning_rate_factor(config, 60) == pytest.approx(middle)
    assert learning_rate_factor(config, 109) == pytest.approx(end, abs=0.011)


def test_settings_without_meaning_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_train_steps must be at least 1, not 0"):
        LoopConfig(max_train_steps=0)
    module = toys.model()
    with pytest.raises(ConfigError, match="exactly once"):
        train(toys.Line(), module, [{"params": [module[0].weight], "lr": 1.0}], CONFIG, tmp_path, progress=False)
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        train(toys.Line(), module, [], CONFIG, tmp_path, progress=False)


def test_random_numbers_follow_from_their_name_alone():
    assert torch.equal(torch.rand(3, generator=stream(1, "a", 2)), torch.rand(3, generator=stream(1, "a", 2)))
    assert not torch.equal(torch.rand(3, generator=stream(1, "a", 2)), torch.rand(3, generator=stream(1, "a", 3)))
    for epoch in range(3):  # every example once an epoch, also where batches straddle epochs
        order = [pick for batch in range(30) for pick in examples(0, batch, 3, 5)]
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
