"""Dropped pictures: what is wrong with each, said at once, and the good ones kept in a run's folder."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from smidgen.errors import DataError
from smidgen.tasks.data.listing import CAPTIONS, TABLES
from smidgen.tasks.data.pixels import ODD, decode, fit, kept_by_crop

GOOD, NOTE, BAD, TEXT = "good", "note", "bad", "text"  # used; used, with a remark; left out; words about pictures
FEW = 4  # pictures: fewer show a subject from too few sides to train on
THUMB = 96  # pixels
GREY = 6  # of 255 levels: channels that differ by less everywhere are no colour
CUT = 0.5  # of a picture that its centre square must keep


@dataclass(frozen=True)
class Finding:
    """What was found of one dropped file: the verdict, the words, and a small picture as a data URL."""

    path: Path
    name: str
    verdict: str
    words: str
    thumb: str = ""

    @property
    def used(self) -> bool:
        return self.verdict in (GOOD, NOTE)


def look(paths: Sequence[Path], resolution: int = 0) -> list[Finding]:
    """What is wrong with each of ``paths``; ``resolution`` is what the base draws (0: unknown)."""
    found: list[Finding] = []
    first: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() in CAPTIONS or path.name.lower() in TABLES:
            found.append(Finding(path, path.name, TEXT, "Words about the pictures, which will be used."))
            continue
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            decoded = decode(path)
        except (DataError, OSError) as error:
            found.append(Finding(path, path.name, BAD, f"Left out: {error}."))
            continue
        thumb = _thumb(decoded.image)
        twin = first.setdefault(digest, path)
        if twin != path:
            found.append(Finding(path, path.name, BAD, f"Left out: a copy of {twin.name}.", thumb))
            continue
        nothing = [odd for odd in ("transparent", "flat") if odd in decoded.odd]
        if nothing:
            why = "it is transparent throughout" if nothing[0] == "transparent" else "it is one colour throughout"
            found.append(Finding(path, path.name, BAD, f"Left out: {why}.", thumb))
            continue
        remarks = [*_remarks(decoded.image, decoded.odd, resolution)]
        found.append(
            Finding(path, path.name, NOTE if remarks else GOOD, " ".join(remarks) or _size(decoded.image), thumb)
        )
    return found


def summary(found: Sequence[Finding]) -> tuple[str, str]:
    """(verdict, sentence) about all of them: what can be done with so many."""
    used, left = sum(one.used for one in found), sum(one.verdict == BAD for one in found)
    out = f" {left} left out, for the reasons below." if left else ""
    if not used:
        return BAD, f"None of these can be used. Drop pictures as PNG, JPEG or WebP, 16 pixels or more on a side.{out}"
    if used == 1:
        return NOTE, f"One picture: enough to predict. To train, add some more; five to twenty are good.{out}"
    if used < FEW:
        return NOTE, f"{used} pictures: enough to predict, few to train on. Five to twenty are good.{out}"
    return (NOTE if left else GOOD), f"{used} pictures, ready to use.{out}"


def keep(found: Iterable[Finding], folder: Path) -> list[Path]:
    """Copy what is used, and the words about it, into ``folder``; returns the pictures there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for one in found:
        if one.verdict == BAD:
            continue
        place = _free(folder / one.name)
        shutil.copyfile(one.path, place)
        if one.used:
            kept.append(place)
    return kept


def _free(place: Path) -> Path:
    """A name that no file has yet: pictures from two cameras may share theirs."""
    number = 2
    found = place
    while found.exists():
        found, number = place.with_stem(f"{place.stem}-{number}"), number + 1
    return found


def _remarks(image: Image.Image, odd: frozenset[str], resolution: int) -> Iterable[str]:
    if min(image.size) < resolution:
        yield f"{_size(image)[:-1]}, fewer than the base's {resolution}: it will be enlarged and look soft."
    if kept_by_crop(image.size) < CUT:
        yield f"{_size(image)[:-1]}: the square in its centre keeps {kept_by_crop(image.size):.0%} of it."
    if _is_grey(image):
        yield "No colour in it: what is learnt will be grey too."
    for name in ("animated", "profile"):
        if name in odd:
            yield f"A picture {ODD[name]}."


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.split()
    apart = [ImageChops.difference(red, green), ImageChops.difference(green, blue)]
    return all(difference.getextrema()[1] < GREY for difference in apart)  # type: ignore[operator]


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels."


def _thumb(image: Image.Image) -> str:
    small, stream = fit(image, THUMB), io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
