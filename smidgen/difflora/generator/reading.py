"""What a generator can tell of a photo before it is believed: whether it is of the kind that the generator learnt from, the
framing at which it is read best, which words its encoders read there and how surely, and whether photos show one person.

Two measures, each with a limit that a stated share of held-out people's photos stays under:

features   Mahalanobis distance of both encoders' features from those of training photos (Lee et al. 2018, arXiv 1807.03888)
colours    mean of -log p(colour | place) over a sixteenth of the photo, the worst one: what no training photo has there

Words are read at a temperature for each attribute (Guo et al. 2017, arXiv 1706.04599), and have a floor, below which too few of
the held-out ones were right. Free colours, where the encoder reads such, are told with how far off they may be. ``reading.safetensors`` lies beside the generator; ``smidgen generator calibrate`` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded.colors import hexadecimal, lab
from smidgen.difflora.generator.generator import Generator
from smidgen.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "reading.safetensors"
SIDE, LEVELS, PLACES, WINDOW = (
    64,
    16,
    4,
    16,
)  # pixels a side, levels of a channel, places a side, pixels of a window's side
VAGUE, APART = 25.0, 10.0  # in Lab: a colour that may be further off is not read; from here on two are different ones
ROUNDS, ZOOM, SHIFT = 4, 1.15, 0.1  # of the search for a framing: steps are halved in each round


@dataclass(frozen=True)
class Framing:
    """A square of the photo, ``1 / zoom`` of its side, ``right`` and ``down`` of its middle in shares of the side."""

    zoom: float = 1.0
    right: float = 0.0
    down: float = 0.0

    def __str__(self) -> str:
        places = (("right", "left", self.right), ("down", "up", self.down))
        moved = [f"{abs(value):.0%} further {word if value > 0 else other}" for word, other, value in places if value]
        return ", ".join([f"{self.zoom:.2f} times as large", *moved])

    def around(self, zoom: float, shift: float) -> Iterator[Framing]:
        """Its 26 neighbours in steps of that size, and itself."""
        for z, right, down in product((1 / zoom, 1, zoom), (-shift, 0, shift), (-shift, 0, shift)):
            yield Framing(self.zoom * z, self.right + right, self.down + down)

    def of(self, image: Image.Image) -> Image.Image:
        """What it shows of a square image, in the image's size; beyond the edge the edge goes on."""
        if self == Framing():
            return image
        side = image.width
        pad = side // 2
        wide = Image.fromarray(numpy.pad(numpy.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
        half, right, down = side / self.zoom / 2, pad + (0.5 + self.right) * side, pad + (0.5 + self.down) * side
        box = (right - half, down - half, right + half, down + half)
        return wide.resize((side, side), Image.Resampling.BICUBIC, box)


def moved(image: Image.Image, rng: numpy.random.Generator) -> Image.Image:
    """The image from 0.8 to 1.25 times its size, and a tenth of it to each side at most."""
    return Framing(float(numpy.exp(rng.uniform(-0.223, 0.223))), *rng.uniform(-0.1, 0.1, 2).tolist()).of(image)


@dataclass(frozen=True)
class Word:
    """How an attribute is read: log-probabilities are divided by ``temperature``; below ``floor`` a reading is not to be relied
    on."""

    temperature: float = 1.0
    floor: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What held-out photos stay under: both distances, and how far the latents of two photos of one person are apart. Above
    ``search``, which nine in ten stay under, another framing is tried."""

    features: float
    colours: float
    people: float
    search: float


@dataclass(frozen=True)
class Seen:
    """A photo as it is read: its distances, where its colours are strangest, and attribute -> (word, how surely, 0 to 1)."""

    image: Image.Image
    framing: Framing
    features: float
    colours: float
    place: str
    words: dict[str, tuple[str, float]]
    shades: dict[str, tuple[str, float]] = field(
        default_factory=dict
    )  # attribute -> ("#rrggbb", how far off in Lab it may be)

    @property
    def told(self) -> list[str]:
        """What was read, for people."""
        words = [f"{name.replace('_', ' ')} {word} {sure:.2f}" for name, (word, sure) in self.words.items()]
        return words + [f"{name.replace('_', ' ')} {shade} ± {off:.0f}" for name, (shade, off) in self.shades.items()]

    @property
    def facts(self) -> dict[str, Any]:
        """For a recipe."""
        words = {name: [word, round(sure, 3)] for name, (word, sure) in self.words.items()}
        words |= {name: [shade, round(off, 1)] for name, (shade, off) in self.shades.items()}
        framing = {} if self.framing == Framing() else {"framing": asdict(self.framing)}
        return {"words": words, "features": round(self.features, 2), "colours": round(self.colours, 2)} | framing


@dataclass(frozen=True)
class Reader:
    """What was learnt from photos of training people and of held-out ones.

    Attributes:
        mean, whiten: of the features of training photos, [size] and [size, size]: (x - mean) whiten has variance one.
        surprise: -log p of each colour in each place [PLACES^2, LEVELS^3].
        quantile: share of held-out photos that stays under each limit.
        words: of each attribute that the encoders read.
        shades: of each free colour, what the encoder's deviation is multiplied with so that it is the distance in Lab (root mean
            square) of held-out ones.
    """

    mean: Tensor
    whiten: Tensor
    surprise: Tensor
    limits: Limits
    quantile: float
    words: Mapping[str, Word] = field(default_factory=dict)
    shades: Mapping[str, float] = field(default_factory=dict)

    def features(self, generator: Generator, images: Sequence[Image.Image]) -> Tensor:
        """Distances [n] of the encoders' features; infinite where no face is found."""
        seen = features_of(generator, images)
        return torch.nan_to_num(((seen - self.mean) @ self.whiten).norm(dim=1), nan=float("inf"))

    def colours(self, image: Image.Image) -> tuple[float, str]:
        """How strange the colours of the strangest window are, and where it is."""
        strange = self.surprise.flatten()[colour_places(image)]
        windows = torch.nn.functional.avg_pool2d(strange[None], WINDOW, WINDOW // 2)[0]
        row = int(windows.amax(1).argmax())
        where = ("at the top", "in the middle", "at the bottom")[3 * row // len(windows)]
        return float(windows.max()), where

    def look(self, generator: Generator, image: Image.Image) -> Seen:
        """A square image of the base's size as it is read: as it is, or where that is unusual in the framing that is most like
        training photos."""
        framing, distance = Framing(), float(self.features(generator, [image])[0])
        zoom, shift = ZOOM, SHIFT
        for _ in range(ROUNDS if distance > self.limits.search else 0):
            near = list(framing.around(zoom, shift))
            found = self.features(generator, [one.of(image) for one in near])
            if found.min() < distance:
                framing, distance = near[int(found.argmin())], float(found.min())
            zoom, shift = zoom**0.5, shift / 2
        shown = framing.of(image)
        words, shades = self.read(generator, shown), self.shades_of(generator, shown)
        return Seen(shown, framing, distance, *self.colours(shown), words, shades)

    def read(self, generator: Generator, image: Image.Image) -> dict[str, tuple[str, float]]:
        """Attribute -> (word, how surely), where the encoders read words."""
        if not self.words:
            return {}
        found = {}
        for name, (known, shares) in words_of(generator, [image]).items():
            if name in self.words:
                sure = tempered(shares[0], self.words[name].temperature)
                found[name] = known[int(sure.argmax())], float(sure.max())
        return found

    def shades_of(self, generator: Generator, image: Image.Image) -> dict[str, tuple[str, float]]:
        """Attribute -> (colour, how far off in Lab it may be), where the face encoder reads free colours."""
        if not self.shades:
            return {}
        read: Any = generator.face
        found = read.colors([image]).items()
        return {name: (hexadecimal(seen[0].numpy()), float(off[0]) * self.shades[name]) for name, (seen, off) in found}

    def refusal(self, seen: Seen) -> str:
        """Why a photo is not to be believed; "" if it is."""
        limits, held = self.limits, f"{self.quantile:.1%} of held-out photos have at most"
        found = []
        if seen.features > limits.features:
            found.append(
                f"what its encoders see is like no photo that it learnt from ({seen.features:.1f}; {held} {limits.features:.1f})"
            )
        if seen.colours > limits.colours:
            found.append(
                f"no photo that it learnt from has such colours {seen.place} ({seen.colours:.1f}; {held} {limits.colours:.1f})"
            )
        return ", and ".join(found)

    def unsure(self, seen: Seen) -> list[str]:
        """The words that are read below their floor."""
        return [
            f"{name.replace('_', ' ')} {word} ({_below(sure, self.words[name].floor)})"
            for name, (word, sure) in seen.words.items()
            if sure < self.words[name].floor
        ] + [
            f"{name.replace('_', ' ')} {shade} (off by {off:.0f} in Lab, more than {VAGUE:.0f})"
            for name, (shade, off) in seen.shades.items()
            if off > VAGUE
        ]

    def unusual(self, seen: Seen) -> bool:
        """Whether it is accepted, but further from training photos than nearly all held-out ones, in its best framing."""
        return self.limits.search < seen.features <= self.limits.features

    def two_people(self, generator: Generator, seen: Sequence[Seen]) -> tuple[int, int] | None:
        """Which two of some photos show different people: a word is surely read as another, or their latents are further apart than
        those of one person and not all words are the same. None if no two do."""
        latents = latents_alone(generator, [one.image for one in seen])
        far = torch.cdist(latents, latents) > self.limits.people
        for one, other in combinations(range(len(seen)), 2):
            pairs = {name: (seen[one].words[name], seen[other].words[name]) for name in seen[one].words}
            differ = [name for name, (a, b) in pairs.items() if a[0] != b[0]]
            words = [name for name in differ if min(sure for _, sure in pairs[name]) >= self.words[name].floor]
            shades = [(a, seen[other].shades[name]) for name, a in seen[one].shades.items()]
            surely = bool(words) or any(_other_shade(*pair) for pair in shades)
            if surely or (far[one, other] and (differ or not pairs)):
                return one, other
        return None


def _below(sure: float, floor: float) -> str:
    """The two with as many digits as tell them apart."""
    digits = next(n for n in (2, 3, 4) if n == 4 or f"{sure:.{n}f}" != f"{floor:.{n}f}")
    return f"{sure:.{digits}f}, below {floor:.{digits}f}"


def _other_shade(one: tuple[str, float], other: tuple[str, float]) -> bool:
    """Whether two readings are of different colours, even as far off as they may be."""
    apart = float(numpy.linalg.norm(lab(one[0]) - lab(other[0])))
    return max(one[1], other[1]) <= VAGUE and apart > APART + 2 * (one[1] + other[1])


def features_of(generator: Generator, images: Sequence[Image.Image]) -> Tensor:
    """Both encoders' features [n, size]."""
    return torch.cat([generator.face.encode(images), generator.image.encode(images)], 1)


def words_of(generator: Generator, images: Sequence[Image.Image]) -> dict[str, tuple[list[str], Tensor]]:
    """Attribute -> its words and how likely each is in each image [n, words], of the attributes that the face encoder reads: the mean
    over both encoders, where the other reads it too (an ensemble, Lakshminarayanan et al. 2017, arXiv 1612.01474)."""
    read: list[Any] = [one.read(images) for one in (generator.face, generator.image) if hasattr(one, "read")]
    if not hasattr(generator.face, "read"):
        return {}
    found = {}
    for name, first in read[0].items():
        shares = [torch.stack([own[name][word] for word in first], -1) for own in read if name in own]
        found[name] = list(first), torch.stack(shares).mean(0)
    return found


@torch.no_grad()
def latents_alone(generator: Generator, photos: Sequence[Image.Image]) -> Tensor:
    """The latents [n, size] of each photo by itself; NaN where no face is found."""
    face, image = generator.face.encode(photos), generator.image.encode(photos)
    condition = generator.network.mixing(face[:, None], image[:, None])
    return generator.latents(condition, [0] * len(photos))


def tempered(shares: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., words] as they are at a temperature."""
    return (shares.clamp(min=1e-12).log() / temperature).softmax(-1)


def colour_places(image: Image.Image) -> Tensor:
    """For each pixel [SIDE, SIDE] its colour in its place, as a number below PLACES^2 LEVELS^3."""
    pixels = torch.from_numpy(numpy.array(image.convert("RGB").resize((SIDE, SIDE)), numpy.int64)) * LEVELS // 256
    colour = (pixels[..., 0] * LEVELS + pixels[..., 1]) * LEVELS + pixels[..., 2]
    at = torch.arange(SIDE) * PLACES // SIDE
    return (at[:, None] * PLACES + at) * LEVELS**3 + colour


def save_reader(reader: Reader, folder: Path, generator: Generator) -> Path:
    """Writes ``reading.safetensors`` beside the generator; returns its path."""
    words = {name: asdict(word) for name, word in reader.words.items()}
    told = {"limits": asdict(reader.limits), "quantile": reader.quantile, "words": words}
    told |= {"shades": dict(reader.shades)} if reader.shades else {}
    tensors = {"mean": reader.mean, "whiten": reader.whiten.half(), "surprise": reader.surprise.half()}
    about = {"generator": generator.digest, "reading": json.dumps(told)}
    replace_file(folder / FILE, save({n: t.contiguous() for n, t in tensors.items()}, metadata=about))
    return folder / FILE


def load_reader(folder: Path, generator: Generator) -> Reader | None:
    """What lies beside the generator in ``folder``; None if there is nothing.

    Raises:
        DataError: it is damaged, or another generator's.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    again = f"`smidgen generator calibrate {folder} --people FOLDER` makes it."
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        told = json.loads(about["reading"])
        words = {name: Word(**word) for name, word in told["words"].items()}
        limits, shades = Limits(**told["limits"]), told.get("shades", {})
        reader = Reader(**tensors, limits=limits, quantile=told["quantile"], words=words, shades=shades)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). {again}") from error
    if about.get("generator") != generator.digest:
        raise DataError(f"{path} was made for another generator than the one in {folder}. {again}")
    return reader
