"""Contenders: each gives an adapter for every sitter from the same photos. Here are those that a zoo alone gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.difflora.audit.people import Sitter, training_photos
from smidgen.difflora.audit.regression import LEAST, choose_components, choose_strength, ridge
from smidgen.difflora.audit.settings import EvaluateConfig
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.weightspace.canonical import canonical_rows
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.zoo.status import status
from smidgen.difflora.zoo.store import Zoo
from smidgen.errors import DataError
from smidgen.training.randomness import stream


@dataclass(frozen=True)
class Made:
    """Adapters [chance, sitter, numbers] (None: the base as it is) and processor seconds for one of them."""

    rows: Tensor | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Contender:
    """A row of the table: how its adapters are made, of which layout, and what decides them (for going on later).

    ``traced``: also find out whether its pictures look like the training identity nearest in weights.
    """

    name: str
    layout: Layout
    make: Callable[[], Made]
    decides: tuple[Any, ...] = ()
    traced: bool = False


class Simple:
    """The contenders that a zoo and a photo give without any generator.

    Args:
        seen: face and image encoder.
        cache: file for the features of the training people's pictures.
    """

    def __init__(
        self, zoo: Zoo, people: Sequence[Sitter], config: EvaluateConfig, seen: tuple[PictureEncoder, PictureEncoder],
        resolution: int, cache: Path, progress: bool,
    ) -> None:  # fmt: skip
        self.zoo, self.people, self.config, self.seen = zoo, people, config, seen
        self.rows = zoo.rows("train")
        self.resolution, self.cache, self.progress = resolution, cache, progress

    def __iter__(self) -> Iterator[Contender]:
        zoo, names = self.zoo.layout, tuple(encoder.name for encoder in self.seen)
        chance = (self.config.noise, self.config.seeds, self.config.seed)
        yield Contender("base model", zoo, lambda: Made(None))
        yield Contender("mean adapter", zoo, self.mean)
        yield Contender("nearest training identity", zoo, self.nearest, names)
        yield Contender(f"noise around it (x {self.config.noise:g})", zoo, self.noise, (*names, *chance))
        yield Contender("ridge", zoo, self.ridge, names, traced=True)
        yield Contender("PCA regression", zoo, self.regression, names, traced=True)
        yield Contender("zoo's trained adapter", zoo, self.own, traced=True)

    # ---- how they are made -------------------------------------------------------------------------------------------

    def mean(self) -> Made:
        """The mean of the training rows, in canonical form."""
        assert self.codec.normaliser is not None
        return Made(self.codec.normaliser.shift.expand(1, len(self.people), -1))

    def nearest(self) -> Made:
        """The adapter of the training identity one of whose photos is the most like the sitter's, by the face encoder."""
        return Made(self.rows.take(self.neighbours)[None], self.encoded[0])

    def noise(self) -> Made:
        """That adapter, and Gaussian noise in deviations of the training rows around their mean, tensor by tensor."""
        assert self.codec.normaliser is not None
        start = canonical_rows(self.rows.take(self.neighbours), self.zoo.layout, self.codec.reference)
        shape = (self.config.seeds, *start.shape)
        noise = torch.randn(shape, generator=stream(self.config.seed, "around"))
        return Made(start + self.config.noise * self.codec.normaliser.width * noise, self.encoded[0])

    def ridge(self) -> Made:
        """Features -> all components."""
        features, targets, owners = self.training
        fitted = ridge(features, targets, choose_strength(features, targets, owners))
        return self._regressed(fitted)

    def regression(self) -> Made:
        """Features -> the first components."""
        features, targets, owners = self.training
        kept = choose_components(features, targets, owners)
        fitted = ridge(features, targets, LEAST)
        cut = torch.zeros_like(fitted.offset)
        cut[:kept] = 1
        return self._regressed(replace(fitted, weights=fitted.weights * cut, offset=fitted.offset * cut))

    def own(self) -> Made:
        """The sitters' adapters in the zoo, trained on all their pictures; seconds are the build's."""
        return Made(self.trained()[None], status(self.zoo.folder).seconds_per_adapter or 0.0)

    def trained(self) -> Tensor:
        """Those adapters [sitter, numbers]."""
        lines = {line.id: line for line in self.zoo.rows("test").lines}
        return self.zoo.read([lines[person.id] for person in self.people])

    def _regressed(self, fitted: Callable[[Tensor], Tensor]) -> Made:
        start = time.process_time()
        rows = self.codec.decode(fitted(self.features) / self.widths).float()
        return Made(rows[None], self.encoded[0] + (time.process_time() - start) / len(self.people))

    # ---- what they are made of ---------------------------------------------------------------------------------------

    @cached_property
    def codec(self) -> PCA:
        """All components of the training rows, a mean for each number and a deviation for each tensor."""
        codec = PCA(self.zoo.layout, "centred", components=len(self.rows))
        codec.fit(self.rows, progress=False)
        return codec

    @property
    def widths(self) -> Tensor:
        """Deviation of each component in the normalised rows [k]; latents times this are the components themselves."""
        assert self.codec.latent_width is not None
        return self.codec.latent_width

    @cached_property
    def photos(self) -> Photos:
        return training_photos(self.zoo, self.rows.ids, self.seen, self.resolution, self.cache, self.progress)

    @cached_property
    def training(self) -> tuple[Tensor, Tensor, list[int]]:
        """Features [photo, width] of every training photo with a face, components [photo, k] of its person's adapter in
        the size they have in the normalised rows, and whose each is."""
        place = {name: number for number, name in enumerate(self.rows.ids)}
        components = self.codec.encode(self.rows.load().values) * self.widths
        photos = [(photo, number) for number, own in enumerate(self.photos.usable) for photo in own]
        seen = torch.cat([self.photos.face, self.photos.image], 1)[[photo for photo, _ in photos]]
        owners = [place[self.photos.ids[number]] for _, number in photos]
        return seen, components[owners], owners

    @cached_property
    def encoded(self) -> tuple[float, tuple[Tensor, Tensor]]:
        """Processor seconds for one sitter, and their (face, image) features [sitter, width], the mean of their photos."""
        start, found = time.process_time(), []
        for sitter in self.people:
            parts = [encoder.encode(sitter.photos) for encoder in self.seen]
            if any(part.isnan().any() for part in parts):
                raise DataError(
                    f"No face was found in the photos of {sitter.id!r}; evaluate on other people or photos."
                )
            found.append([part.mean(0) for part in parts])
        face, image = (torch.stack(list(values)) for values in zip(*found, strict=True))
        return (time.process_time() - start) / len(self.people), (face, image)

    @property
    def features(self) -> Tensor:
        """What the encoders see of the sitters [sitter, width]."""
        return torch.cat(self.encoded[1], 1)

    @cached_property
    def neighbours(self) -> list[int]:
        """Place among the training rows of the identity nearest to each sitter by the face encoder."""
        place = {name: number for number, name in enumerate(self.rows.ids)}
        usable = [(photo, name) for name, own in zip(self.photos.ids, self.photos.usable, strict=True) for photo in own]
        there = torch.nn.functional.normalize(self.photos.face[[photo for photo, _ in usable]], dim=1)
        found = torch.nn.functional.normalize(self.encoded[1][0], dim=1) @ there.T
        return [place[usable[best][1]] for best in found.argmax(1).tolist()]
