"""The quality gate: is an adapter the person it was trained on, and more so than the base model is?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smidgen.adapters.tuner.bank import Bank
from smidgen.difflora.zoo.settings import Gate
from smidgen.training.judging import Judge
from smidgen.training.pipelines import Base, Prompts, decode, draw_latents, encode_prompts
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
    """Draws the same scenes with each adapter of a bank and with the base, from the same noise."""

    def __init__(self, base: Base, judge: Judge, gate: Gate, seed: int) -> None:
        self.base, self.judge, self.gate, self.seed = base, judge, gate, seed
        self.texts = judge.prompts(gate.judged_pictures, seed)
        self.prompts: Prompts = encode_prompts(base, self.texts)
        self.negative: Prompts = encode_prompts(base, [""])
        self._base_pictures: list[Image] | None = None

    def identities(
        self, bank: Bank, names: Sequence[str], references: Sequence[Sequence[Image]]
    ) -> list[tuple[float, float]]:
        """(score with the adapter, score of the base) for each name; ``references`` are the people's own pictures."""
        if self._base_pictures is None:
            self._base_pictures = self._draw(None, [None])[0]
        drawn = self._draw(bank, list(names))
        return [
            (self._score(pictures, own), self._score(self._base_pictures, own))
            for pictures, own in zip(drawn, references, strict=True)
        ]

    def _draw(self, bank: Bank | None, names: list[Any]) -> list[list[Image]]:
        """The pictures of each name; each scene is drawn for all names at once."""
        columns = []
        for number in range(self.gate.judged_pictures):
            same = self.prompts[[number] * len(names)]
            seeds = [derive(self.seed, "gate", number)] * len(names)
            options: dict[str, Any] = {
                "steps": self.gate.inference_steps,
                "guidance": self.gate.guidance_scale,
                "batch": len(names),
            }
            if bank is None:
                latents = draw_latents(self.base, same, seeds, negative=self.negative, **options)
            else:
                with bank.rows(names):
                    latents = draw_latents(self.base, same, seeds, negative=self.negative, **options)
            columns.append(decode(self.base, latents, batch=16))
        return [list(pictures) for pictures in zip(*columns, strict=True)]

    def _score(self, pictures: Sequence[Image], own: Sequence[Image]) -> float:
        return float(self.judge.scores(list(pictures), self.texts, list(own))["identity"])


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
