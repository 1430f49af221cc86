"""What a base cannot do with a user's pictures and words, said before anything is trained or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smidgen.adapters.checkpoint.files import public_name
from smidgen.bases.protocol import ImageBase
from smidgen.tasks.data.images import Picture
from smidgen.tasks.data.tables import counted

if TYPE_CHECKING:
    from PIL.Image import Image

UNSCORED = (
    "Nothing was scored: the judge of {} reads portraits drawn in its own style alone, and none of these pictures is one. "
    "Look at contact_sheet.png."
)
OBLONG = "Nothing was scored: the judge reads squares, and preview_size asks for none. Look at contact_sheet.png."
ALIKE = 0.1  # of a prompt's encoding: rare words of the embedded base differ by .01 to .04, words that it knows by .5 and more
OWN_PROMPTS = "Captions were not scored: the judge knows what its own scenes should show, not what these prompts say."


def foreign_pictures(
    base: ImageBase, pictures: Sequence[Picture], images: Sequence[Image]
) -> tuple[list[bool], list[str]]:
    """Which pictures are of no kind that ``base`` draws, and a warning of them with their true sizes."""
    foreign = base.foreign(images)
    names = [
        f"{picture.path.name} ({picture.size[0]} x {picture.size[1]} pixels)"
        for picture, strange in zip(pictures, foreign, strict=True)
        if strange
    ]
    if not names:
        return foreign, []
    why = (
        f"without a face as {public_name(base.name)} draws them: that base was taught invented people in one drawn style, "
        f"{base.resolution} x {base.resolution} pixels, and learns little from photographs; for those give a Stable Diffusion "
        "or SDXL model with --base"
    )
    return foreign, [counted("picture", names, why)]


def unknown_words(base: ImageBase, prompts: Sequence[str]) -> list[str]:
    """A warning of words in ``prompts`` that mean nothing to ``base``."""
    words = base.unknown_words(prompts)
    why = f"that {public_name(base.name)} has never seen and reads as meaningless pieces"
    return [counted("word", map(repr, words), why)] if words else []


def words_alike(base: ImageBase, phrases: Sequence[str]) -> list[str]:
    """A warning of ``phrases``, one for each subject, that ``base`` encodes so nearly alike that it will hardly learn to tell their
    subjects apart."""
    if len(phrases) < 2:
        return []
    tensors = base.encode_prompts(phrases).tensors.values()
    rows = [value.flatten(1).float() for value in tensors if value.is_floating_point()]
    found = []
    for number, phrase in enumerate(phrases):
        for before, other in enumerate(phrases[:number]):
            apart = [float((row[number] - row[before]).norm() / row[before].norm().clamp(min=1e-9)) for row in rows]
            if apart and max(apart) < ALIKE:
                found.append(f"{other!r} and {phrase!r}")
    why = f"that {public_name(base.name)} encodes nearly alike, so that their subjects will be mixed; take words that it knows"
    return [counted("word pair", found, why)] if found else []
