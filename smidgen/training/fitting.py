"""Put an adapter into a model, train it with the one loop, and save it as a folder: the same for every task."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.components import Components
from smidgen.adapters.methods import Rates
from smidgen.adapters.tuner.coverage import Coverage, coverage
from smidgen.errors import AdapterFileError
from smidgen.training import engine
from smidgen.training.loop import LoopConfig, Task, train
from smidgen.training.processes import is_main
from smidgen.training.randomness import derive


@dataclass(frozen=True)
class Fitted:
    """A trained adapter in ``folder``.

    ``trained_numbers`` are the adapter's own, ``head_numbers`` those of the heads beside it. ``bytes`` is what all its
    files take on the disk; ``head_bytes`` of them are the heads' tensors. ``coverage`` says which layers it is on.
    """

    name: str
    folder: Path
    trained_numbers: int
    bytes: int
    seconds: float
    losses: list[float] = field(repr=False)
    evaluations: list[dict[str, Any]] = field(default_factory=list, repr=False)
    best_step: int | None = None
    head_numbers: int = 0
    head_bytes: int = 0
    coverage: Coverage | None = None


@dataclass(frozen=True)
class Beside:
    """Another component of the model's pipeline, with an adapter of its own."""

    model: nn.Module
    peft_config: PeftConfig
    rates: Rates


BUDGET_BATCHES = 4  # a budget is spent where these have their gradients


def budgeted(model: nn.Module, task: Task | None, heads: Sequence[str], budget: int | str, **options: Any) -> Any:
    """The config that makes the most of ``budget`` bytes beside the ``heads``, by the gradients of the first batches, or without a
    task by the places of matrices."""
    from smidgen.adapters.budget import allocate

    if heads:
        options["modules_to_save"] = list(heads)  # their names are in the config's bytes
    looked = None if task is None else (task.loss, [task.batch(index) for index in range(BUDGET_BATCHES)])
    return allocate(model, budget, looked, **options)


def fit(
    name: str,
    model: nn.Module,
    task: Task,
    peft_config: Any,
    rates: Rates,
    loop: LoopConfig,
    folder: Path,
    *,
    heads: Sequence[str] = (),
    beside: Mapping[str, Beside] | None = None,
    weight_decay: float = 0.0,
    identity: Mapping[str, Any] | None = None,
    resume: str | None = None,
    progress: bool = True,
    during: AbstractContextManager[Any] | None = None,
    start: Path | None = None,
) -> Fitted:
    """Adapt ``model`` in place by ``peft_config``, train the adapter on ``task`` and save it in ``folder``.

    ``peft_config`` is smidgen's, peft's or one of ``engine``'s controls; the modules ``heads`` are trained and saved
    besides. Components ``beside`` the model, by their names in its pipeline, are adapted, trained and saved with it, each in
    a sub-folder of its name. What the adapter starts from depends on ``loop.seed`` alone. ``identity`` is what a checkpoint
    must share to be resumed. With ``start`` the adapter in that folder is trained on, in place of a fresh one. ``during`` is
    entered while it is trained, not while it is made and saved. Under ``accelerate launch`` the main process alone saves. Raises
    what ``train`` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(loop.seed, "init"))
        for where, part, config in _parts(model, peft_config, beside or {}):
            if start is None:
                engine.adapt(part, config, heads if not where else ())
            else:
                engine.go_on(part, start / where)
    denoiser = model
    if beside:
        model = Components(denoiser, {name: other.model for name, other in beside.items()})
    engine.hold_statistics(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained numbers stay fp32 whatever the base's precision
            parameter.data = parameter.data.float()
    head = engine.head_parameters(denoiser, heads)
    head_numbers = sum(parameter.numel() for parameter in head)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad) - head_numbers
    groups = engine.groups(denoiser, rates, weight_decay, heads)
    for name, other in (beside or {}).items():
        own = engine.groups(other.model, other.rates, weight_decay)
        groups += [{**group, "name": f"{name} {group['name']}"} for group in own]
    with during or nullcontext():
        result = train(task, model, groups, loop, folder, resume=resume, identity=identity, progress=progress)
    engine.as_in_file(model)
    made = (getattr(denoiser, "peft_config", None) or {}).get(engine.NAME)
    covers = coverage(denoiser, engine.NAME) if isinstance(peft_config, PeftConfig) else None
    size = engine.save(model, peft_config, folder, heads) if is_main() else 0
    return Fitted(
        name,
        folder,
        numbers,
        size,
        result.seconds,
        result.losses,
        result.evaluations,
        result.best_step,
        head_numbers,
        coverage=covers,
        head_bytes=head_numbers * (2 if getattr(made, "store_dtype", None) in packing.CODES else 4),
    )


def _parts(model: nn.Module, config: Any, beside: Mapping[str, Beside]) -> list[tuple[str, nn.Module, Any]]:
    """(sub-folder of an adapter's folder, module, config) of each component to train."""
    return [("", model, config), *((name, other.model, other.peft_config) for name, other in beside.items())]


def prove(
    model: Any, folder: Path, output: Callable[[], torch.Tensor], what: str = "the UNet's answer"
) -> tuple[str, ...]:
    """Load the saved adapter into a fresh ``model`` (a module or a pipeline) and prove that it is on; returns sentences for the report.

    ``output`` computes something that depends on the adapter. Raises AdapterFileError when verification fails or the
    output is that of the base.
    """
    with torch.no_grad():
        plain = output()
    engine.load(model, folder)
    ok, reasons = engine.verify(model, folder, output)
    if not ok:
        raise AdapterFileError(f"The adapter saved in {folder} does not verify on a fresh base: {'; '.join(reasons)}")
    with torch.no_grad():
        adapted = output()
    change = float((adapted - plain).norm() / plain.norm())
    if not change > 0:
        raise AdapterFileError(
            f"The adapter saved in {folder} changes nothing: its output equals the base's bit for bit."
        )
    return (f"Loaded again into a fresh base and verified; it changes {what} by {change:.1%}.",)
