"""How a generator's :class:`Reader` is fitted: distances on photos of training people, limits, temperatures and floors on those of
held-out ones.

Every photo is taken twice, as it is and as photos come: stored as JPEG, scaled, a little lighter or darker. Words are calibrated on
held-out photos that are also moved and zoomed, as far as the search for a framing goes, and not refused: those are what a user
sees words of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from smidgen.bases.embedded import wide
from smidgen.bases.embedded.colors import lab
from smidgen.difflora.generator.generator import Generator
from smidgen.difflora.generator.reading import (
    LEVELS,
    PLACES,
    Limits,
    Reader,
    Word,
    colour_places,
    features_of,
    latents_alone,
    moved,
    tempered,
    words_of,
)
from smidgen.difflora.zoo.subjects import TABLE, Subject, read_pictures, read_subjects
from smidgen.errors import DataError
from smidgen.tasks import cards
from smidgen.tasks.data.images import load_picture

PICTURES = 2  # of each person
QUANTILE = 0.995  # of held-out photos that are under each limit
USUAL = 0.9  # of them that are read as they are
RIGHT = 0.998  # of held-out words that are right at or above a floor
TEMPERATURES = torch.logspace(-0.6, 1.0, 81)
LEAST = 20  # held-out people


def calibrate(
    generator: Generator, resolution: int, folder: Path, most: int = 1500, seed: int = 0, progress: bool = True
) -> Reader:
    """The reader as at most ``most`` training people and all held-out ones of the table in ``folder`` show it.

    Raises:
        DataError: there is no table of people, or too few are held out.
    """
    from tqdm.auto import tqdm

    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no {TABLE}; --people names a zoo, or the folder people/ of a generator's training."
        )
    everybody = read_subjects(folder)
    people = [person for person in everybody if person.split == "train"][:most]
    held = [person for person in everybody if person.split != "train"]
    if len(held) < LEAST:
        raise DataError(
            f"{folder / TABLE} holds out {len(held)} people, and limits need {LEAST}: make it with "
            "--end-to-end.people.held-out 300, or a share of a folder's people with --end-to-end.people.held-out-share 0.1."
        )
    rng, features, counts = numpy.random.default_rng(seed), [], torch.full((PLACES**2 * LEVELS**3,), 0.5)
    for person in tqdm(people, desc="training people", disable=not progress, dynamic_ncols=True):
        photos = [one for photo in _photos(folder, person, resolution) for one in (photo, as_they_come(photo, rng))]
        features.append(features_of(generator, photos))
        for photo in photos:
            counts += torch.bincount(colour_places(photo).flatten(), minlength=len(counts))
    seen = torch.cat(features)
    reader = _fitted(seen[~seen.isnan().any(1)], counts.reshape(PLACES**2, -1))
    photos_of = [_photos(folder, person, resolution) for person in tqdm(held, desc="held out", disable=not progress)]
    reader = _limited(reader, generator, photos_of, rng)
    if not hasattr(generator.face, "read") or not all(person.attributes for person in held):
        return reader
    looked = []
    for person, photos in zip(held, tqdm(photos_of, desc="words", disable=not progress), strict=True):
        for photo in (*photos, *(moved(photo, rng) for photo in photos)):
            one = reader.look(generator, as_they_come(photo, rng))
            if not reader.refusal(one):
                looked.append((one.image, person.attributes))
    return replace(reader, words=_words(generator, looked), shades=_shades(generator, looked))


def _photos(folder: Path, person: Subject, resolution: int) -> list[Image.Image]:
    return [load_picture(io.BytesIO(data), resolution) for data in read_pictures(folder, person)[:PICTURES]]


def as_they_come(image: Image.Image, rng: numpy.random.Generator) -> Image.Image:
    """The image scaled up and down again, a little lighter or darker, and stored as JPEG."""
    side = image.width
    large = image.resize((round(side * rng.uniform(1.5, 4)),) * 2, Image.Resampling.BICUBIC)
    small = (
        ImageEnhance.Brightness(large).enhance(rng.uniform(0.97, 1.03)).resize((side, side), Image.Resampling.LANCZOS)
    )
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=int(rng.integers(75, 96)), subsampling=0)
    return Image.open(stored).convert("RGB")


def _fitted(features: Tensor, counts: Tensor) -> Reader:
    """Without limits yet. Directions of less than a thousandth of the greatest deviation count as that."""
    values, axes = torch.linalg.eigh(torch.cov(features.double().T))
    whiten = axes / values.clamp(min=values[-1] * 1e-6).sqrt()
    surprise = -(counts / counts.sum(1, keepdim=True)).log()
    return Reader(
        features.mean(0), whiten.float().half().float(), surprise.half().float(), Limits(*[float("inf")] * 4), QUANTILE
    )


def _limited(
    reader: Reader, generator: Generator, photos_of: Sequence[Sequence[Image.Image]], rng: numpy.random.Generator
) -> Reader:
    photos = [one for photos in photos_of for photo in photos for one in (photo, as_they_come(photo, rng))]
    features = reader.features(generator, photos)
    colours = torch.tensor([reader.colours(photo)[0] for photo in photos])
    pairs = [photos[:2] for photos in photos_of if len(photos) > 1]
    apart = torch.zeros(1)
    if pairs:
        alone = latents_alone(generator, [photo for pair in pairs for photo in pair]).unflatten(0, (-1, 2))
        apart = (alone[:, 0] - alone[:, 1]).norm(dim=1)
    limits = Limits(
        features=float(features.quantile(QUANTILE)),
        colours=float(colours.quantile(QUANTILE)),
        people=float(apart[apart.isfinite()].quantile(QUANTILE)) if pairs else float("inf"),
        search=float(features.quantile(USUAL)),
    )
    return replace(reader, limits=limits)


def _words(generator: Generator, looked: Sequence[tuple[Image.Image, dict[str, str]]]) -> dict[str, Word]:
    """A temperature for each attribute by maximum likelihood, then its floor."""
    found = {}
    for name, (known, shares) in words_of(generator, [image for image, _ in looked]).items():
        if name not in looked[0][1]:
            continue
        truth = torch.tensor([known.index(own[name]) for _, own in looked])
        losses = [
            -tempered(shares, float(t)).gather(1, truth[:, None]).clamp(min=1e-12).log().mean() for t in TEMPERATURES
        ]
        temperature = float(TEMPERATURES[int(torch.stack(losses).argmin())])
        sure, word = tempered(shares, temperature).max(1)
        found[name] = Word(temperature, floor_of(sure, word == truth))
    return found


def _shades(generator: Generator, looked: Sequence[tuple[Image.Image, dict[str, str]]]) -> dict[str, float]:
    """For each free colour the factor on the encoder's deviation that makes it the root mean square distance of those photos."""
    if not hasattr(generator.face, "colors"):
        return {}
    found = {}
    for name, (seen, off) in generator.face.colors([image for image, _ in looked]).items():
        told = [own[name] for _, own in looked]
        named = wide.ATTRIBUTES[name]
        true = torch.tensor(
            numpy.stack([lab(shade if shade.startswith("#") else named[shade]) for shade in told])
        ).float()
        found[name] = float(((seen - true).square().sum(1) / off.square()).mean().sqrt())
    return found


def floor_of(sure: Tensor, right: Tensor) -> float:
    """The least of ``sure`` [n] such that of the readings that are at least as sure ``RIGHT`` are right; 1 where none is.

    Example:
        >>> floor_of(torch.tensor([0.4, 0.6, 0.8]), torch.tensor([False, True, True])) == torch.tensor(0.6)
        tensor(True)
    """
    order = sure.argsort(descending=True)
    share = right[order].float().cumsum(0) / torch.arange(1, len(sure) + 1)
    enough = (share >= RIGHT).nonzero()
    return float(sure[order][int(enough[-1])]) if len(enough) else 1.0


def table(reader: Reader) -> str:
    """What was found, for a terminal."""
    limits = reader.limits
    lines = [
        f"{reader.quantile:.1%} of held-out photos: features up to {limits.features:.2f} (another framing is sought above "
        f"{limits.search:.2f}), colours up to {limits.colours:.2f}, two photos of one person up to {limits.people:.3f} apart"
    ]
    rows = [[name, f"{word.temperature:.2f}", f"{word.floor:.3f}"] for name, word in reader.words.items()]
    return "\n".join([*lines, *(["", cards.table(["attribute", "temperature", "floor"], rows)] if rows else [])])
