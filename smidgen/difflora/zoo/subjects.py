"""The subjects table: who is in a zoo, with which pictures, and on which side of the split. One row a person.

    subjects.parquet   id, split, pictures, captions, digests, attributes, consent, licence

Everything of one person is on one side: a split over files would put checkpoints or pictures of one face on both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import world
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.tables import read_parquet, to_parquet
from smidgen.errors import DataError
from smidgen.training.randomness import derive

TABLE = "subjects.parquet"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A person: pictures as paths (inside the zoo's folder if relative) with captions and SHA-256 digests."""

    id: str
    split: str
    pictures: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict, hash=False)
    consent: str = ""
    licence: str = ""


def make_subjects(out: Path, wanted: Subjects, drawn: ModuleType | None = None) -> list[Subject]:
    """Writes the table (and the pictures of invented people) into ``out``; returns the people in its order. ``drawn`` is the world
    that people are invented in (None: the embedded one)."""
    found = _invented(out, wanted, drawn or world) if wanted.folder is None else _from_folder(wanted.folder, wanted)
    if not any(person.split == "train" for person in found):
        raise DataError(f"All {len(found)} people are held out; lower held_out_share or add people.")
    replace_file(out / TABLE, to_parquet(found))
    return found


def read_subjects(out: Path) -> list[Subject]:
    """The people of the zoo in ``out``, in the order of its table; DataError when it is damaged or has other columns."""
    columns = read_parquet(out / TABLE)
    known = set(Subject.__dataclass_fields__)
    if set(columns) != known:
        raise DataError(f"{out / TABLE} has columns {sorted(columns)}, a table of subjects has {sorted(known)}.")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    lists = ("pictures", "captions", "digests")
    return [
        Subject(**(row | {name: tuple(row[name]) for name in lists} | {"attributes": dict(row["attributes"])}))
        for row in rows
    ]


def read_pictures(out: Path, person: Subject) -> list[bytes]:
    """The files of a person's pictures; DataError when one is gone or has changed since the table was made."""
    contents = []
    for name, digest in zip(person.pictures, person.digests, strict=True):
        try:
            content = (out / name).read_bytes()
        except OSError as error:
            raise DataError(f"The picture {out / name} of {person.id!r} cannot be read ({error.strerror}).") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError(
                f"The picture {out / name} of {person.id!r} has changed since {TABLE} was made; put it back."
            )
        contents.append(content)
    return contents


def hashed_split(name: str, share: float) -> str:
    """ "test" for a share of names, decided by a hash of the name alone.

    Example:
        >>> hashed_split("ann", 0.0)
        'train'
    """
    digest = hashlib.sha256(name.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"


def _invented(out: Path, wanted: Subjects, drawn: ModuleType) -> list[Subject]:
    import numpy

    found: list[Subject] = []
    for split, count in (("train", wanted.people), ("test", wanted.held_out)):
        rng = numpy.random.default_rng(derive(wanted.people_seed, "people", split))
        seen: set[Any] = set()
        there = sum(1 for _ in drawn.identities(split)) if hasattr(drawn, "identities") else count
        if count > there:
            raise DataError(f"The embedded world has {there} people for {split!r}, {count} are asked for.")
        while len(seen) < count:
            identity = drawn.sample_identity(rng, split=split)
            if identity in seen:
                continue
            seen.add(identity)
            name = f"{split}-{len(seen) - 1:05d}"
            found.append(_drawn(out, name, split, identity, wanted, drawn))
    return found


def _drawn(out: Path, name: str, split: str, identity: Any, wanted: Subjects, drawn: ModuleType) -> Subject:
    seed = derive(wanted.people_seed, "scenes") if wanted.same_scenes else derive(wanted.people_seed, "scenes", name)
    folder = Path("pictures") / name
    scenes = drawn.write_subject(out / folder, identity, wanted.pictures, seed)
    pictures = tuple(str(folder / f"{number:03d}.png") for number in range(wanted.pictures))
    return Subject(
        id=name,
        split=split,
        pictures=pictures,
        captions=tuple(drawn.caption(scene) for scene in scenes),
        digests=tuple(hashlib.sha256((out / path).read_bytes()).hexdigest() for path in pictures),
        attributes=identity.as_dict(),
        consent="an invented person",
        licence=drawn.LICENCE,
    )


def _from_folder(folder: Path, wanted: Subjects) -> list[Subject]:
    from smidgen.tasks.data import images

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a folder of people holds one folder of pictures for each.")
    people = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not people:
        raise DataError(f"{folder} holds no folders; it must hold one folder of pictures for each person.")
    found = []
    for path in people:
        read = images.read_folder(path, wanted.instance_prompt)
        kept = read.pictures
        for warning in read.warnings:
            logger.warning("%s: %s", path.name, warning)
        found.append(
            Subject(
                id=path.name,
                split=hashed_split(path.name, wanted.held_out_share),
                pictures=tuple(str(picture.path.resolve()) for picture in kept),
                captions=tuple(picture.caption for picture in kept),
                digests=tuple(picture.digest for picture in kept),
                consent=wanted.consent,
                licence=wanted.licence,
            )
        )
    _check_owners(found)
    return found


def _check_owners(people: Sequence[Subject]) -> None:
    """No picture under two names, which would let one face into both splits."""
    owner: dict[str, str] = {}
    for person in people:
        for digest, picture in zip(person.digests, person.pictures, strict=True):
            other = owner.setdefault(digest, person.id)
            if other != person.id:
                raise DataError(
                    f"{picture} of {person.id!r} is byte for byte a picture of {other!r}: one person under two names "
                    "would be on both sides of the split. Merge their folders or remove the copy."
                )
