"""The settings of a control training: frozen configs and presets."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from smidgen.adapters.methods import Rates, learning_rates
from smidgen.bases.families import EMBEDDED, learning_kind
from smidgen.tasks.control import hint
from smidgen.tasks.control.conditions import Control
from smidgen.tasks.finetune import settings as finetune
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the papers': all attentions of the UNet


@dataclass(frozen=True)
class Data:
    """Pictures, their control pictures and what is said about them."""

    folder: Path | None = None
    control: Control = "canny"  # what the control pictures show; canny can be drawn from the pictures themselves
    instance_prompt: str | None = None  # caption of pictures that have none
    num_held_out: int = 16  # the last pictures, kept from training to draw and score at the end
    caption_dropout: float = 0.0  # share of the captions that train the empty prompt
    resolution: int | None = None  # None: the base's own
    train_batch_size: int = 8


@dataclass(frozen=True)
class Adapter(finetune.Adapter):
    """What is trained; head_learning_rate is the hint encoder's."""

    method: str = "tlora*(2,4)"  # one of `smidgen methods`, tlora(2,6) and the like, peft:lora, or linear_probe (hint)
    target_modules: tuple[str, ...] | None = None  # endings of the UNet's module names; None: all attentions
    head_learning_rate: float = 5e-3
    hint_width: int = 64  # channels inside the hint encoder
    cubic_timesteps: bool = True  # denser at high noise, where the layout is decided


@dataclass(frozen=True)
class Show:
    """What is drawn and scored at the end."""

    inference_steps: int | None = None  # None: as the base's kind needs
    guidance_scale: float | None = None  # None: as the base's kind needs
    num_columns: int = 8  # pictures on the contact sheet


@dataclass(frozen=True)
class ControlConfig:
    """One control training."""

    data: Data = field(default_factory=Data)
    adapter: Adapter = field(default_factory=Adapter)
    train: LoopConfig = field(default_factory=lambda: LoopConfig(max_train_steps=1000, lr_warmup_steps=20))
    show: Show = field(default_factory=Show)
    base: str = (
        EMBEDDED  # embedded, the folder of a Stable Diffusion or SDXL pipeline, its hub name, or one .safetensors file
    )
    base_config: str | None = None  # of a base in one file: folder or hub name of a pipeline of the same model
    from_adapter: Path | None = (
        None  # go on from the adapter in this folder, with its hint encoder: new pairs, more steps, other learning rates
    )
    out: Path = Path("runs/control")  # where everything goes
    resume_from_checkpoint: str | None = None  # latest, or checkpoint-<step>
    overwrite: bool = False  # start again where an earlier run left checkpoints
    gradient_checkpointing: bool = False  # less memory, slower steps

    def __post_init__(self) -> None:
        check(self)

    def as_in(self, folder: Path) -> "ControlConfig":
        """With the control and the hint encoder's width of the adapter in ``folder``."""
        if (made := hint.read_config(folder)) is None:
            return self
        data = replace(self.data, control=cast(Control, made.control))
        adapter = replace(self.adapter, hint_width=made.width)
        return replace(self, data=data, adapter=adapter)


PUBLISHED = ("tlora(1,2)", "tlora*(1,1)", "tlora*(2,4)", "tlora(2,6)")
PRESETS = {
    "default": ControlConfig(),
    "debug": ControlConfig(
        data=Data(num_held_out=2, train_batch_size=2),
        train=LoopConfig(max_train_steps=2, lr_warmup_steps=1, checkpointing_steps=1),
        show=Show(inference_steps=2),
    ),
    **{name: ControlConfig(adapter=Adapter(method=name)) for name in PUBLISHED},
}


def rates(config: ControlConfig) -> Rates:
    """The learning rates of this run: the flags where given, else the method's own."""
    chosen, head = config.adapter, config.adapter.head_learning_rate
    if chosen.method == finetune.PROBE:
        return Rates(head, head, head)
    members = (chosen.transform, chosen.residual, chosen.output)
    usual = learning_rates(chosen.method, learning_kind(config.base, "control"), *members)
    return usual.chosen(chosen.learning_rate, chosen.transform_learning_rate, head)
