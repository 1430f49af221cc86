"""The quality gate: is an adapter the person it was trained on, and more so than the base model is?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen.bases.judging import Judge
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.zoo.settings import Gate
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Verdict:
    """State of an adapter with the figures behind it; see ``store.Record``."""

    state: str
    reason: str
    loss: float
    base_loss: float
    identity: float | None
    base_identity: float | None


class ScoredScenes:
    """A judge's scenes: drawn with adapters and with the base from the same noise, and scored.

    Args:
        gate: how many of the judge's scenes, and how they are sampled.
        seed: of the scenes and of the noise.
        others: further prompts, drawn after the scenes and not judged.
    """

    def __init__(
        self, pipeline: AdaptedPipeline, judge: Judge, gate: Gate, seed: int, others: Sequence[str] = ()
    ) -> None:
        self.pipeline, self.judge = pipeline, judge
        self.texts = judge.prompts(gate.judged_pictures, seed)
        prompts = (*self.texts, *others)
        seeds = tuple(derive(seed, "gate", number) for number in range(len(prompts)))
        self.scenes = Scenes(prompts, seeds, gate.inference_steps, gate.guidance_scale)

    def identities(self, rows: Tensor, references: Sequence[Sequence[Image]]) -> list[tuple[float, float]]:
        """(score with the adapter, score of the base) for each of ``rows`` [n, size]; ``references`` are the people's own
        pictures."""
        return [
            (self.scores(pictures, own)["identity"], self.scores(self.base_pictures, own)["identity"])
            for pictures, own in zip(self.pipeline.draw(rows, self.scenes, batch=16), references, strict=True)
        ]

    @cached_property
    def base_pictures(self) -> list[Image]:
        """What the base draws."""
        nothing = torch.empty(0, self.pipeline.layout.size)
        return self.pipeline.draw(nothing, self.scenes, with_base=True, batch=16)[0]

    def scores(self, pictures: Sequence[Image], own: Sequence[Image]) -> dict[str, float]:
        """All that the judge says of one adapter's pictures of the scenes, beside the person's ``own``."""
        return self.judge.scores(list(pictures[: len(self.texts)]), self.texts, list(own))


def decide(gate: Gate, loss: float, base_loss: float, scores: tuple[float, float] | None) -> Verdict:
    """Kept, or rejected with the reason."""
    identity, base_identity = scores or (None, None)
    reason = ""
    if not math.isfinite(loss):
        reason = "diverged: its loss is not finite"
    elif loss >= base_loss:
        reason = f"its loss on the person's own pictures, {loss:.4f}, is not below the base's {base_loss:.4f}"
    elif scores is not None and not scores[0] - scores[1] >= gate.margin:
        reason = (
            f"its identity score {scores[0]:.3f} is not {gate.margin:g} above the base's {scores[1]:.3f} on the person's "
            "own pictures"
        )
    return Verdict("rejected" if reason else "kept", reason, loss, base_loss, identity, base_identity)
