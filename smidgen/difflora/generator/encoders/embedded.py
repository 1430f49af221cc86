"""The embedded bases' own encoders; see ``smidgen.bases.embedded.encoders`` and ``wide_encoders``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from smidgen.bases.embedded import wide
from smidgen.bases.embedded.encoders import FaceEncoder, load_encoder
from smidgen.bases.embedded.wide_encoders import Seen, load_wide_encoder
from smidgen.bases.embedded.words import ATTRIBUTES, SCENE_ATTRIBUTES
from smidgen.bases.embedded.world import Scene, caption
from smidgen.errors import DataError

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


class _Wide:
    """One network, which a photo goes through once for each side."""

    attributes: ClassVar[Mapping[str, Any]]

    def __init__(self, options: str = "") -> None:
        self.network = load_wide_encoder()

    def see(self, pictures: Sequence[Image]) -> Seen:
        return self.network.see(list(pictures))

    def read(self, pictures: Sequence[Image]) -> dict[str, dict[str, Tensor]]:
        """Attribute -> word -> how likely each picture shows it [n], 0 to 1."""
        words = self.see(pictures).words
        return {
            name: dict(zip(known, words[name].softmax(-1).T, strict=True)) for name, known in self.attributes.items()
        }


class WideFace(_Wide):
    """Who, in the wide world: with hair and skin in any colour; NaN where there is no face."""

    name, width = "wide-face", 104
    attributes: ClassVar = {
        name: wide.IDENTITY_ATTRIBUTES[name] for name in ("hair", "facial_hair")
    }  # eyebrows are few pixels
    reads = (
        "a portrait drawn as the wide base draws them, invented people of 64 x 64 pixels (`smidgen subject --world wide` draws some); "
        "photographs of real people this generator cannot read"
    )

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        seen = self.see(pictures)
        return seen.who.masked_fill((seen.face < SURE)[:, None], torch.nan)

    def colors(self, pictures: Sequence[Image]) -> dict[str, tuple[Tensor, Tensor]]:
        """Attribute -> its colour in each picture as L*, a*, b* [n, 3] in normal light, and the deviation of each of these [n] as the
        network has it."""
        seen = self.see(pictures)
        places = {name: wide.COLORS.index(name) for name in wide.FREE}
        return {name: (seen.colors[:, k], 10 * seen.doubt[:, k].exp()) for name, k in places.items()}


class WideScene(_Wide):
    """In what scene, in the wide world."""

    name, width, attributes = "wide-scene", 96, wide.SCENE_ATTRIBUTES

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        return self.see(pictures).scene

    def captions(self, pictures: Sequence[Image]) -> list[str]:
        """What the base's captions would say of each picture's scene, as far as this encoder can see."""
        read = {name: list(zip(*words.items(), strict=True)) for name, words in self.read(pictures).items()}
        likely = {name: [words[at] for at in torch.stack(shares).argmax(0)] for name, (words, shares) in read.items()}
        return [wide.caption(_scene({name: words[n] for name, words in likely.items()})) for n in range(len(pictures))]


def _scene(words: dict[str, str]) -> wide.Scene:
    """The scene that these words tell, where two contradict each other the nearest there is."""
    if words["glasses"] == "sunglasses":
        words |= {"eyes": "hidden"}
    elif words["eyes"] == "hidden":
        words |= {"eyes": "open"}
    if "none" in (words["hat"], words["hat_color"]):
        words |= {"hat": "none", "hat_color": "none"}
    try:
        return wide.Scene(**words)
    except DataError:  # a part that the other style has not
        return wide.Scene(**(words | {"style": "plain"}))
