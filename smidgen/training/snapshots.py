"""What an optimizer trains and remembers, as tensors by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import ConfigError

Trained = Mapping[str, nn.Parameter]


def check_groups(trained: Trained, groups: Sequence[Mapping[str, Any]]) -> None:
    """ConfigError unless the optimizer ``groups`` hold each of ``trained`` once, and nothing else."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    if not grouped:
        raise ConfigError("There is nothing to train: no parameter of the model requires a gradient.")
    if set(grouped) != {id(parameter) for parameter in trained.values()} or len(set(grouped)) != len(grouped):
        raise ConfigError("The optimizer groups must hold every parameter that requires a gradient exactly once.")


def numbers(trained: Trained) -> dict[str, Tensor]:
    """A copy of ``trained`` on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def put(trained: Trained, found: Mapping[str, Tensor]) -> None:
    """Write the numbers ``found`` into ``trained``. ConfigError when the names differ."""
    other = set(trained) ^ set(found)
    if other:
        raise ConfigError(f"The checkpoint trains other parameters than this run, for example {min(other)!r}.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])


def moments(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers as ``<parameter>::<key>``, on the CPU; ``<key>#`` where it is no tensor but a number."""
    names = {id(parameter): name for name, parameter in trained.items()}
    found: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            whole = isinstance(value, Tensor)
            number = (
                value.detach()
                if whole
                else torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)
            )
            found[f"{names[id(parameter)]}::{key}{'' if whole else '#'}"] = number.cpu().clone()
    return found


def update_averages(trained: Trained, optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Moves the average of each of ``trained`` after optimizer step ``step`` (from 1); it lives with Adam's moments, so
    that checkpoints hold it. Early on it forgets faster: decay is at most (1 + step) / (10 + step)."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for parameter in trained.values():
            state = optimizer.state.get(parameter)
            if not state:  # nothing has moved it yet, and optimizers set up a state that is empty
                continue
            state["ema"] = state["ema"].lerp_(parameter, share) if "ema" in state else parameter.detach().clone()


def averages(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The averages by name; the number itself where nothing has been averaged."""
    return {name: optimizer.state[parameter].get("ema", parameter) for name, parameter in trained.items()}


def put_moments(trained: Trained, optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor]) -> None:
    """Give the optimizer back what ``moments`` took."""
    for key, value in found.items():
        name, _, slot = key.rpartition("::")
        parameter = trained[name]
        if slot.endswith("#"):
            optimizer.state[parameter][slot[:-1]] = value.item()
            continue
        # Adam keeps its step counter on the CPU, its moments beside the parameter
        optimizer.state[parameter][slot] = value if value.ndim == 0 else value.to(parameter.device)
