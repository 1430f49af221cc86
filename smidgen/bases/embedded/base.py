"""The embedded base as a family: Stable Diffusion, with scenes of its own world and a judge."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from smidgen.adapters.methods import Kind
from smidgen.bases.embedded.parts_reader import load_parts_reader
from smidgen.bases.protocol import Sampling
from smidgen.bases.stable_diffusion import StableDiffusion
from smidgen.errors import SmidgenError
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


FACE = 0.5  # a drawn face is there when the face encoder finds it likelier
LOST = 0.135  # mean change of a picture (-1..1) by the autoencoder: drawings, posed or as JPEG, lose .01 to .13, photographs .137 up


@cache
def _words() -> frozenset[str]:
    """Every word that its captions held."""
    from smidgen.bases.embedded import world

    return frozenset(world.vocabulary())


class Embedded(StableDiffusion):
    """The base that ships with the package."""

    family = "embedded"
    sampling = Sampling(20, 3.0)
    parts_reader = staticmethod(load_parts_reader)
    learning: Mapping[str, Kind] = {"image": "picture_embedded", "control": "control_embedded"}

    def scenes(self, count: int, seed: int) -> list[str]:
        import numpy

        from smidgen.bases.embedded import world

        rng = numpy.random.default_rng(derive(seed, "scenes"))
        return [world.caption(world.sample_scene(rng)) for _ in range(count)]

    def foreign(self, images: Sequence[Image]) -> list[bool]:
        """No drawn face is seen, or the autoencoder, which saw drawings alone, gives back something else."""
        from smidgen.bases.embedded.encoders import load_encoder
        from smidgen.bases.embedded.judge import as_tensor

        face: Any = load_encoder("face")
        found: list[bool] = []
        for start in range(0, len(images), 16):
            pixels = as_tensor(images[start : start + 16])
            again = as_tensor(self.decode(self.encode_images(pixels)[0]))
            likely = face.faces(face.embed(images[start : start + 16]))
            lost = (again - pixels).abs().mean((1, 2, 3))
            found += ((likely < FACE) | (lost > LOST)).tolist()
        return found

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        said = {word: None for prompt in prompts for word in re.findall(r"[^\W_]+", prompt.lower())}
        return [word for word in said if word not in _words()]

    def judge(self) -> EmbeddedJudge | None:
        try:
            return EmbeddedJudge()
        except SmidgenError as error:
            logger.warning("The embedded base's judge cannot be read, so nothing will be scored: %s", error)
            return None


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

    def scores(self, images: Sequence[Image], prompts: Sequence[str], references: Sequence[Image]) -> dict[str, float]:
        """Besides identity and caption: the share of pictures in which each attribute reads as it should. Prompts that are
        no scenes of its own are not scored for their caption."""
        asked = [
            (image, self._scenes[prompt])
            for image, prompt in zip(images, prompts, strict=True)
            if prompt in self._scenes
        ]
        caption = self._judge.caption_score(*map(list, zip(*asked, strict=True))) if asked else {}
        read, wanted = self._judge.read(list(images)), self._judge.read(list(references))
        usual = {name: Counter(wanted[name]).most_common(1)[0][0] for name in self._world.IDENTITY_ATTRIBUTES}
        traits = {name: sum(word == usual[name] for word in read[name]) / len(images) for name in usual}
        scores = {"identity": float(self._judge.identity_score(list(images), list(references)).mean())}
        scores |= {"traits": sum(traits.values()) / len(traits)}
        scores |= {"caption": float(caption.pop("mean"))} if caption else {}
        return scores | traits | caption
