"""Contenders: each gives an adapter for every sitter from the same photos. Here are those that a zoo alone gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.weightspace.canonical import canonical_rows
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Normaliser, Statistics
from smidgen.difflora.zoo.status import status
from smidgen.difflora.zoo.store import Zoo
from smidgen.errors import DataError
from smidgen.lab.audit.people import Sitter, training_photos
from smidgen.lab.audit.regression import (
    LEAST,
    Regression,
    choose_components,
    choose_strength,
    principal_components,
    ridge,
    stretch,
)
from smidgen.lab.audit.settings import EvaluateConfig
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
        cache: folder for the features of the training people's pictures.
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
        yield Contender("ridge at full length", zoo, self.full_length, names, traced=True)
        yield Contender("PCA regression", zoo, self.regression, names, traced=True)
        yield Contender("zoo's trained adapter", zoo, self.own, traced=True)

    # ---- how they are made -------------------------------------------------------------------------------------------

    def mean(self) -> Made:
        """The mean of the training rows."""
        return Made(self.normaliser.shift.expand(1, len(self.people), -1))

    def nearest(self) -> Made:
        """The adapter of the training identity one of whose photos is the most like the sitter's, by the face encoder."""
        return Made(self.rows.take(self.neighbours)[None], self.encoded[0])

    def noise(self) -> Made:
        """That adapter, and Gaussian noise in deviations of the training rows around their mean, tensor by tensor."""
        start = self.space(self.rows.take(self.neighbours))
        noise = torch.randn((self.config.seeds, *start.shape), generator=stream(self.config.seed, "around"))
        return Made(start + self.config.noise * self.normaliser.width * noise, self.encoded[0])

    def ridge(self) -> Made:
        """Features -> all components."""
        return self._regressed(ridge(self.seen_by, self.coordinates, self.strength))

    def full_length(self) -> Made:
        """The same, its distance from the mean stretched to that of training adapters."""
        longer = stretch(self.seen_by, self.coordinates, self.owners, self.strength)
        return self._regressed(ridge(self.seen_by, self.coordinates, self.strength), longer)

    def regression(self) -> Made:
        """Features -> the first components."""
        kept = torch.arange(self.coordinates.shape[1]) < choose_components(self.seen_by, self.coordinates, self.owners)
        return self._regressed(ridge(self.seen_by, self.coordinates, LEAST), kept.float())

    def own(self) -> Made:
        """The sitters' adapters in the zoo, trained on all their pictures; seconds are the build's."""
        return Made(self.trained()[None], status(self.zoo.folder).seconds_per_adapter or 0.0)

    def trained(self) -> Tensor:
        """Those adapters [sitter, numbers]."""
        lines = {line.id: line for line in self.zoo.rows("test").lines}
        return self.zoo.read([lines[person.id] for person in self.people])

    def _regressed(self, fitted: Regression, factor: float | Tensor = 1.0) -> Made:
        start = time.process_time()
        rows = self.normaliser.inverse((factor * fitted(self.features)) @ self.basis)
        return Made(rows[None], self.encoded[0] + (time.process_time() - start) / len(self.people))

    # ---- what they are made of ---------------------------------------------------------------------------------------

    @cached_property
    def training(self) -> Tensor:
        """The training rows [n, numbers]."""
        return self.rows.load().values

    def space(self, rows: Tensor) -> Tensor:
        """Rows [n, numbers] as means and regressions take them: as they are when all adapters grew from one start, else
        in canonical form, without which unrelated factors cannot be averaged."""
        if self.zoo.settings.get("group", {}).get("shared_start"):
            return rows
        return canonical_rows(rows, self.zoo.layout, canonical_rows(self.training[0], self.zoo.layout))

    @cached_property
    def normaliser(self) -> Normaliser:
        """Mean of each number and deviation around it of each tensor."""
        statistics = Statistics(self.zoo.layout.size)
        statistics.add(self.space(self.training))
        return statistics.normaliser(self.zoo.layout, "centred")

    @cached_property
    def components(self) -> tuple[Tensor, Tensor]:
        """All principal components [k, numbers] of the normalised training rows, and those rows in them [n, k]."""
        return principal_components(self.normaliser(self.space(self.training)))

    @property
    def basis(self) -> Tensor:
        return self.components[0]

    @cached_property
    def coordinates(self) -> Tensor:
        """For every training photo with a face the components [photo, k] of its person's adapter."""
        return self.components[1][self.owners]

    @cached_property
    def strength(self) -> float:
        return choose_strength(self.seen_by, self.coordinates, self.owners)

    @cached_property
    def photos(self) -> Photos:
        return training_photos(self.zoo, self.rows.ids, self.seen, self.resolution, self.cache, self.progress)

    @cached_property
    def owners(self) -> list[int]:
        """Whose each training photo with a face is, as a place among the rows."""
        place = {name: number for number, name in enumerate(self.rows.ids)}
        return [place[name] for name, own in zip(self.photos.ids, self.photos.usable, strict=True) for _ in own]

    @cached_property
    def seen_by(self) -> Tensor:
        """What the encoders see in those photos [photo, width]."""
        places = [photo for own in self.photos.usable for photo in own]
        return torch.cat([self.photos.face, self.photos.image], 1)[places]

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
        width = self.photos.face.shape[1]
        there = torch.nn.functional.normalize(self.seen_by[:, :width], dim=1)
        found = torch.nn.functional.normalize(self.encoded[1][0], dim=1) @ there.T
        return [self.owners[best] for best in found.argmax(1).tolist()]
