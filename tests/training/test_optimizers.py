"""Every optimizer on the loop: it learns, resumes to the bit with and without averages, and says what it lacks."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from smidgen.errors import ConfigError, MissingExtraError
from smidgen.training import optimizers, snapshots
from smidgen.training.loop import LoopConfig, train
from smidgen.training.settings import from_dict
from tests.training import toys

CONFIG = LoopConfig(max_train_steps=12, lr_warmup_steps=2, checkpointing_steps=5)


def wide() -> nn.Module:
    """The first layer has 8-bit moments, the rest are too small for them."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(2, 2048), nn.Linear(2048, 2))


def run(folder, config, task=None, **options):
    module = wide()
    result = train(task or toys.Line(), module, toys.groups(module, 2e-3), config, folder, progress=False, **options)
    return module, result


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("name", get_args(optimizers.Name))
def test_it_learns_and_resumes_to_the_bit(name, decay, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = replace(CONFIG, optimizer=name, ema_decay=decay)
    whole, first = run(tmp_path / "whole", config)
    assert first.losses[-1] < 0.5 * first.losses[0]

    def stop(index):
        if index == 8:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(tmp_path / "broken", config, toys.Line(on_batch=stop))
    resumed, second = run(tmp_path / "broken", config, resume="latest")
    assert second.resumed_from == 5 and second.losses == first.losses
    assert toys.bits(resumed) == toys.bits(whole)


def test_adamw8bit_remembers_bytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    module = wide()
    optimizer = optimizers.make_optimizer("adamw8bit", toys.groups(module), torch.device("cpu"))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state[module[0].weight]["state1"].dtype == torch.uint8
    assert optimizer.state[module[1].bias]["state1"].dtype == torch.float32


def test_without_bitsandbytes_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"adamw8bit needs bitsandbytes: pip install 'smidgen\[quantised\]'"):
        run(tmp_path, replace(CONFIG, optimizer="adamw8bit"))


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer must be one of 'adamw'.*not 'adamw8'.*'adamw8bit'\?"):
        from_dict(LoopConfig, {"optimizer": "adamw8"})


def test_averages_wait_for_a_parameter_that_is_reached_late():
    """An optimizer sets up a state that is empty, so an average may not be the first thing in it."""
    early, late = (nn.Parameter(torch.ones(2)) for _ in range(2))
    trained = {"early": early, "late": late}
    optimizer = optimizers.make_optimizer("adamw", [{"params": [early, late], "lr": 0.1}], torch.device("cpu"))
    for step in (1, 2):
        early.grad = torch.ones(2)
        late.grad = torch.ones(2) if step == 2 else None
        optimizer.step()
        snapshots.update_averages(trained, optimizer, 0.5, step)
    assert set(snapshots.moments(trained, optimizer)) >= {"early::ema", "late::ema", "late::exp_avg"}
