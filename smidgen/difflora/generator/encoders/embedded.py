"""The embedded base's own encoders; see ``smidgen.models.embedded.encoders``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smidgen.models.embedded.encoders import FaceEncoder, load_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

SURE = 0.5  # a face is there when the encoder finds it likelier than this


class _Embedded:
    def __init__(self, name: str, kind: str, options: str = "") -> None:
        self.name, self.network = name, load_encoder(kind)
        self.width = self.network.width

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        return self.network.embed(list(pictures))


class EmbeddedFace(_Embedded):
    """Who; NaN where there is no face."""

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
