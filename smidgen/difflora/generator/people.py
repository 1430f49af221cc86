"""People with their pictures as the generator trains on them: latents and captions for the base, features for itself."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import TABLE, Subject, make_subjects, read_pictures, read_subjects
from smidgen.errors import DataError
from smidgen.training.checkpoints import replace_file
from smidgen.training.images import load_picture, to_tensor
from smidgen.training.pipelines import Base, encode_pictures, encode_prompts, fingerprint, time_ids
from smidgen.training.tasks.personalize import Encoded

logger = logging.getLogger(__name__)
CACHE = "people.safetensors"
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
) -> Photos:
    """Features of everybody's pictures in the zoo or table in ``folder``.

    Raises:
        DataError: nobody has a picture with a face.
    """
    faces, images, places = [], [], []
    total = 0
    for contents in _chunks(folder, people, progress):
        pictures = [load_picture(io.BytesIO(content), resolution) for content in contents]
        faces.append(face.encode(pictures))
        images.append(image.encode(pictures))
    for person in people:
        places.append(tuple(range(total, total + len(person.pictures))))
        total += len(person.pictures)
    return _photos([person.id for person in people], torch.cat(faces), torch.cat(images), places)


def _photos(ids: Sequence[str], face: Tensor, image: Tensor, places: Sequence[tuple[int, ...]]) -> Photos:
    seen = ~(face.isnan().any(1) | image.isnan().any(1))
    usable = tuple(tuple(place for place in own if seen[place]) for own in places)
    faceless = [name for name, own in zip(ids, usable, strict=True) if not own]
    if len(faceless) == len(ids):
        raise DataError(f"No face was found in any picture of {len(ids)} people, {ids[0]!r} among them.")
    if faceless:
        logger.warning("%d people are left out: no face in any of their pictures (%s).", len(faceless), faceless[0])
    kept = [number for number, own in enumerate(usable) if own]
    return Photos(
        tuple(ids[n] for n in kept),
        torch.nan_to_num(face),
        torch.nan_to_num(image),
        tuple(tuple(places[n]) for n in kept),
        tuple(usable[n] for n in kept),
    )


def people_of(
    folder: Path, wanted: Subjects, base: Base, face: PictureEncoder, image: PictureEncoder, progress: bool = True
) -> tuple[Photos, Encoded]:
    """The people that ``wanted`` names, made or read in ``folder``: their photos, and the same pictures encoded by the
    base. What was computed is kept in ``people.safetensors`` and used again while it fits."""
    if not (folder / TABLE).exists():
        make_subjects(folder, wanted)
    people = [person for person in read_subjects(folder) if person.split == "train"]
    asked = _asked(people, base, face, image)
    found = _cached(folder / CACHE, asked)
    if found is None:
        found = _computed(folder, people, base, face, image, progress)
        replace_file(folder / CACHE, save(found, metadata={"asked": asked}))
    captions = [caption for person in people for caption in person.captions]
    names = tuple(f"{person.id} picture {n}" for person in people for n in range(len(person.pictures)))
    ids = torch.stack([time_ids((base.resolution, base.resolution), base.resolution)] * len(names))
    encoded = Encoded(
        found["mean"].float(), found["std"].float(), encode_prompts(base, captions, batch=64),
        ids if base.family == "sdxl" else None, names,
    )  # fmt: skip
    total, places = 0, []
    for person in people:
        places.append(tuple(range(total, total + len(person.pictures))))
        total += len(person.pictures)
    return _photos([person.id for person in people], found["face"], found["image"], places), encoded


def _computed(
    folder: Path, people: Sequence[Subject], base: Base, face: PictureEncoder, image: PictureEncoder, progress: bool
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "face": [], "image": []}
    for contents in _chunks(folder, people, progress):
        pictures = [load_picture(io.BytesIO(content), base.resolution) for content in contents]
        mean, std = encode_pictures(base, to_tensor(pictures), batch=16)
        parts["mean"].append(mean)
        parts["std"].append(std)
        parts["face"].append(face.encode(pictures))
        parts["image"].append(image.encode(pictures))
    return {name: torch.cat(values) for name, values in parts.items()}


def _chunks(folder: Path, people: Sequence[Subject], progress: bool):  # type: ignore[no-untyped-def]
    """The files of all pictures in order, at most CHUNK at a time."""
    from tqdm.auto import tqdm

    total, waiting = sum(len(person.pictures) for person in people), []
    with tqdm(total=total, desc="pictures", unit="picture", disable=not progress, dynamic_ncols=True) as bar:
        for number, person in enumerate(people):
            waiting += read_pictures(folder, person)
            while len(waiting) >= CHUNK or (waiting and number == len(people) - 1):
                yield waiting[:CHUNK]
                bar.update(len(waiting[:CHUNK]))
                waiting = waiting[CHUNK:]


def _asked(people: Sequence[Subject], base: Base, face: PictureEncoder, image: PictureEncoder) -> str:
    told = [fingerprint(base), face.name, image.name, [person.digests for person in people]]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _cached(path: Path, asked: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("asked") == asked:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass
    return None
