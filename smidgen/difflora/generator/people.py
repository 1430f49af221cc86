"""People with their pictures as the generator trains on them: latents and captions for the base, features for itself.

What the base needs is read from files batch by batch; the features, some kilobytes a picture, are in memory.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.bases.transformers import fingerprint as weights_of
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.reading import moved as moved_photo
from smidgen.difflora.generator.shards import Shards
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import TABLE, Subject, make_subjects, read_pictures, read_subjects
from smidgen.errors import DataError
from smidgen.tasks.data.images import load_picture, to_tensor
from smidgen.tasks.diffusion.task import Encoded
from smidgen.training.processes import by_main, is_main
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
ENCODED = "encoded"  # the folder of what was computed, below the people's
CHUNK = 64  # pictures decoded at a time


@dataclass(frozen=True)
class Photos:
    """Features of people's pictures: ``face`` and ``image`` [picture, width], and whose they are.

    ``places[i]`` are the pictures of person i, ``usable[i]`` those of them with a face.
    """

    ids: tuple[str, ...]
    face: Tensor
    image: Tensor
    places: tuple[tuple[int, ...], ...]
    usable: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Features [n, photos, width] of equally many pictures for each person."""
        index = torch.tensor([list(pictures) for pictures in chosen])
        return {"face": self.face[index], "image": self.image[index]}


def photos_of(
    folder: Path,
    people: Sequence[Subject],
    face: PictureEncoder,
    image: PictureEncoder,
    resolution: int,
    progress: bool,
    cache: Path | None = None,
) -> Photos:
    """Features of everybody's pictures in the zoo or table in ``folder``; kept in the folder ``cache`` if there is one.

    Raises:
        DataError: nobody has a picture with a face.
    """
    pictures = _singly(people)

    def look(places: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"face": [], "image": []}
        for opened in _opened(folder, pictures[places.start : places.stop], resolution, bar):
            parts["face"].append(face.encode(opened))
            parts["image"].append(image.encode(opened))
        return {name: torch.cat(values) for name, values in parts.items()}

    if cache is None:
        with _bar(len(pictures), progress) as bar:
            found = look(range(len(pictures)))
        return _photos(people, found["face"], found["image"])
    digests = [digest for person in people for digest in person.digests]
    seen = Shards(cache, "photos", (face.name, image.name, resolution, digests), len(digests))
    with _bar(seen.missing(), progress) as bar:
        seen.fill(look)
    return _photos(people, seen.whole("face"), seen.whole("image"))


def _photos(people: Sequence[Subject], face: Tensor, image: Tensor) -> Photos:
    found = by_person([one.id for one in people], [len(one.pictures) for one in people], face, image)
    known = set(found.ids)
    faceless = [person.id for person in people if person.id not in known]
    if len(faceless) == len(people):
        raise DataError(f"No face was found in any picture of {len(people)} people, {faceless[0]!r} among them.")
    if faceless:
        logger.warning("%d people are left out: no face in any of their pictures (%s).", len(faceless), faceless[0])
    return found


def by_person(ids: Sequence[str], counts: Sequence[int], face: Tensor, image: Tensor) -> Photos:
    """Features of pictures that lie person after person, ``counts`` of each; whoever has no face in any is left out."""
    places, total = [], 0
    for count in counts:
        places.append(tuple(range(total, total + count)))
        total += count
    seen = ~(face.isnan().any(1) | image.isnan().any(1))
    usable = tuple(tuple(place for place in own if seen[place]) for own in places)
    kept = [number for number, own in enumerate(usable) if own]
    return Photos(
        tuple(ids[n] for n in kept),
        torch.nan_to_num(face),
        torch.nan_to_num(image),
        tuple(places[n] for n in kept),
        tuple(usable[n] for n in kept),
    )


def people_of(
    folder: Path, wanted: Subjects, base: ImageBase, face: PictureEncoder, image: PictureEncoder, progress: bool = True,
    moved: float = 0.0,
) -> tuple[Photos, Encoded]:  # fmt: skip
    """The people that ``wanted`` names, made or read in ``folder``: their photos, a share ``moved`` of them larger, smaller or off the
    middle, and the same pictures as they are encoded by the base. What was computed is kept in ``encoded/``, used again while it
    fits, and gone on with after a kill."""
    people = training_people(folder, wanted, base)
    pictures, texts = _singly(people), sorted({caption for person in people for caption in person.captions})
    seen, said = encoded_shards(folder, people, base, face, image, moved)

    def look(places: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "face": [], "image": []}
        first = places.start
        for opened in _opened(folder, pictures[places.start : places.stop], base.resolution, bar):
            mean, std = base.encode_images(to_tensor(opened), batch=16)
            shown = [_moved(photo, first + number, moved) for number, photo in enumerate(opened)]
            first += len(opened)
            for name, value in zip(parts, (mean, std, face.encode(shown), image.encode(shown)), strict=True):
                parts[name].append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    def read(places: range) -> dict[str, Tensor]:
        return dict(base.encode_prompts(texts[places.start : places.stop], batch=64).tensors)

    with _bar(seen.missing(), progress) as bar:
        seen.fill(look)
    said.fill(read)
    place = {text: number for number, text in enumerate(texts)}
    captions = [place[picture.captions[0]] for picture in pictures]
    prompts = Prompts({name: said.column(name, captions) for name in said.names()})
    names = tuple(f"{person.id} picture {n}" for person in people for n in range(len(person.pictures)))
    encoded = Encoded(seen.column("mean"), seen.column("std"), prompts, names)
    return _photos(people, seen.whole("face"), seen.whole("image")), encoded


def training_people(folder: Path, wanted: Subjects, base: ImageBase) -> list[Subject]:
    """Those to train on in ``folder``, made there first when there are none."""
    by_main(lambda: (folder / TABLE).exists() or make_subjects(folder, wanted, getattr(base, "drawn", None)))
    return [person for person in read_subjects(folder) if person.split == "train"]


def _moved(photo: Image, number: int, share: float) -> Image:
    """A share of photos in another framing; which and how follows from their numbers."""
    rng = numpy.random.default_rng(derive(0, "moved", number))
    return moved_photo(photo, rng) if rng.random() < share else photo


def encoded_shards(
    folder: Path, people: Sequence[Subject], base: ImageBase, face: PictureEncoder, image: PictureEncoder, moved: float = 0.0
) -> tuple[Shards, Shards]:  # fmt: skip
    """Where the encoded pictures and the encoded captions (each once) of ``people`` are or will be."""
    texts = sorted({caption for person in people for caption in person.captions})
    digests = [digest for person in people for digest in person.digests]
    weights = {name: weights_of(part) for name, part in base.encoders.items()}
    sees = [weights.pop("vae"), base.resolution, face.name, image.name, *([moved] if moved else [])]
    reads = [str(base.model.dtype), *weights.values()]
    return (
        Shards(folder / ENCODED, "pictures", (sees, digests), len(digests)),
        Shards(folder / ENCODED, "captions", (reads, texts), len(texts)),
    )


def _singly(people: Sequence[Subject]) -> list[Subject]:
    """A subject for each picture of each person."""
    return [
        replace(person, pictures=(picture,), captions=(caption,), digests=(digest,))
        for person in people
        for picture, caption, digest in zip(person.pictures, person.captions, person.digests, strict=True)
    ]


def _opened(folder: Path, pictures: Sequence[Subject], resolution: int, bar: Any) -> Iterator[list[Image]]:
    """The pictures in order, at most CHUNK at a time."""
    for start in range(0, len(pictures), CHUNK):
        part = pictures[start : start + CHUNK]
        yield [load_picture(io.BytesIO(read_pictures(folder, one)[0]), resolution) for one in part]
        bar.update(len(part))


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    hidden = not (progress and total and is_main())
    return tqdm(total=total, desc="pictures", unit="picture", disable=hidden, dynamic_ncols=True)
