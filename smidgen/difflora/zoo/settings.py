"""The settings of a zoo: frozen sections, presets, and the defaults that make its weights predictable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import smidgen
from smidgen.adapters.methods import Rates
from smidgen.bases.families import EMBEDDED
from smidgen.errors import ConfigError
from smidgen.tasks.personalize.settings import Adapter, PersonalizeConfig
from smidgen.tasks.personalize.settings import rates as personal_rates
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check


@dataclass(frozen=True)
class Subjects:
    """Whose adapters: invented people of the embedded world, or a folder with one folder of pictures a person."""

    folder: Path | None = None  # None: invented people
    people: int = 1000  # invented people to train on
    held_out: int = 100  # and invented people kept for tests, whom neither base nor judge has seen
    pictures: int = 8  # of each invented person
    same_scenes: bool = True  # everybody in the same scenes, so that adapters differ by the person alone
    held_out_share: float = 0.1  # of a folder's people, chosen by a hash of the name
    instance_prompt: str | None = None  # caption of a folder's pictures that have none
    consent: str = "not stated"  # why a folder's people may be in the zoo; kept with each of them
    licence: str = "not stated"  # of a folder's pictures
    people_seed: int = 0  # who is invented, and in which scenes

    def __post_init__(self) -> None:
        if self.people < 1 or self.held_out < 0 or self.pictures < 1:
            raise ConfigError(
                f"people={self.people}, held_out={self.held_out}, pictures={self.pictures}: at least one person with one "
                "picture is needed."
            )
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share is a share of people below 1, not {self.held_out_share}.")


@dataclass(frozen=True)
class Group:
    """How many adapters are trained at once, and what they share."""

    group_size: int = 32  # adapters in a group; part of the zoo: the rounding of a batch depends on its size
    train_batch_size: int = 1  # pictures of each person in a step
    common_noise: bool = True  # the same timesteps, noise and picture order for everybody
    shared_start: bool = True  # the same start values for everybody
    keep_last: int = 1  # checkpoints of each adapter that go into the zoo
    keep_every: int = 10  # steps between them

    def __post_init__(self) -> None:
        least = ("group_size", "train_batch_size", "keep_last", "keep_every")
        for name in least:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Gate:
    """When an adapter is good enough. Without a judge for the base only the losses decide."""

    judged_pictures: int = 2  # drawn with each adapter and scored; 0: do not score
    inference_steps: int = 10  # denoising steps of a picture
    guidance_scale: float = 3.0  # classifier-free guidance
    margin: float = 0.1  # identity score above that of the base model's own pictures

    def __post_init__(self) -> None:
        if self.judged_pictures < 0 or self.inference_steps < 1:
            raise ConfigError(
                f"judged_pictures={self.judged_pictures} and inference_steps={self.inference_steps}: pictures from 0, steps "
                "from 1."
            )


@dataclass(frozen=True)
class ZooConfig:
    """One zoo. All but ``out`` and ``gradient_checkpointing`` is kept in ``zoo.json``, and a zoo is only gone on with by the
    same settings."""

    subjects: Subjects = field(default_factory=Subjects)
    adapter: Adapter = field(default_factory=lambda: Adapter(method="lora", rank=1))
    train: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_train_steps=150, lr_warmup_steps=5, checkpointing_steps=1000)
    )
    group: Group = field(default_factory=Group)
    gate: Gate = field(default_factory=Gate)
    gradient_checkpointing: bool = False  # less memory, slower steps, the same numbers
    base: str = EMBEDDED  # embedded, the folder of a Stable Diffusion or SDXL pipeline, or its hub name
    out: Path = Path("zoo")  # where everything goes

    def __post_init__(self) -> None:
        check(self)


PRESETS = {
    "default": ZooConfig(),
    "debug": ZooConfig(
        subjects=Subjects(people=6, held_out=2, pictures=2),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2),
        group=Group(group_size=4),
        gate=Gate(judged_pictures=1, inference_steps=2),
    ),
}


def rates(config: ZooConfig) -> Rates:
    """Learning rates of the zoo's method: ``personalize``'s own for this base unless set."""
    return personal_rates(PersonalizeConfig(adapter=config.adapter, base=config.base), config.adapter.method)


def adapter_config(config: ZooConfig) -> smidgen.SmidgenConfig:
    """The config of every adapter of the zoo; without targets those are the base's own."""
    chosen = config.adapter
    named = {"r": chosen.rank, "alpha": chosen.alpha, "output": chosen.output}
    named |= {"transform_rank": chosen.transform_rank, "residual_rank": chosen.residual_rank}
    given = {name: value for name, value in named.items() if value is not None}
    targets = None if chosen.target_modules is None else list(chosen.target_modules)
    return smidgen.config(chosen.method, target_modules=targets, seed=config.train.seed, **given)
