"""Who says whether an adapter is good: a judge scores drawn pictures for the subject's identity and for the caption.

For the embedded base a judge ships with the package: small classifiers trained on real drawings. For any other base
pass your own object with these two methods to ``smidgen.tasks.personalize.recipe.personalize(config,
judge=...)``.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from smidgen.bases.stable_diffusion import EMBEDDED, Base
from smidgen.training.randomness import derive

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from PIL.Image import Image


class Judge(Protocol):
    """Scores pictures; a score is 1 at best, about 0 for pictures that have nothing to do with what was asked."""

    name: str

    def prompts(self, count: int, seed: int) -> list[str]:
        """``count`` scenes to draw, as captions that say nothing of the subject."""

    def scores(
        self, images: "Sequence[Image]", prompts: Sequence[str], references: "Sequence[Image]"
    ) -> dict[str, float]:
        """``identity``: are these the person of ``references``? ``caption``: do they show what their prompt says?"""


class EmbeddedJudge:
    """The embedded base's own judge; its classifiers' accuracy on real drawings stands in the base's model card."""

    name = "the embedded base's attribute classifiers"

    def __init__(self) -> None:
        from smidgen.bases.embedded import judge, world

        self._world, self._judge = world, judge.load_judge()
        self._scenes: dict[str, Any] = {}

    def prompts(self, count: int, seed: int) -> list[str]:
        import numpy

        rng = numpy.random.default_rng(derive(seed, "scenes"))
        while len(found := list(self._scenes)) < count:
            scene = self._world.sample_scene(rng)
            self._scenes[self._world.caption(scene)] = scene
        return found[:count]

    def scores(
        self, images: "Sequence[Image]", prompts: Sequence[str], references: "Sequence[Image]"
    ) -> dict[str, float]:
        """Besides identity and caption: the share of pictures in which each attribute reads as it should."""
        caption = self._judge.caption_score(list(images), [self._scenes[prompt] for prompt in prompts])
        read, wanted = self._judge.read(list(images)), self._judge.read(list(references))
        usual = {name: Counter(wanted[name]).most_common(1)[0][0] for name in self._world.IDENTITY_ATTRIBUTES}
        traits = {name: sum(word == usual[name] for word in read[name]) / len(images) for name in usual}
        scores = {"identity": float(self._judge.identity_score(list(images), list(references)).mean())}
        scores |= {"caption": float(caption.pop("mean")), "traits": sum(traits.values()) / len(traits)}
        return scores | traits | caption


def judge_for(base: Base) -> Judge | None:
    """The judge that belongs to ``base``, or None when nobody has trained one."""
    if base.name != EMBEDDED:
        return None
    try:
        return EmbeddedJudge()
    except OSError as error:
        logger.warning("The embedded base's judge cannot be read, so nothing will be scored: %s", error)
        return None


NO_JUDGE = (
    "No judge is known for this base, so identity and captions were not scored: look at contact_sheet.png. To score "
    "them, call smidgen.tasks.personalize.recipe.personalize(config, judge=...) with an object that has the "
    "methods of smidgen.bases.judging.Judge."
)
