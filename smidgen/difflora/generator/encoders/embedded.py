"""The embedded base's own encoders; see ``smidgen.bases.embedded.encoders``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen.bases.embedded.encoders import FaceEncoder, load_encoder
from smidgen.bases.embedded.words import ATTRIBUTES, SCENE_ATTRIBUTES
from smidgen.bases.embedded.world import Scene, caption

if TYPE_CHECKING:
    from PIL.Image import Image

SURE = 0.5  # a face is there when the encoder finds it likelier than this


class _Embedded:
    def __init__(self, name: str, kind: str, options: str = "") -> None:
        self.name, self.network = name, load_encoder(kind)
        self.width = self.network.width

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        return self.network.embed(list(pictures))

    def read(self, pictures: Sequence[Image]) -> dict[str, dict[str, Tensor]]:
        """Attribute -> word -> how likely each picture shows it [n], 0 to 1."""
        read = self.network.read(self.network.embed(list(pictures)))
        return {name: dict(zip(ATTRIBUTES[name], logits.softmax(-1).T, strict=True)) for name, logits in read.items()}


class EmbeddedFace(_Embedded):
    """Who; NaN where there is no face."""

    reads = (
        "a portrait drawn as the embedded base draws them, invented people of 64 x 64 pixels (`smidgen subject` draws some); "
        "photographs of real people this generator cannot read"
    )

    def __init__(self, options: str = "") -> None:
        super().__init__("embedded-face", "face")

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        features = super().encode(pictures)
        assert isinstance(self.network, FaceEncoder)
        return features.masked_fill((self.network.faces(features) < SURE)[:, None], torch.nan)


class EmbeddedScene(_Embedded):
    """Everything in the picture."""

    def __init__(self, options: str = "") -> None:
        super().__init__("embedded-scene", "scene")

    def captions(self, pictures: Sequence[Image]) -> list[str]:
        """What the base's captions would say of each picture's scene, as far as this encoder can see."""
        read, captions = self.read(pictures), []
        for number in range(len(pictures)):
            likely = {n: {w: float(p[number]) for w, p in read[n].items()} for n in SCENE_ATTRIBUTES}
            likely["eyes"]["hidden"] = 0.0
            words = {name: max(shares, key=shares.__getitem__) for name, shares in likely.items()}
            captions.append(caption(Scene(**words | ({"eyes": "hidden"} if words["glasses"] == "sunglasses" else {}))))
        return captions
