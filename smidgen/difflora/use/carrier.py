"""A base that carries adapters of one family: rows of a layout are refined on it, and drawn with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.tuner.bank import Bank
from smidgen.bases.stable_diffusion import (
    EMBEDDED,
    Base,
    decode,
    default_device,
    draw_latents,
    encode_prompts,
    load_base,
)
from smidgen.difflora.weightspace.layout import Layout, check_model
from smidgen.errors import BaseLockError, ConfigError
from smidgen.tasks.diffusion.gallery import SAMPLING
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES = (  # of a base that is nobody's own world
    "a portrait of a person",
    "a photo of a person in the street, in the rain",
    "a person smiling, in front of a mountain lake",
    "an oil painting of a person",
    "a person with sunglasses, on a beach",
    "a black and white photo of a person reading a book",
)


@dataclass(frozen=True)
class Sheet:
    """The contact sheet: what is drawn with each adapter, from the same noise in a column."""

    sheet: bool = True  # draw one
    prompt: tuple[str, ...] = ()  # what to draw; none: scenes that suit the base
    num_prompts: int = 6  # of those scenes
    inference_steps: int | None = None  # denoising steps of a picture; None: as the base's kind needs
    guidance_scale: float | None = None  # away from the empty prompt; None: as the base's kind needs
    sheet_seed: int = 0  # of scenes and noise

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or (self.inference_steps is not None and self.inference_steps < 1):
            raise ConfigError(
                f"num_prompts={self.num_prompts}, inference_steps={self.inference_steps}: both start at 1; --no-sheet "
                "draws nothing."
            )


class Carries(Protocol):
    """A base whose ``unet`` carries an adapter of ``layout``; a zoo's ``Workshop`` is one."""

    base: Base
    unet: nn.Module
    layout: Layout


class Carrier:
    """The base called ``name`` under one frozen adapter of ``layout``.

    Raises:
        BaseLockError: the base is not the one that adapters of this layout sit on.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.layout = layout
        self.base = load_base(name, "no", default_device())
        self.unet: nn.Module = self.base.unet
        try:
            check_model(layout, self.unet)
        except BaseLockError as error:
            raise BaseLockError(f"The generator makes adapters for another base than {name!r}: {error}") from error
        smidgen.adapt(self.unet, smidgen.SmidgenConfig(**layout.config))
        self.unet.requires_grad_(False)

    def scenes(self, wanted: Sheet) -> list[str]:
        """What to draw."""
        if wanted.prompt:
            return list(wanted.prompt)
        if self.base.name != EMBEDDED:
            return list(SCENES[: wanted.num_prompts])
        import numpy

        from smidgen.bases.embedded import world

        rng = numpy.random.default_rng(derive(wanted.sheet_seed, "scenes"))
        return [world.caption(world.sample_scene(rng)) for _ in range(wanted.num_prompts)]

    def draw(
        self, rows: Tensor, wanted: Sheet, layout: Layout | None = None, with_base: bool = False, batch: int = 8
    ) -> list[list[Image]]:
        """Pictures [adapter][scene] of the adapters ``rows`` [n, numbers] of ``layout`` (None: the carrier's own), after
        those of the base alone if asked for; the same noise for all in a scene."""
        layout, texts = layout or self.layout, self.scenes(wanted)
        usual = SAMPLING[EMBEDDED if self.base.name == EMBEDDED else self.base.family]
        options: dict[str, Any] = {
            "negative": encode_prompts(self.base, [""]),
            "steps": wanted.inference_steps or usual[0],
        }
        options["guidance"] = usual[1] if wanted.guidance_scale is None else wanted.guidance_scale
        prompts, seeds = (
            encode_prompts(self.base, texts),
            [derive(wanted.sheet_seed, "sheet", k) for k in range(len(texts))],
        )
        owners: list[int | None] = [None] if with_base else []
        pairs = [(owner, scene) for owner in [*owners, *range(len(rows))] for scene in range(len(texts))]
        images: list[Image] = []
        with torch.no_grad(), banked(self, layout) as bank:
            tensors = layout.unpack(rows.to(self.base.device))
            for at in range(0, len(pairs), batch):
                own, scenes = zip(*pairs[at : at + batch], strict=True)
                with bank.holding(tensors, own):
                    latents = draw_latents(
                        self.base, prompts[list(scenes)], [seeds[k] for k in scenes], batch=batch, **options
                    )
                images += decode(self.base, latents)
        return [images[at : at + len(texts)] for at in range(0, len(images), len(texts))]


@contextmanager
def banked(carrier: Carries, layout: Layout) -> Iterator[Bank]:
    """Within, a bank on ``carrier`` for rows of ``layout``, which is the carrier's own or a wider one of low-rank
    factors; whatever bank it had is back afterwards."""
    before = {name: module.bank for name, module in carrier.unet.named_modules() if hasattr(module, "bank_held")}
    try:
        bank = Bank(carrier.unet, smidgen.SmidgenConfig(**layout.config), ["row"])
        if layout.config == carrier.layout.config:
            bank.put("row", carrier.unet, next(iter(carrier.unet.peft_config)))  # type: ignore[arg-type] # shares its factors
        for parameter in bank.parameters():
            parameter.requires_grad_(False)
        yield bank
    finally:
        for name, own in before.items():
            carrier.unet.get_submodule(name).bank = own
