"""Put an adapter into a model, train it with the one loop, and save it as a folder: the same for every task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.errors import AdapterFileError
from smidgen.training import engine
from smidgen.training.loop import LoopConfig, Task, train
from smidgen.training.randomness import derive


@dataclass(frozen=True)
class Rates:
    """Learning rates of a method: for the residual, and for the transform where it has one."""

    residual: float
    transform: float


@dataclass(frozen=True)
class Fitted:
    """A trained adapter in ``folder``; ``bytes`` is what its two files take on the disk."""

    name: str
    folder: Path
    trained_numbers: int
    bytes: int
    seconds: float
    losses: list[float] = field(repr=False)


def fit(
    name: str,
    model: nn.Module,
    task: Task,
    peft_config: Any,
    rates: Rates,
    loop: LoopConfig,
    folder: Path,
    *,
    weight_decay: float = 0.0,
    identity: Mapping[str, Any] | None = None,
    resume: str | None = None,
    progress: bool = True,
) -> Fitted:
    """Adapt ``model`` in place by ``peft_config``, train the adapter on ``task`` and save it in ``folder``.

    What the adapter starts from depends on ``loop.seed`` alone. ``identity`` is what a checkpoint must share to be
    resumed. Raises what ``train`` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(loop.seed, "init"))
        engine.adapt(model, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained numbers stay fp32 whatever the base's precision
            parameter.data = parameter.data.float()
    numbers = engine.trained_numbers(model)
    groups = engine.groups(model, peft_config, rates.residual, rates.transform, weight_decay)
    result = train(task, model, groups, loop, folder, resume=resume, identity=identity, progress=progress)
    size = engine.save(model, peft_config, folder)
    return Fitted(name, folder, numbers, size, result.seconds, result.losses)


def prove(model: nn.Module, folder: Path, output: Callable[[], torch.Tensor]) -> tuple[str, ...]:
    """Load the saved adapter into a fresh ``model`` and prove that it is on; returns sentences for the report.

    ``output`` computes something that depends on the adapter. Raises AdapterFileError when verification fails or the
    output is that of the base.
    """
    config = engine.load(model, folder)
    ok, reasons = engine.verify(model, folder, config)
    if not ok:
        raise AdapterFileError(f"The adapter saved in {folder} does not verify on a fresh base: {'; '.join(reasons)}")
    with torch.no_grad():
        adapted = output()
        with engine.disabled(model):
            plain = output()
    change = float((adapted - plain).norm() / plain.norm())
    if not change > 0:
        raise AdapterFileError(
            f"The adapter saved in {folder} changes nothing: its output equals the base's bit for bit."
        )
    return (f"Loaded again into a fresh base and verified; it changes the UNet's answer by {change:.1%}.",)
