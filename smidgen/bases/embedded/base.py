"""The embedded base as a family: Stable Diffusion, with scenes of its own world and a judge."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
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
        """Besides identity and caption: the share of pictures in which each attribute reads as it should."""
        caption = self._judge.caption_score(list(images), [self._scenes[prompt] for prompt in prompts])
        read, wanted = self._judge.read(list(images)), self._judge.read(list(references))
        usual = {name: Counter(wanted[name]).most_common(1)[0][0] for name in self._world.IDENTITY_ATTRIBUTES}
        traits = {name: sum(word == usual[name] for word in read[name]) / len(images) for name in usual}
        scores = {"identity": float(self._judge.identity_score(list(images), list(references)).mean())}
        scores |= {"caption": float(caption.pop("mean")), "traits": sum(traits.values()) / len(traits)}
        return scores | traits | caption
