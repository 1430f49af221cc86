"""Attribute directions in a generator's latent space: where to go for darker skin or longer hair.

weights2weights (Dravid et al. 2024, arXiv 2406.09413) finds them by linear models on the coefficients of many adapters. Here
latents of training people are regressed on all their attributes at once, by least squares:

    z - mean z = sum over attributes of b[attribute, word]

so that a direction b holds what its word adds while the other attributes stay. Where the generator's own face encoder can read the
attribute, the length of a slider is set on drawn pictures. ``directions.safetensors`` lies beside the generator.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.difflora.generator.carrier import Carrier, Sheet
from smidgen.difflora.generator.generator import Generator
from smidgen.difflora.generator.people import Photos, photos_of
from smidgen.difflora.zoo.subjects import TABLE, read_subjects
from smidgen.errors import ConfigError, DataError, did_you_mean
from smidgen.training.checkpoints import replace_file
from smidgen.training.randomness import stream
from smidgen.training.report import markdown_table

logger = logging.getLogger(__name__)
FILE = "directions.safetensors"
LEAST = 3  # people on either side of a word
LENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # tried in calibration
ENOUGH = 0.9  # of how surely the word is read from pictures of people who have it,
AT_LEAST = 0.5  # or of this, if it is hardly read from theirs


@dataclass(frozen=True)
class Direction:
    """``attribute=word``: what a slider at 1 adds to a latent [size], and what calibration saw.

    ``people`` had the word among those it was learnt from. ``length`` is the calibrated factor in ``vector`` (1: as the
    regression has it). ``read`` is how surely the face encoder reads the word at 1 from pictures of people without it
    (``before`` at 0), ``own`` from pictures of people who have it, ``kept`` the share of other attributes that read the
    same at 1 as at 0; None where it was not calibrated.
    """

    name: str
    vector: Tensor
    people: int
    length: float = 1.0
    before: float | None = None
    read: float | None = None
    own: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class Space:
    """What is known of a generator's latents: ``directions``, and what its training people's are like: ``mean`` [size], and
    ``spread`` [size, size] whose square is their covariance."""

    directions: tuple[Direction, ...]
    mean: Tensor
    spread: Tensor

    def sample(self, seed: int) -> Tensor:
        """The latent [size] of nobody: Gaussian as the people's latents are (weights2weights samples its coefficients so)."""
        return self.mean + torch.randn(len(self.mean), generator=stream(seed, "people")) @ self.spread

    @classmethod
    def of(cls, latents: Tensor, directions: Sequence[Direction]) -> Space:
        """Of people's latents [people, size]."""
        values, vectors = torch.linalg.eigh(torch.cov(latents.double().T))
        spread = values.clamp(min=0).sqrt()[:, None] * vectors.T
        return cls(tuple(directions), latents.mean(0), spread.half().float())


def fit_directions(latents: Tensor, attributes: Sequence[Mapping[str, str]]) -> list[Direction]:
    """Directions of all words that at least ``LEAST`` people have and as many have not.

    Args:
        latents: [people, size].
        attributes: of each of them, attribute -> word.

    Raises:
        DataError: no attributes, or none that tells people apart.

    Example:
        >>> latents = torch.tensor([[1.0, 0.0], [1.0, 2.0], [-1.0, 0.0], [-1.0, 2.0]]).repeat(3, 1)
        >>> people = [{"a": a, "b": b} for a in "xy" for b in "uv"] * 3
        >>> [d.vector.round(decimals=3).tolist() for d in fit_directions(latents, people) if d.name == "a=x"]
        [[1.0, 0.0]]
    """
    if len(latents) != len(attributes):
        raise DataError(f"{len(latents)} latents for {len(attributes)} people.")
    has: dict[str, Tensor] = {}
    for number, own in enumerate(attributes):
        for attribute, word in own.items():
            has.setdefault(f"{attribute}={word}", torch.zeros(len(latents), dtype=torch.float64))[number] = 1.0
    has = {name: has[name] for name in sorted(has) if LEAST <= has[name].sum() <= len(latents) - LEAST}
    if not has:
        raise DataError(
            f"No attribute tells {len(latents)} people apart: a word needs {LEAST} people who have it and {LEAST} who have "
            "not. Attributes stand in the column 'attributes' of subjects.parquet."
        )
    told, wanted = torch.stack(list(has.values()), 1), latents.double()
    found = torch.linalg.pinv(told - told.mean(0)) @ (wanted - wanted.mean(0))
    return [
        Direction(name, vector.float(), int(own.sum())) for (name, own), vector in zip(has.items(), found, strict=True)
    ]


def latents_of(generator: Generator, photos: Photos, batch: int = 64) -> Tensor:
    """The generator's latents [people, size], each from all usable photos of one person."""
    counts = torch.tensor([len(own) for own in photos.usable])
    latents = torch.zeros(len(photos), generator.network.latents)
    for count in counts.unique().tolist():
        for people in (counts == count).nonzero().flatten().split(batch):
            seen = photos.batch([photos.usable[person] for person in people.tolist()])
            with torch.no_grad():
                condition = generator.network.mixing(seen["face"], seen["image"])
                latents[people] = generator.latents(condition, [0] * len(people))
    return latents


def learn(
    generator: Generator, carrier: Carrier, folder: Path, most: int = 1000, drawn: bool = True, progress: bool = True
) -> Space:
    """The latent space as at most ``most`` training people of the zoo or table in ``folder`` show it; ``drawn``: sliders are calibrated
    where the generator's face encoder can read attributes.

    Raises:
        DataError: there is no table of people, or no attributes in it.
    """
    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no {TABLE}; --people names a zoo, or the folder people/ of a generator's training."
        )
    people = [person for person in read_subjects(folder) if person.split == "train" and person.attributes][:most]
    if not people:
        raise DataError(f"Nobody in {folder / TABLE} has attributes, so there is nothing to learn directions of.")
    photos = photos_of(folder, people, generator.face, generator.image, carrier.base.resolution, progress)
    known = {person.id: person.attributes for person in people}
    latents, attributes = latents_of(generator, photos), [known[name] for name in photos.ids]
    directions = fit_directions(latents, attributes)
    if drawn and hasattr(generator.face, "read"):
        directions = calibrate(generator, carrier, directions, latents, attributes, progress=progress)
    return Space.of(latents, directions)


def calibrate(
    generator: Generator,
    carrier: Carrier,
    directions: Sequence[Direction],
    latents: Tensor,
    attributes: Sequence[Mapping[str, str]],
    people: int = 6,
    steps: int = 10,
    progress: bool = True,
) -> list[Direction]:
    """The same directions, as long as it takes to see the word.

    For some ``people`` without the word, pictures are drawn at each of ``LENGTHS`` and read by the generator's own face
    encoder. The least length is taken at which the word is read ``ENOUGH`` times as surely as from pictures of people who have
    it (``AT_LEAST`` if it is hardly read there); where none gets there, the one that comes nearest. Words of attributes that the encoder does not know stay as they
    are.
    """
    from tqdm.auto import tqdm

    reader: Any = generator.face
    sheet = Sheet(num_prompts=1, inference_steps=steps)
    found = []
    for direction in tqdm(directions, desc="directions", unit="word", disable=not progress, dynamic_ncols=True):
        attribute, _, word = direction.name.partition("=")
        mine = torch.tensor([own.get(attribute) == word for own in attributes])
        without, having = ((mine == there).nonzero().flatten()[:people] for there in (False, True))
        moved = [latents[without] + length * direction.vector for length in (0.0, *LENGTHS)]
        pictures = [own[0] for own in carrier.draw(generator.rows(torch.cat([latents[having], *moved])), sheet)]
        read = reader.read(pictures)
        if word in read.get(attribute, {}):
            direction = _calibrated(direction, read, len(having), len(without))
        found.append(direction)
    return found


def _calibrated(direction: Direction, read: Mapping[str, Mapping[str, Tensor]], having: int, without: int) -> Direction:
    """``read`` holds pictures of ``having`` people with the word, and of those without it at 0 and at each length."""
    attribute, _, word = direction.name.partition("=")
    own, *at = read[attribute][word].split([having, *[without] * (len(LENGTHS) + 1)])
    sure = torch.stack([part.mean() for part in at])
    enough = (sure[1:] >= ENOUGH * own.mean().clamp(min=AT_LEAST)).nonzero().flatten().tolist()
    best = enough[0] + 1 if enough else int(sure[1:].argmax()) + 1
    others = [_words(shares, having, without) for name, shares in read.items() if name != attribute]
    kept = float(torch.stack([(words[best] == words[0]).float().mean() for words in others]).mean()) if others else None
    length, (before, after) = LENGTHS[best - 1], (float(sure[0]), float(sure[best]))
    return replace(
        direction,
        vector=length * direction.vector,
        length=length,
        before=before,
        read=after,
        own=float(own.mean()),
        kept=kept,
    )


def _words(shares: Mapping[str, Tensor], having: int, without: int) -> Tensor:
    """The likeliest word of each picture of the people without the word, as its number [lengths, people]."""
    return torch.stack(list(shares.values())).argmax(0)[having:].unflatten(0, (-1, without))


def edited(latent: Tensor, directions: Sequence[Direction], wanted: Mapping[str, float], times: float = 1.0) -> Tensor:
    """``latent`` [..., size] with each slider at its value, all of them times ``times``; 0 changes no bit.

    Raises:
        ConfigError: a word that has no direction.
    """
    known = {direction.name: direction.vector for direction in directions}
    for name, value in wanted.items():
        if name not in known:
            raise ConfigError(_unknown(name, list(known)))
        if times * value:
            latent = latent + times * value * known[name]
    return latent


def parse_sliders(texts: Sequence[str]) -> dict[str, float]:
    """``["skin=dark:1.0", "hair=long"]`` -> ``{"skin=dark": 1.0, "hair=long": 1.0}``; ConfigError otherwise."""
    found: dict[str, float] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        attribute, equals, word = (part.strip() for part in name.partition("="))
        try:
            number = float(value) if colon else 1.0
        except ValueError:
            number = float("nan")
        if not (attribute and equals and word) or number != number or abs(number) == float("inf"):
            raise ConfigError(f"--set takes ATTRIBUTE=WORD:NUMBER, such as skin=dark:1.0, not {text!r}.")
        found[f"{attribute}={word}"] = number
    return found


def _unknown(name: str, known: Sequence[str]) -> str:
    attribute = name.partition("=")[0]
    words = [other.partition("=")[2] for other in known if other.partition("=")[0] == attribute]
    if words:
        return f"There is no slider {name!r}.{did_you_mean(name, known)} Words of {attribute}: {', '.join(words)}."
    attributes = list(dict.fromkeys(other.partition("=")[0] for other in known))
    return f"There is no attribute {attribute!r}.{did_you_mean(attribute, attributes)} Known: {', '.join(attributes)}."


def table(directions: Sequence[Direction]) -> str:
    """The sliders and what calibration saw, as a table for a terminal."""
    head = ["slider", "people", "length", "read at 0", "read at 1", "read of people with it", "others kept"]
    rows = [
        [
            d.name,
            str(d.people),
            f"{d.length:g}",
            *("" if v is None else f"{v:.2f}" for v in (d.before, d.read, d.own, d.kept)),
        ]
        for d in directions
    ]
    return markdown_table(head, rows)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_directions(space: Space, folder: Path, generator: Generator) -> Path:
    """Writes ``directions.safetensors`` beside the generator; returns its path."""
    told = [{k: v for k, v in vars(direction).items() if k != "vector"} for direction in space.directions]
    about = {"generator": generator.digest, "directions": json.dumps(told)}
    vectors = torch.stack([direction.vector for direction in space.directions])
    tensors = {
        "vectors": vectors.contiguous(),
        "mean": space.mean.contiguous(),
        "spread": space.spread.half().contiguous(),
    }
    replace_file(folder / FILE, save(tensors, metadata=about))
    return folder / FILE


def load_directions(folder: Path, generator: Generator) -> Space:
    """What lies beside the generator in ``folder``.

    Raises:
        DataError: nothing, or it is damaged, or another generator's.
    """
    path = folder / FILE
    again = f"`smidgen generator directions {folder} --people FOLDER` makes them."
    if not path.is_file():
        raise DataError(f"{folder} has no directions to edit along. {again}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            vectors, mean, spread = (file.get_tensor(name).float() for name in ("vectors", "mean", "spread"))
        told = json.loads(about["directions"])
        directions = tuple(Direction(vector=vector, **own) for own, vector in zip(told, vectors, strict=True))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). {again}") from error
    if about.get("generator") != generator.digest:
        raise DataError(f"{path} was learnt for another generator than the one in {folder}. {again}")
    return Space(directions, mean, spread)
