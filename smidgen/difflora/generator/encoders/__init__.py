"""Picture encoders by name: what a generator sees of a photo. All are frozen.

embedded-face, embedded-scene    small networks for the embedded base
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from smidgen.difflora.generator.encoders.embedded import EmbeddedFace, EmbeddedScene
from smidgen.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureEncoder(Protocol):
    """Pictures -> features."""

    name: str
    width: int

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Features [n, width] in fp32 on the CPU; a row of NaN where the picture does not show what the encoder is made
        for (no face)."""
        ...


KINDS = {"embedded-face": EmbeddedFace, "embedded-scene": EmbeddedScene}


def load(name: str) -> PictureEncoder:
    """The encoder called ``name``; ConfigError with the nearest names otherwise."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise ConfigError(
            f"There is no picture encoder {name!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}."
        )
    return KINDS[kind](rest)
