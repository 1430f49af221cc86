"""The embedded bases as families: Stable Diffusion and FLUX.2 [klein], with scenes of their own world and a judge."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from smidgen.adapters.methods import Kind
from smidgen.bases.embedded import EMBEDDED, EMBEDDED_FLOW, EMBEDDED_WIDE, wide, world
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
GUIDANCE = 2.0  # more drives colours past those of the person whom an adapter draws (benchmarks/guidance.py)


@cache
def _words(drawn: ModuleType) -> frozenset[str]:
    """Every word that the captions of a world hold."""
    return frozenset(drawn.vocabulary())


class Portraits(PipelineBase):
    """What the bases that ship with the package share: the world of portraits, ``drawn``. ``drawing`` is what a genuine pipeline of
    theirs is called with besides prompt, steps and guidance."""

    drawn: ModuleType = world
    drawing: Mapping[str, Any] = {}
    lost = 0.135  # mean change of a picture (-1..1) by the autoencoder: drawings, posed or as JPEG, lose .01 to .13, photographs .137 up
    parts_reader = staticmethod(load_parts_reader)
    learning: Mapping[str, Kind] = {"image": "picture_embedded", "control": "control_embedded"}

    def scenes(self, count: int, seed: int) -> list[str]:
        rng = numpy.random.default_rng(derive(seed, "scenes"))
        return [self.drawn.caption(self.drawn.sample_scene(rng)) for _ in range(count)]

    def in_a_hat(self, attributes: Mapping[str, str], rng: numpy.random.Generator) -> Image:
        """Somebody of the world under a hat, which hides the hair, in any scene."""
        return wide.in_a_hat(attributes, self.drawn.sample_scene(rng), rng)  # type: ignore[no-any-return]

    def foreign(self, images: Sequence[Image]) -> list[bool]:
        """No drawn face is seen, or the autoencoder, which saw drawings alone, gives back something else."""
        from smidgen.bases.embedded.judge import as_tensor

        found: list[bool] = []
        for start in range(0, len(images), 16):
            pixels = as_tensor(images[start : start + 16])
            again = as_tensor(self.decode(self.encode_images(pixels)[0]))
            lost = (again - pixels).abs().mean((1, 2, 3)) > self.lost
            found += (lost | ~self._face_seen(images[start : start + 16])).tolist()
        return found

    def _face_seen(self, images: Sequence[Image]) -> Tensor:
        from smidgen.bases.embedded.encoders import load_encoder

        face: Any = load_encoder("face")
        return face.faces(face.embed(images)) >= FACE  # type: ignore[no-any-return]

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        said = {word: None for prompt in prompts for word in re.findall(r"[^\W_]+", prompt.lower())}
        return [word for word in said if word not in _words(self.drawn)]

    def judge(self) -> EmbeddedJudge | None:
        try:
            return EmbeddedJudge(self.drawn)
        except SmidgenError as error:
            logger.warning("The embedded base's judge cannot be read, so nothing will be scored: %s", error)
            return None


class Embedded(Portraits, StableDiffusion):
    """A UNet."""

    family = EMBEDDED
    sampling = Sampling(20, GUIDANCE)


class EmbeddedFlow(Portraits, Flux2Klein):
    """A flow-matching transformer. Its prompts are the last hidden state of CLIP's text model before the final norm, at a
    fixed length: FLUX.2 attends to padding."""

    family = EMBEDDED_FLOW
    sampling = Sampling(8, GUIDANCE)  # type: ignore[assignment]
    prompt_options: Mapping[str, Any] = {
        "max_sequence_length": 40,
        "text_encoder_out_layers": (-1,),
    }  # a caption has 37 at most
    drawing: Mapping[str, Any] = {"height": world.SIZE, "width": world.SIZE, **prompt_options}

    @property
    def resolution(self) -> int:
        return world.SIZE


class EmbeddedWide(EmbeddedFlow):
    """The wide world, by a transformer, an autoencoder and a text encoder of its own."""

    family = EMBEDDED_WIDE
    drawn = wide
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 48, "text_encoder_out_layers": (-1,)}
    drawing: Mapping[str, Any] = {"height": world.SIZE, "width": world.SIZE, **prompt_options}
    lost = 0.145  # drawings .10 at most (400); of 60 crops of a photograph, .08 to .2, half are above it

    def _face_seen(self, images: Sequence[Image]) -> Tensor:
        return torch.ones(len(images), dtype=torch.bool)  # the face encoder knows neither hats nor the second style


class EmbeddedJudge:
    """The embedded bases' own judge, of the world that is ``drawn``; its accuracy on real drawings stands in the base's model
    card."""

    name = "the embedded base's attribute classifiers"

    def __init__(self, drawn: ModuleType = world) -> None:
        from smidgen.bases.embedded import judge, wide_judge

        self._drawn = drawn
        self._judge: Any = judge.load_judge() if drawn is world else wide_judge.load_wide_judge()
        self._scenes: dict[str, Any] = {}

    def prompts(self, count: int, seed: int) -> list[str]:
        rng = numpy.random.default_rng(derive(seed, "scenes"))
        while len(found := list(self._scenes)) < count:
            scene = self._drawn.sample_scene(rng)
            self._scenes[self._drawn.caption(scene)] = scene
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
        usual = {name: Counter(wanted[name]).most_common(1)[0][0] for name in self._drawn.IDENTITY_ATTRIBUTES}
        traits = {name: sum(word == usual[name] for word in read[name]) / len(images) for name in usual}
        scores = {"identity": float(self._judge.identity_score(list(images), list(references)).mean())}
        scores |= {"traits": sum(traits.values()) / len(traits)}
        scores |= {"caption": float(caption.pop("mean"))} if caption else {}
        return scores | traits | caption
