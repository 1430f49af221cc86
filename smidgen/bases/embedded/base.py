"""The embedded bases as families: Stable Diffusion and FLUX.2 [klein], with scenes of their own world and a judge."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy

from smidgen.adapters.methods import Kind
from smidgen.bases.embedded import EMBEDDED, EMBEDDED_FLOW, world
from smidgen.bases.embedded.parts_reader import load_parts_reader
from smidgen.bases.flow_transformers import Flux2Klein
from smidgen.bases.pipelines import PipelineBase
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
    return frozenset(world.vocabulary())


class Portraits(PipelineBase):
    """What the bases that ship with the package share: the world of portraits. ``drawing`` is what a genuine pipeline of
    theirs is called with besides prompt, steps and guidance."""

    drawing: Mapping[str, Any] = {}
    parts_reader = staticmethod(load_parts_reader)
    learning: Mapping[str, Kind] = {"image": "picture_embedded", "control": "control_embedded"}

    def scenes(self, count: int, seed: int) -> list[str]:
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


class Embedded(Portraits, StableDiffusion):
    """A UNet."""

    family = EMBEDDED
    sampling = Sampling(20, 3.0)


class EmbeddedFlow(Portraits, Flux2Klein):
    """A flow-matching transformer. Its prompts are the last hidden state of CLIP's text model before the final norm, at a
    fixed length: FLUX.2 attends to padding."""

    family = EMBEDDED_FLOW
    sampling = Sampling(12, 3.0)  # type: ignore[assignment]
    prompt_options: Mapping[str, Any] = {
        "max_sequence_length": 40,
        "text_encoder_out_layers": (-1,),
    }  # a caption has 37 at most
    drawing: Mapping[str, Any] = {"height": world.SIZE, "width": world.SIZE, **prompt_options}

    @property
    def resolution(self) -> int:
        return world.SIZE


class EmbeddedJudge:
    """The embedded bases' own judge; its classifiers' accuracy on real drawings stands in the base's model card."""

    name = "the embedded base's attribute classifiers"

    def __init__(self) -> None:
        from smidgen.bases.embedded import judge

        self._judge = judge.load_judge()
        self._scenes: dict[str, Any] = {}

    def prompts(self, count: int, seed: int) -> list[str]:
        rng = numpy.random.default_rng(derive(seed, "scenes"))
        while len(found := list(self._scenes)) < count:
            scene = world.sample_scene(rng)
            self._scenes[world.caption(scene)] = scene
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
        usual = {name: Counter(wanted[name]).most_common(1)[0][0] for name in world.IDENTITY_ATTRIBUTES}
        traits = {name: sum(word == usual[name] for word in read[name]) / len(images) for name in usual}
        scores = {"identity": float(self._judge.identity_score(list(images), list(references)).mean())}
        scores |= {"traits": sum(traits.values()) / len(traits)}
        scores |= {"caption": float(caption.pop("mean"))} if caption else {}
        return scores | traits | caption
