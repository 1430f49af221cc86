"""The settings of a fine-tuning: frozen configs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smidgen.adapters.budget import parse_bytes
from smidgen.adapters.methods import Kind, Rates, learning_rates
from smidgen.adapters.outputs import OUTPUTS
from smidgen.errors import ConfigError, did_you_mean
from smidgen.training.frozen import Matmuls
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check

PROBE, FULL = "linear_probe", "full"


@dataclass(frozen=True)
class Adapter:
    """What is trained. None leaves a choice to the method's own defaults."""

    method: str = "svfit"  # one of `smidgen methods`, rotation+low_rank, peft:lora, linear_probe, or full
    transform: str | None = None  # replaces the method's
    residual: str | None = None  # replaces the method's
    output: str | None = (
        None  # output transform behind them, or in place of the method's: scale, magnitude, output_rotation
    )
    rank: int | str | None = None  # of the residual: a number, full, or energy:0.99 (svfit)
    alpha: float | None = None  # strength of the residual at 1.0, where the method has one
    transform_rank: int | None = None  # ring rank of tlora's transform
    target_modules: tuple[str, ...] | None = None  # endings of names, or all-linear; None: attention
    store_dtype: Literal["float32", "float16", "int8", "int4"] | None = None  # numbers in the file; None: the method's
    budget: str | None = None  # bytes of the adapter's folder without a head, such as 20kB; decides ranks and targets
    learning_rate: float | None = None  # None: the method's own for the family of models
    transform_learning_rate: float | None = None  # None: in the method's proportion to the residual's
    head_learning_rate: float = 2e-3  # of a classifier's head
    weight_decay: float = 0.0  # pulls towards the base

    def __post_init__(self) -> None:
        if self.budget is not None:
            parse_bytes(self.budget)  # raises where it is no number of bytes
        check_output(self.output)


def check_output(output: str | None) -> None:
    """Refuse what is no output transform; a folder, which other tools' flag of this name takes, is told where it goes.

    Raises:
        ConfigError: with the nearest names.
    """
    if output is not None and output not in OUTPUTS:
        raise ConfigError(
            f"output {output!r} is no output transform.{did_you_mean(output, OUTPUTS)} Known: {', '.join(OUTPUTS)}. The folder "
            "that everything is written to is out (--out)."
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """What the three recipes share; each has its own ``data``."""

    data: Any = None
    adapter: Adapter = field(default_factory=Adapter)
    train: LoopConfig = field(default_factory=LoopConfig)
    model: str = "minilm"  # packaged name, transformers folder, or hub name
    dropout: float | None = None  # None: the model's own
    head: Literal["fresh", "probe", "auto"] = (
        "fresh"  # start of a classifier's head: as it is, a regression on the frozen features, the better on validation
    )
    frozen_matmuls: Matmuls = "base"  # bf16: matrices that are not trained multiply in it where the processor does
    cache_mb: int = 1024  # memory for hidden states below the lowest trained layer; 0: they are computed each time
    num_train_epochs: int | None = None  # passes over the examples, in place of max_train_steps
    from_adapter: Path | None = (
        None  # go on from the adapter in this folder: new data, more steps, other learning rates
    )
    out: Path = Path("runs/finetune")  # where everything goes
    resume_from_checkpoint: str | None = None  # latest, or checkpoint-<step>
    overwrite: bool = False  # start again where an earlier run left checkpoints
    gradient_checkpointing: bool = False  # less memory, slower steps
    push_to_hub: str | None = None  # repository to upload to, such as me/my-adapter; needs a login
    hub_private: bool = True  # whether a new repository is private

    def __post_init__(self) -> None:
        check(self)


def rates(adapter: Adapter, family: Kind) -> Rates:
    """The learning rates of this run: the flags where given, else the method's own."""
    head = adapter.head_learning_rate
    if adapter.method == PROBE:
        return Rates(head, head, head)
    usual = learning_rates(adapter.method, family, adapter.transform, adapter.residual, adapter.output)
    return usual.chosen(adapter.learning_rate, adapter.transform_learning_rate, head)


def setup(adapter: Adapter, targets: Any, seed: int) -> Any:
    """The config that ``engine`` adapts by: smidgen's, peft's, or one of the two controls."""
    import smidgen
    from smidgen.training import engine

    own = ("store_dtype", "transform", "residual", "output")
    given = [name for name in own if getattr(adapter, name) is not None]
    if given and (adapter.method in (PROBE, FULL) or adapter.method.startswith("peft:")):
        raise ConfigError(f"{given[0]} is for smidgen's own methods, {adapter.method} has none; leave it out.")
    if adapter.method == PROBE:
        return engine.LinearProbe()
    if adapter.method == FULL:
        return engine.FullFineTuning()
    if adapter.method.startswith("peft:"):
        return engine.peft_config(adapter.method.removeprefix("peft:"), adapter.rank, adapter.alpha, targets)
    named = {"r": adapter.rank, "alpha": adapter.alpha, "transform": adapter.transform, "residual": adapter.residual}
    named |= {"transform_rank": adapter.transform_rank, "store_dtype": adapter.store_dtype, "output": adapter.output}
    options = {name: value for name, value in named.items() if value is not None}
    return smidgen.config(adapter.method, target_modules=targets, seed=seed, **options)
