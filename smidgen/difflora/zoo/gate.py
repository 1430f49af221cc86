"""The quality gate: is an adapter the person it was trained on, and more so than the base model is?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smidgen.adapters.tuner.bank import Bank
from smidgen.bases.judging import Judge
from smidgen.bases.stable_diffusion import Base, Prompts, decode, draw_latents, encode_prompts
from smidgen.difflora.zoo.settings import Gate
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


class Drawer:
    """Draws the same scenes with each adapter of a bank and with the base, from the same noise.

    Args:
        gate: how many of the judge's scenes, and how they are sampled.
        seed: of the scenes and of the noise.
        others: further prompts, drawn after the scenes and not judged.
    """

    def __init__(self, base: Base, judge: Judge, gate: Gate, seed: int, others: Sequence[str] = ()) -> None:
        self.base, self.judge, self.gate, self.seed = base, judge, gate, seed
        self.texts = judge.prompts(gate.judged_pictures, seed)
        self.prompts: Prompts = encode_prompts(base, [*self.texts, *others])
        self.negative: Prompts = encode_prompts(base, [""])
        self._base_pictures: list[Image] | None = None

    def identities(
        self, bank: Bank, names: Sequence[str], references: Sequence[Sequence[Image]]
    ) -> list[tuple[float, float]]:
        """(score with the adapter, score of the base) for each name; ``references`` are the people's own pictures."""
        drawn = self.draw(bank.rows(names), len(names))
        return [
            (self.scores(pictures, own)["identity"], self.scores(self.base_pictures(), own)["identity"])
            for pictures, own in zip(drawn, references, strict=True)
        ]

    def base_pictures(self) -> list[Image]:
        """What the base draws; drawn once."""
        if self._base_pictures is None:
            self._base_pictures = self.draw(nullcontext(), 1)[0]
        return self._base_pictures

    def draw(self, adapters: AbstractContextManager[Any], count: int) -> list[list[Image]]:
        """Pictures [adapter][prompt] within ``adapters``: ``rows`` or ``holding`` of a bank, ``count`` of them. Each
        prompt is drawn for all at once."""
        columns = []
        with adapters:
            for number in range(len(self.prompts)):
                same = self.prompts[[number] * count]
                seeds = [derive(self.seed, "gate", number)] * count
                steps, guidance = self.gate.inference_steps, self.gate.guidance_scale
                options: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch": count}
                latents = draw_latents(self.base, same, seeds, negative=self.negative, **options)
                columns.append(decode(self.base, latents, batch=16))
        return [list(pictures) for pictures in zip(*columns, strict=True)]

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
