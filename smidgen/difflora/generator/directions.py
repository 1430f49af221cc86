"""Attribute directions in a generator's latent space: where to go for darker skin or longer hair.

weights2weights (Dravid et al. 2024, arXiv 2406.09413) finds them by linear models on the coefficients of many adapters. Here
latents of training people are regressed on all their attributes at once, by least squares:

    z - mean z = sum over attributes of b[attribute, word]

so that b holds what a word adds while the other attributes stay. A slider at 1 leads from the word that the person has to the
word that is asked for, b[word] - b[own word], which is how two people differ. ``directions.safetensors`` lies beside the generator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.generator.generator import Generator
from smidgen.errors import ConfigError, DataError, did_you_mean
from smidgen.training.randomness import stream

FILE = "directions.safetensors"
LEAST = 3  # people on either side of a word


@dataclass(frozen=True)
class Direction:
    """``attribute=word``: what the word adds to a latent [size], and what calibration saw.

    ``people`` had the word among those it was learnt from. A slider at 1 goes ``length`` times the way. ``read`` is how surely
    the face encoder then reads the word from pictures of people without it (``before`` at 0), ``own`` from pictures of people
    who have it, ``kept`` the share of other attributes that read the same at 1 as at 0; None where it was not calibrated.
    """

    name: str
    vector: Tensor
    people: int
    length: float = 1.0
    before: float | None = None
    read: float | None = None
    own: float | None = None
    kept: float | None = None

    @property
    def attribute(self) -> str:
        return self.name.partition("=")[0]

    @property
    def word(self) -> str:
        return self.name.partition("=")[2]


@dataclass(frozen=True)
class Space:
    """What is known of a generator's latents.

    Attributes:
        directions: one for each word.
        mean: of the training people's latents [size].
        spread: [size, size]; its square is their covariance.
        reach: how far from the mean the farthest of them is, in units of the spread.
        readers: [size, words], with ``shares`` [words] how surely each word is read from a latent, by least squares.
    """

    directions: tuple[Direction, ...]
    mean: Tensor
    spread: Tensor
    reach: float
    readers: Tensor
    shares: Tensor

    def radius(self, latents: Tensor) -> Tensor:
        """How far latents [..., size] are from the mean in units of the spread [...] (Mahalanobis)."""
        return ((latents - self.mean) @ torch.linalg.pinv(self.spread, rtol=1e-3)).norm(dim=-1)  # type: ignore[no-any-return]

    def sample(self, seed: int) -> Tensor:
        """The latent [size] of nobody: Gaussian as the people's latents are (weights2weights samples its coefficients so)."""
        return self.mean + torch.randn(len(self.mean), generator=stream(seed, "people")) @ self.spread

    def toward(self, latents: Tensor, name: str) -> Tensor:
        """What the slider ``name`` at 1 adds to latents [..., size]: the way from each person's own word, as read from the
        latent; more of the word where that is it already.

        Raises:
            ConfigError: there is no such slider.
        """
        known = [direction.name for direction in self.directions]
        if name not in known:
            raise ConfigError(_unknown(name, known))
        wanted = self.directions[known.index(name)]
        words = [number for number, other in enumerate(self.directions) if other.attribute == wanted.attribute]
        sure = (latents - self.mean) @ self.readers[:, words] + self.shares[words]
        vectors = torch.stack([self.directions[number].vector * (known[number] != name) for number in words])
        return wanted.length * (wanted.vector - vectors[sure.argmax(-1)])

    def moved(self, latents: Tensor, change: Tensor) -> Tensor:
        """latents + change [..., size], drawn back towards the mean where that leaves what people are like: no further out than
        ``reach``, or than where it started."""
        there = latents + change
        limit, radius = self.radius(latents).clamp(min=self.reach), self.radius(there)
        held = self.mean + (there - self.mean) * (limit / radius.clamp(min=1e-12))[..., None]
        return torch.where((radius > limit)[..., None], held, there)

    def edited(self, latent: Tensor, wanted: Mapping[str, float], times: float = 1.0) -> Tensor:
        """``latent`` [size] with each slider of ``wanted`` at its value times ``times``; 0 changes no bit.

        Raises:
            ConfigError: a slider that there is not.
        """
        parts = {name: self.toward(latent, name) for name in wanted}
        change = [times * value * parts[name] for name, value in wanted.items() if times * value]
        return self.moved(latent, torch.stack(change).sum(0)) if change else latent


def fit_space(latents: Tensor, attributes: Sequence[Mapping[str, str]]) -> Space:
    """The space as latents [people, size] show it; directions of all words that at least ``LEAST`` people have and as many have
    not.

    Args:
        attributes: of each of the people, attribute -> word.

    Raises:
        DataError: no attributes, or none that tells people apart.

    Example:
        >>> latents = torch.tensor([[1.0, 0.0], [1.0, 2.0], [-1.0, 0.0], [-1.0, 2.0]]).repeat(3, 1)
        >>> people = [{"a": a, "b": b} for a in "xy" for b in "uv"] * 3
        >>> space = fit_space(latents, people)
        >>> wanted = next(d for d in space.directions if d.name == "a=x")
        >>> torch.allclose(wanted.vector, torch.tensor([1.0, 0.0]), atol=1e-5)
        True
        >>> torch.allclose(space.toward(latents[2], "a=x"), torch.tensor([2.0, 0.0]), atol=1e-5)
        True
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
    told, z = torch.stack(list(has.values()), 1), latents.double()
    mean, shares = z.mean(0), told.mean(0)
    vectors = torch.linalg.pinv(told - shares) @ (z - mean)
    readers = torch.linalg.pinv(z - mean) @ (told - shares)
    values, axes = torch.linalg.eigh(torch.cov(z.T))
    spread = (values.clamp(min=0).sqrt()[:, None] * axes.T).half().float()
    directions = tuple(
        Direction(name, vector.float(), int(own.sum()))
        for (name, own), vector in zip(has.items(), vectors, strict=True)
    )
    space = Space(directions, mean.float(), spread, 0.0, readers.float(), shares.float())
    return replace(space, reach=float(space.radius(latents.float()).max()))


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


# ---- files -----------------------------------------------------------------------------------------------------------


def save_directions(space: Space, folder: Path, generator: Generator) -> Path:
    """Writes ``directions.safetensors`` beside the generator; returns its path."""
    told = [{k: v for k, v in vars(direction).items() if k != "vector"} for direction in space.directions]
    about = {"generator": generator.digest, "directions": json.dumps(told)}
    tensors = {"vectors": torch.stack([direction.vector for direction in space.directions]), "mean": space.mean}
    tensors |= {"spread": space.spread.half(), "reach": torch.tensor(space.reach)}
    tensors |= {"readers": space.readers, "shares": space.shares}
    replace_file(folder / FILE, save({n: t.contiguous() for n, t in tensors.items()}, metadata=about))
    return folder / FILE


def load_directions(folder: Path, generator: Generator) -> Space:
    """What lies beside the generator in ``folder``.

    Raises:
        DataError: nothing, or it is damaged, or another generator's.
    """
    path = folder / FILE
    again = f"`smidgen generator directions {folder} --people FOLDER` makes them."
    if not path.is_file():
        raise DataError(f"{folder} has no {FILE}. {again}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        told = json.loads(about["directions"])
        directions = tuple(Direction(vector=v, **own) for own, v in zip(told, tensors.pop("vectors"), strict=True))
        space = Space(directions, **(tensors | {"reach": float(tensors["reach"])}))  # type: ignore[arg-type]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). {again}") from error
    if about.get("generator") != generator.digest:
        raise DataError(f"{path} was learnt for another generator than the one in {folder}. {again}")
    return space
