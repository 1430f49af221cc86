"""Who is audited: held-out people of a zoo with the photos that contenders see and the pictures that judge them; and the
training people whose adapters the simple contenders are made of."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.people import Photos, photos_of
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import TABLE, Subject, read_pictures, read_subjects
from smidgen.errors import DataError
from smidgen.tasks.data.images import load_picture

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sitter:
    """A held-out person: all pictures with captions, of which the first ``shown`` are what contenders see."""

    id: str
    pictures: tuple[Image, ...]
    files: tuple[bytes, ...]
    captions: tuple[str, ...]
    shown: int

    @property
    def photos(self) -> list[Image]:
        return list(self.pictures[: self.shown])

    @property
    def others(self) -> list[Image]:
        """What identity is judged against."""
        return list(self.pictures[self.shown :])


def sitters(zoo: Zoo, count: int, photos: int, resolution: int) -> list[Sitter]:
    """The first ``count`` held-out people with a kept adapter.

    Raises:
        DataError: there is none, a picture is gone, or somebody has no more pictures than ``photos``.
    """
    lines = zoo.rows("test").ids
    if len(lines) < count:
        logger.warning("%s holds %d held-out people, not %d: all are taken.", zoo.folder, len(lines), count)
    known = subjects(zoo)
    found = []
    for name in lines[:count]:
        person = known[name]
        if len(person.pictures) <= photos:
            raise DataError(
                f"{name!r} in {zoo.folder} has {len(person.pictures)} pictures: {photos} to show leave none to judge by. "
                "Lower --photos, or build the zoo with more pictures."
            )
        files = read_pictures(zoo.folder, person)
        pictures = tuple(load_picture(io.BytesIO(content), resolution) for content in files)
        found.append(Sitter(name, pictures, tuple(files), person.captions, photos))
    return found


def subjects(zoo: Zoo) -> dict[str, Subject]:
    """Everybody in the zoo by name; DataError when it was imported without pictures."""
    if not (zoo.folder / TABLE).exists():
        raise DataError(f"{zoo.folder} has no {TABLE}: it was imported, and without pictures nobody can be judged.")
    return {person.id: person for person in read_subjects(zoo.folder)}


def training_photos(
    zoo: Zoo,
    ids: Sequence[str],
    seen: tuple[PictureEncoder, PictureEncoder],
    resolution: int,
    cache: Path,
    progress: bool,
) -> Photos:
    """Features of the training people's pictures; computed once and kept in the folder ``cache``."""
    known = subjects(zoo)
    return photos_of(zoo.folder, [known[name] for name in ids], *seen, resolution, progress, cache)
