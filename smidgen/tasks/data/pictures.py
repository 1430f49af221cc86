"""Labelled pictures: class folders (``train/cat/1.png`` or ``cat/1.png``) or metadata with file_name and label.

A broken picture is left out and named; what cannot be learnt from is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import DataError
from smidgen.tasks.data import images, splits
from smidgen.tasks.data.labels import Label, Labels, classes_of, gathered, is_missing, lacking, read_labels
from smidgen.tasks.data.tables import Row, column, counted, read_rows, split_of

SMALLEST = 8  # pixels on the shorter side
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


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
            f"file_name and {label_column}. Known endings are {', '.join(images.SUFFIXES)}."
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
        return _pixels(picture.path, resolution) if kept is None else kept[picture.path]

    return Pictures(complete, known.names, tuple(warnings), pixels, known.several)


def count_labels(pictures: Sequence[LabelledPicture], labels: Sequence[str]) -> Mapping[str, int]:
    """How many pictures each class has."""
    found = [at for picture in pictures for at in classes_of(picture.label)]
    return {label: found.count(at) for at, label in enumerate(labels)}


def _listed(folder: Path, label_column: str, warnings: list[str]) -> dict[str, list[tuple[Path, Any]]]:
    """(file, label as it is written) by split."""
    metadata = _metadata(folder)
    if metadata is not None:
        return {"train": _from_metadata(metadata, label_column, warnings)}
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    named = [path for path in inner if split_of(path.name)]
    if not any(split_of(path.name) == "train" for path in named):
        return {"train": _from_class_folders(folder, warnings)}
    strange = [path.name for path in inner if path not in named]
    if strange:
        warnings.append(counted("folder", strange, "beside the splits and left out"))
    found: dict[str, list[tuple[Path, Any]]] = {}
    for path in named:
        own = _metadata(path)
        pairs = _from_metadata(own, label_column, warnings) if own else _from_class_folders(path, warnings)
        found.setdefault(split_of(path.name), []).extend(pairs)
    return found


def _from_class_folders(folder: Path, warnings: list[str]) -> list[tuple[Path, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    parts = [(path, path.relative_to(folder).parts) for path in files]
    parts = [(path, part) for path, part in parts if not any(name.startswith(".") for name in part)]
    loose = [path.name for path, part in parts if len(part) == 1]
    if loose:
        warnings.append(counted("picture", loose, f"in {folder.name} outside any class folder, left out"))
    return [(path, part[0]) for path, part in parts if len(part) > 1]


def _from_metadata(metadata: Path, label_column: str, warnings: list[str]) -> list[tuple[Path, Any]]:
    rows = read_rows(metadata, warnings)
    if not rows:
        raise DataError(f"{metadata} is empty.")
    rows = gathered(rows, label_column)
    column(rows, "file_name", "data with file_name")
    column(rows, label_column, "label-column")
    bare = [row for row in rows if is_missing(row.values.get(label_column))]
    if bare:
        warnings.append(counted("row", [row.where for row in bare], f"of {metadata.name} without a label, left out"))
    missing = [row for row in rows if not _file(metadata, row).is_file()]
    if missing:
        names = [str(row.values["file_name"]) for row in missing]
        raise DataError(counted("picture", names, f"named in {metadata.name} but not in the folder"))
    out = {row.where for row in bare}
    return [(_file(metadata, row), row.values[label_column]) for row in rows if row.where not in out]


def _file(metadata: Path, row: Row) -> Path:
    return metadata.parent / str(row.values["file_name"])


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


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
    found, broken = [], []
    for (path, _), label in zip(pairs, labels, strict=True):
        where = path.relative_to(folder).as_posix()
        try:
            pixels = _pixels(path, resolution)
        except images.UNREADABLE as error:
            broken.append(f"{where} ({error})")
            continue
        if kept is not None:
            kept[path] = pixels
        digest = splits.digest(pixels.numpy().tobytes())
        found.append(LabelledPicture(path, label, digest, where))
    if not found:
        raise DataError(f"No picture of {split} can be read: {'; '.join(broken[:8])}.")
    if broken:
        warnings.append(counted(f"{split} picture", broken, "cannot be read and left out"))
    return found


def _pixels(path: Path, resolution: int) -> Tensor:
    import numpy

    with images.Image.open(path) as image:
        width, height = image.size
        if width * height > images.LARGEST or min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} pixels are too many or too few")
        picture = images.fit(images.upright(image), resolution)
    return torch.from_numpy(numpy.asarray(picture).copy()).permute(2, 0, 1).contiguous()
