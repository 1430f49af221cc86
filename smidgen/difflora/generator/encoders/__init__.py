"""Picture encoders by name: what a generator sees of a photo. All are frozen.

embedded-face, embedded-scene            small networks for the embedded base
wide-face, wide-scene                    one for the embedded wide base
arcface:FILE.onnx[,DETECTOR.onnx]        a face recognition model, with the detector that aligns faces for it
clip[:NAME], dinov2[:NAME]               of the transformers family: a folder, a packaged name, a hub name
vision:NAME                              any other model of pictures
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from smidgen.difflora.generator.encoders.arcface import ArcFace
from smidgen.difflora.generator.encoders.embedded import EmbeddedFace, EmbeddedScene, WideFace, WideScene
from smidgen.difflora.generator.encoders.vision import Clip, Dinov2, Vision
from smidgen.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureEncoder(Protocol):
    """Pictures -> features. ``name`` tells the very weights: caches and generators hold to it."""

    name: str
    width: int

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Features [n, width] in fp32 on the CPU; a row of NaN where the picture does not show what the encoder is made
        for (no face)."""
        ...


KINDS: dict[str, Callable[[str], PictureEncoder]] = {
    "embedded-face": EmbeddedFace,
    "embedded-scene": EmbeddedScene,
    "wide-face": WideFace,
    "wide-scene": WideScene,
    "arcface": ArcFace,
    "clip": Clip,
    "dinov2": Dinov2,
    "vision": Vision,
}


def load(name: str) -> PictureEncoder:
    """The encoder called ``name``; ConfigError with the nearest names otherwise."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise ConfigError(
            f"There is no picture encoder {name!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}."
        )
    return KINDS[kind](rest)
