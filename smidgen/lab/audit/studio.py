"""A base that carries adapters of one layout: draws the same scenes with any rows of them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.tuner.bank import Bank
from smidgen.bases.judging import Judge, judge_for
from smidgen.difflora.use.carrier import Carrier
from smidgen.difflora.weightspace.layout import Layout, write_adapter
from smidgen.difflora.zoo.gate import Drawer
from smidgen.difflora.zoo.records import row_digest
from smidgen.difflora.zoo.settings import Gate
from smidgen.errors import ConfigError
from smidgen.lab.audit.settings import Drawing
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

Drawn = list[list["Image"]]  # [adapter][prompt]: the judge's scenes, then the unrelated prompts


class Studio:
    """Rows of ``layout`` on the base of that name, drawn by ``drawing``; refinement trains in it too.

    Raises:
        BaseLockError: the base of that name is not the layout's.
        ConfigError: there is no judge for it.
    """

    def __init__(self, base: str, layout: Layout, judge: Judge | None, drawing: Drawing, seed: int) -> None:
        carrier = Carrier(base, layout)
        self.layout, self.drawing = layout, drawing
        self.base, self.unet = carrier.base, carrier.unet
        self.bytes = adapter_bytes(layout, self.unet)
        found = judge or judge_for(self.base)
        if found is None:
            raise ConfigError(
                f"Nobody is known who can judge pictures of {base!r}. Call smidgen.lab.audit.evaluate.evaluate with a "
                "judge: an object with the methods of smidgen.bases.judging.Judge."
            )
        self.judge = found
        self.bank = Bank(self.unet, smidgen.SmidgenConfig(**layout.config), ["row"])
        self.bank.put("row", self.unet)  # frozen factors are shared with the carrier
        gate = Gate(drawing.scenes, drawing.inference_steps, drawing.guidance_scale)
        self._last: dict[str, list[Image]] = {}
        self.drawer = Drawer(self.base, self.judge, gate, scenes_seed(seed), drawing.unrelated)

    def draw(self, rows: Tensor) -> Drawn:
        """Pictures with each of ``rows`` [n, numbers]; rows that are equal, or were drawn last time, are not drawn again."""
        rows = rows.detach().float().cpu().contiguous()
        names = [row_digest(row) for row in rows]
        known = {name: self._last[name] for name in names if name in self._last}
        fresh = list({name: place for place, name in enumerate(names) if name not in known}.values())
        for at in range(0, len(fresh), self.drawing.batch):
            places = fresh[at : at + self.drawing.batch]
            with torch.no_grad():
                drawn = self.drawer.draw(self.bank.holding(self.layout.unpack(rows[places])), len(places))
            known |= {names[place]: pictures for place, pictures in zip(places, drawn, strict=True)}
        self._last = known
        return [known[name] for name in names]

    def base_pictures(self) -> list[Image]:
        """What the base draws."""
        with torch.no_grad():
            return self.drawer.base_pictures()

    def scores(self, pictures: Sequence[Image], own: Sequence[Image]) -> dict[str, float]:
        """The judge's scores of one adapter's pictures."""
        return self.drawer.scores(pictures, own)

    def split(self, pictures: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Pictures of the scenes, and of the unrelated prompts."""
        scenes = len(self.drawer.texts)
        return list(pictures[:scenes]), list(pictures[scenes:])


def scenes_seed(seed: int) -> int:
    """Seed of the audit's scenes and noise: others than those in which a zoo of that seed was trained and gated."""
    return derive(seed, "audit")


def adapter_bytes(layout: Layout, unet: nn.Module) -> int:
    """What one adapter takes on the disk as a folder."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft wonders about a second adapter, which is meant
        write_adapter(layout, torch.zeros(layout.size), unet, folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def difference(first: Sequence[Image], second: Sequence[Image]) -> float | None:
    """Mean absolute difference of the pixels, as a share of their range; None without pictures."""
    if not first:
        return None
    left, right = (
        numpy.stack([numpy.asarray(image.convert("RGB"), float) for image in side]) for side in (first, second)
    )
    return float(numpy.abs(left - right).mean() / 255)
