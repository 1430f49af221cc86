"""Who says whether an adapter is good: a judge scores drawn pictures for the subject's identity and for the caption.

``base.judge()`` is the base's own: for the embedded base small classifiers trained on real drawings ship with the
package. For any other base pass your own object with these two methods to ``smidgen.tasks.personalize.recipe.personalize(config,
judge=...)``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

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


NO_JUDGE = (
    "No judge is known for this base, so identity and captions were not scored: look at contact_sheet.png. To score "
    "them, call smidgen.tasks.personalize.recipe.personalize(config, judge=...) with an object that has the "
    "methods of smidgen.bases.judging.Judge."
)
