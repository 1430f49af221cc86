"""A judge's scenes as an audit draws them: with any weight vectors of one layout, each once."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from smidgen.bases.judging import Judge
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.weightspace.layout import Layout, write_adapter
from smidgen.difflora.zoo.gate import ScoredScenes
from smidgen.difflora.zoo.records import row_digest
from smidgen.difflora.zoo.settings import Gate
from smidgen.errors import ConfigError
from smidgen.lab.audit.settings import Drawing
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

Drawn = list[list["Image"]]  # [adapter][prompt]: the judge's scenes, then the unrelated prompts


class AuditScenes(ScoredScenes):
    """The scenes of an audit on the base of that name, for adapters of ``layout``.

    Raises:
        BaseLockError: the base of that name is not the layout's.
        ConfigError: there is no judge for it.
    """

    def __init__(self, base: str, layout: Layout, judge: Judge | None, drawing: Drawing, seed: int) -> None:
        pipeline = AdaptedPipeline.load(base, layout)
        found = judge or pipeline.base.judge()
        if found is None:
            raise ConfigError(
                f"Nobody is known who can judge pictures of {base!r}. Call smidgen.lab.audit.evaluate.evaluate with a "
                "judge: an object with the methods of smidgen.bases.judging.Judge."
            )
        gate = Gate(drawing.scenes, drawing.inference_steps, drawing.guidance_scale)
        super().__init__(pipeline, found, gate, scenes_seed(seed), drawing.unrelated)
        self.batch, self.bytes = drawing.batch, adapter_bytes(layout, pipeline.model)
        self._last: dict[str, list[Image]] = {}

    def draw(self, rows: Tensor) -> Drawn:
        """Pictures with each of ``rows`` [n, numbers]; rows that are equal, or were drawn last time, are not drawn again."""
        rows = rows.detach().float().cpu().contiguous()
        names = [row_digest(row) for row in rows]
        known = {name: self._last[name] for name in names if name in self._last}
        fresh = {name: place for place, name in enumerate(names) if name not in known}
        if fresh:
            drawn = self.pipeline.draw(rows[list(fresh.values())], self.scenes, batch=self.batch)
            known |= dict(zip(fresh, drawn, strict=True))
        self._last = known
        return [known[name] for name in names]

    def split(self, pictures: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Pictures of the scenes, and of the unrelated prompts."""
        scenes = len(self.texts)
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
