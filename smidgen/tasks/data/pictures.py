"""Labelled pictures: class folders (``train/cat/1.png`` or ``cat/1.png``) or metadata with file_name and label.

A broken picture is left out and named; what cannot be learnt from is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from smidgen.errors import DataError
from smidgen.tasks.data import images, splits
from smidgen.tasks.data.labels import Label, Labels, classes_of, gathered, is_missing, lacking, read_labels
from smidgen.tasks.data.listing import Listing, list_folder, masks_of_classes
from smidgen.tasks.data.metadata import read_entries, repeated
from smidgen.tasks.data.pixels import Decoded, decode, fit, known_endings, upright
from smidgen.tasks.data.tables import Row, column, counted, split_of

SMALLEST = 8  # pixels on the shorter side


@dataclass(frozen=True)
class LabelledPicture:
    """One picture: its file, its class number or those that hold, and the digest of its pixels as the model will see
    them."""

    path: Path
    label: Label
    digest: str
    where: str


@dataclass(frozen=True)
class Pictures:
    """Pictures by split, the classes' names in order, and warnings. ``pixels`` gives one as [3, height, width] uint8."""

    splits: dict[str, list[LabelledPicture]]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    pixels: Callable[[LabelledPicture], Tensor]
    several: bool = False  # whether more than one class may hold for a picture


def read_pictures(
    folder: Path, label_column: str, resolution: int, held_out: float, most: int | None = None, memory: int = 1 << 30
) -> Pictures:
    """Read, check and split the pictures in ``folder``, each scaled and centre-cropped to ``resolution``.

    Pixels stay in memory when all of them take at most ``memory`` bytes, else each is read again when needed. Raises
    DataError for a folder without usable pictures, one class only, or a label that train does not know.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of pictures.")
    warnings: list[str] = []
    listed = _listed(folder, label_column, warnings)
    if not any(listed.values()):
        raise DataError(
            f"{folder} holds no labelled pictures: class folders (cat/1.png or train/cat/1.png), or metadata.csv with "
            f"file_name and {label_column}. Known endings are {', '.join(sorted(known_endings()))}. {' '.join(warnings)}".rstrip()
        )
    if not listed.get("train"):
        raise DataError(f"{folder} has no train split; it has {', '.join(listed)}.")
    known = _labels(folder, listed, label_column)
    warnings += known.warnings
    total = sum(map(len, listed.values()))
    kept: dict[Path, Tensor] | None = {} if total * 3 * resolution**2 <= memory else None
    found = {
        split: _open(pairs, known.values[split], split, folder, resolution, kept, warnings)
        for split, pairs in listed.items()
        if pairs
    }
    warnings += splits.contradictions(
        found["train"], lambda picture: picture.digest, "train picture", "that has another label elsewhere"
    )
    complete = splits.complete(
        found, lambda picture: picture.digest, held_out, most, lambda picture: classes_of(picture.label)
    )
    warnings += splits.leaks(complete, lambda picture: picture.digest, lambda picture: picture.where)
    if len({picture.label for picture in complete["train"]}) < 2:
        raise DataError(
            f"Train has pictures of one class only, of {len(known.names)}. Give more, or validation and test."
        )
    warnings += lacking({split: [one.label for one in some] for split, some in complete.items()}, known.names)

    def pixels(picture: LabelledPicture) -> Tensor:
        return read_pixels(picture.path, resolution) if kept is None else kept[picture.path]

    return Pictures(complete, known.names, tuple(warnings), pixels, known.several)


def read_pixels(source: Path | IO[bytes] | Image.Image, resolution: int) -> Tensor:
    """One picture as the models of image classification see it, [3, resolution, resolution] bytes; DataError when it has none."""
    opened = isinstance(source, Image.Image)
    return _tensor(Decoded(upright(source)) if opened else decode(source, SMALLEST), resolution)  # type: ignore[arg-type]


def count_labels(pictures: Sequence[LabelledPicture], labels: Sequence[str]) -> Mapping[str, int]:
    """How many pictures each class has."""
    found = [at for picture in pictures for at in classes_of(picture.label)]
    return {label: found.count(at) for at, label in enumerate(labels)}


def _listed(folder: Path, label_column: str, warnings: list[str]) -> dict[str, list[tuple[Path, Any]]]:
    """(file, label as it is written) by split."""
    found = list_folder(folder)
    if any(table.parent == folder for table in found.tables):
        return {"train": _told(found, _from_metadata(found, folder, label_column, warnings), warnings)}
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    named = [path for path in inner if split_of(path.name)]
    if not any(split_of(path.name) == "train" for path in named):
        return {"train": _told(found, _from_class_folders(found, folder, warnings), warnings)}
    strange = [path.name for path in inner if path not in named]
    if strange:
        warnings.append(counted("folder", strange, "beside the splits and left out"))
    pairs: dict[str, list[tuple[Path, Any]]] = {}
    for path in named:
        tabled = any(table.parent == path for table in found.tables)
        read = (
            _from_metadata(found, path, label_column, warnings)
            if tabled
            else _from_class_folders(found, path, warnings)
        )
        pairs.setdefault(split_of(path.name), []).extend(read)
    _told(found, [pair for some in pairs.values() for pair in some], warnings)
    return pairs


def _from_class_folders(found: Listing, folder: Path, warnings: list[str]) -> list[tuple[Path, Any]]:
    parts = [(path, path.relative_to(folder).parts) for path in found.pictures if folder in path.parents]
    loose = [path.name for path, part in parts if len(part) == 1]
    if loose:
        warnings.append(counted("picture", loose, f"in {folder.name} outside any class folder, left out"))
    pairs = [(path, part[0]) for path, part in parts if len(part) > 1]
    masks = masks_of_classes(pairs)
    for path in sorted(masks):
        found.leave_out(path, "that are masks of other classes' pictures, left out")
    return [pair for pair in pairs if pair[0] not in masks]


def _from_metadata(found: Listing, folder: Path, label_column: str, warnings: list[str]) -> list[tuple[Path, Any]]:
    table = next(table for table in found.tables if table.parent == folder)
    entries = read_entries(found, table, warnings)
    rows = gathered([Row(entry.values, entry.where) for entry in entries], label_column)
    column(rows, label_column, "label-column")
    entries = [replace(entry, values=row.values) for entry, row in zip(entries, rows, strict=True)]
    bare = [entry.where for entry in entries if is_missing(entry.values.get(label_column))]
    if bare:
        warnings.append(counted("row", bare, f"of {table.name} without a label, left out"))
    warnings += repeated(entries, table)
    labels: dict[Path, tuple[Any, str]] = {}
    for entry in entries:
        value = entry.values.get(label_column)
        if is_missing(value):
            continue
        label, where = labels.setdefault(entry.path, (value, entry.where))
        if label != value:
            raise DataError(
                f"{table}: {where} and {entry.where} give {found.name(entry.path)} two labels, {label!r} and {value!r}. Keep one."
            )
    unlisted = [path for path in found.pictures if folder in path.parents and path not in {e.path for e in entries}]
    for path in unlisted:
        found.leave_out(path, f"not named in {table.name} and left out")
    return [(path, label) for path, (label, _) in labels.items()]


def _told(found: Listing, pairs: list[tuple[Path, Any]], warnings: list[str]) -> list[tuple[Path, Any]]:
    """``pairs``, and a warning of everything else that looked like a picture."""
    found.pictures = [path for path, _ in pairs]
    warnings += found.warnings()
    return pairs


def _labels(folder: Path, listed: Mapping[str, Sequence[tuple[Path, Any]]], column: str) -> Labels:
    """The labels by the rule that texts have too; names of folders are taken as they are."""
    cells = {
        split: [(label, path.relative_to(folder).as_posix()) for path, label in pairs]
        for split, pairs in listed.items()
        if pairs
    }
    named = all(label in path.parts for pairs in listed.values() for path, label in pairs if isinstance(label, str))
    words = all(isinstance(label, str) for pairs in listed.values() for _, label in pairs)
    return read_labels(cells, None if named and words else column)


def _open(
    pairs: Sequence[tuple[Path, Any]],
    labels: Sequence[Label],
    split: str,
    folder: Path,
    resolution: int,
    kept: dict[Path, Tensor] | None,
    warnings: list[str],
) -> list[LabelledPicture]:
    found, broken, seen = [], [], {}
    for (path, _), label in zip(pairs, labels, strict=True):
        where = path.relative_to(folder).as_posix()
        try:
            decoded = decode(path, SMALLEST)
        except DataError as error:
            broken.append(f"{where} ({error})")
            continue
        seen[where] = decoded.odd, decoded.image.size
        if "transparent" in decoded.odd:
            continue
        pixels = _tensor(decoded, resolution)
        if kept is not None:
            kept[path] = pixels
        digest = splits.digest(pixels.numpy().tobytes())
        found.append(LabelledPicture(path, label, digest, where))
    warnings += images.remarks(seen)
    if not found:
        raise DataError(f"No picture of {split} can be read: {'; '.join(broken[:8])}.")
    if broken:
        warnings.append(counted(f"{split} picture", broken, "cannot be read and left out"))
    return found


def _tensor(decoded: Decoded, resolution: int) -> Tensor:
    """[3, resolution, resolution] bytes."""
    import numpy

    return torch.from_numpy(numpy.asarray(fit(decoded.image, resolution)).copy()).permute(2, 0, 1).contiguous()
