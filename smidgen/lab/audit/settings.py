"""The settings of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from smidgen.errors import ConfigError
from smidgen.training.ranges import check


@dataclass(frozen=True)
class Drawing:
    """What is drawn with every adapter, always from the same noise."""

    scenes: int = 4  # judged pictures of each adapter
    inference_steps: int = 10  # denoising steps of a picture
    guidance_scale: float = 3.0  # classifier-free guidance
    unrelated: tuple[str, ...] = ("",)  # prompts that name no person: how far do they move?
    batch: int = 16  # pictures drawn at once

    def __post_init__(self) -> None:
        for name in ("scenes", "inference_steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class EvaluateConfig:
    """One audit. All but ``out`` decides the figures."""

    generator: tuple[
        Path, ...
    ] = ()  # folders of generators, the one that the rest is compared with first; none: the shipped
    people: int = 64  # held-out people, from the first on
    photos: int = 1  # of each that contenders see; they are scored on the others
    seeds: int = 2  # adapters of each person where chance has a part
    noise: float = 1.0  # around the nearest identity, in deviations of the training rows
    refine: int = 0  # steps of refinement on the photos, as a further row; 0: none
    personalize: bool = False  # also train personalize's default on the photos
    personalize_photos: int = 0  # and, as another row, on so many photos; 0: no such row
    personalize_steps: int | None = None  # optimizer steps of both; None: personalize's own
    drawing: Drawing = field(default_factory=Drawing)
    seed: int = 0  # of scenes, noise and chance
    out: Path = Path("evaluation")  # where everything goes

    def __post_init__(self) -> None:
        for name, least in {"people": 1, "photos": 1, "seeds": 1, "refine": 0, "personalize_photos": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        check(self)
        if self.noise < 0:
            raise ConfigError(f"noise is a factor from 0 on, not {self.noise}.")


PRESETS = {
    "default": EvaluateConfig(),
    "debug": EvaluateConfig(people=2, drawing=Drawing(scenes=1, inference_steps=2), personalize_steps=2),
}
