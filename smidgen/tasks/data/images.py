"""Folders of pictures: what they hold, what is wrong with them, and pictures as tensors.

Three layouts are read: an imagefolder (``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and ``text``),
captions beside the pictures (``portrait.png`` and ``portrait.txt``), and bare pictures that share one prompt.
Everything wrong is found before anything is trained: what cannot be used raises DataError, what is merely odd becomes
a warning that counts and names the files.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch
from PIL import Image, ImageOps
from torch import Tensor

from smidgen.errors import DataError, did_you_mean

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
CONTROL_COLUMN = "control_file_name"
COLUMNS = ("file_name", "text", CONTROL_COLUMN)
SMALLEST = 16  # pixels on the shorter side
LARGEST = 100_000_000  # pixels in all
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what a broken picture makes Pillow say


@dataclass(frozen=True)
class Picture:
    """One training picture: where it lies, its caption, its size (width, height), the SHA-256 of its file, and the
    control picture that its metadata names."""

    path: Path
    caption: str
    size: tuple[int, int]
    digest: str
    control: Path | None = None


@dataclass(frozen=True)
class PictureFolder:
    """The usable pictures of a folder in the order of their names, and warnings worth reading."""

    pictures: tuple[Picture, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self.pictures]


def read_folder(folder: str | Path, instance_prompt: str | None = None, resolution: int = 0) -> PictureFolder:
    """Read and check every picture and caption of ``folder``.

    ``instance_prompt`` is the caption of pictures that have none. ``resolution`` (pixels, 0: unknown) is what the base
    draws; smaller pictures are warned about. Raises DataError for an empty or missing folder, broken pictures, pictures
    named in the metadata that do not exist, and pictures left without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of pictures." + did_you_mean(folder.name, _siblings(folder)))
    controls = _controls(folder)
    named = set(controls.values())
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not _hidden(path, folder))
    files = sorted(path for path in found if path not in named)
    warnings: list[str] = []
    captions = _captions(folder, files, warnings)
    if not files:
        raise DataError(f"{folder} holds no pictures; known endings are {', '.join(SUFFIXES)}.")
    listed = [path for path in files if path in captions] if _metadata_file(folder) else files
    if len(listed) < len(files):
        warnings.append(_counted("picture", set(files) - set(listed), "not named in the metadata and left out"))
    pictures = _open_all(listed, captions, instance_prompt, folder)
    pictures = [replace(picture, control=controls.get(picture.path)) for picture in pictures]
    pictures = _without_duplicates(pictures, warnings)
    small = [p.path for p in pictures if min(p.size) < resolution]
    if small:
        warnings.append(_counted("picture", small, f"smaller than the base's {resolution} pixels and will be enlarged"))
    return PictureFolder(tuple(pictures), tuple(warnings))


def bind(captions: Sequence[str], class_word: str, placeholder: str) -> list[str]:
    """Put ``placeholder`` before the first ``class_word`` of each caption.

    Example:
        >>> bind(["a portrait of a person, smiling"], "person", "sks")
        ['a portrait of a sks person, smiling']
    """
    word = re.compile(rf"\b{re.escape(class_word)}\b", re.IGNORECASE)
    without = [caption for caption in captions if not word.search(caption)]
    if without:
        raise DataError(
            f"{len(without)} caption(s) do not hold the class word {class_word!r}, so {placeholder!r} has no place in "
            f"them, for example {without[0]!r}. Name the word they share with --class-word."
        )
    return [word.sub(lambda match: f"{placeholder} {match.group(0)}", caption, count=1) for caption in captions]


def load_picture(path: "str | Path | IO[bytes]", resolution: int) -> "Image.Image":
    """The picture upright, on white where transparent, its shorter side scaled to ``resolution``, cropped to the
    centre."""
    with Image.open(path) as image:
        return fit(upright(image), resolution)


def upright(image: "Image.Image") -> "Image.Image":
    """RGB, turned as its EXIF says, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image: "Image.Image", resolution: int) -> "Image.Image":
    """Scaled and centre-cropped to ``resolution`` x ``resolution`` pixels."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(images: Iterable["Image.Image"]) -> Tensor:
    """RGB pictures of one size -> [batch, 3, height, width] in -1..1."""
    import numpy

    stack = numpy.stack([numpy.asarray(image.convert("RGB"), dtype=numpy.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def _captions(folder: Path, files: Sequence[Path], warnings: list[str]) -> dict[Path, str]:
    metadata = _metadata_file(folder)
    if metadata is not None:
        return _metadata_captions(metadata, files, warnings)
    beside = {path.with_suffix(".txt"): path for path in files}
    orphans = [path for path in sorted(folder.rglob("*.txt")) if path not in beside and not _hidden(path, folder)]
    if orphans:
        warnings.append(_counted("caption file", orphans, "without a picture beside it and ignored"))
    texts = {path: text for text, path in beside.items() if text.is_file()}
    return {path: _read_text(text) for path, text in texts.items()}


def _metadata_captions(metadata: Path, files: Sequence[Path], warnings: list[str]) -> dict[Path, str]:
    rows = _rows(metadata)
    if not rows:
        raise DataError(f"{metadata} is empty.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "file_name" not in columns:
        raise DataError(f"{metadata} has no column 'file_name'; it has {columns}." + did_you_mean("file_name", columns))
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        near = "".join(did_you_mean(name, COLUMNS) for name in unknown) if "text" not in columns else ""
        warnings.append(
            f"{metadata.name}: unknown column(s) {', '.join(map(repr, unknown))} ignored; 'text' is read.{near}"
        )
    captions = {metadata.parent / str(row["file_name"]): str(row.get("text") or "").strip() for row in rows}
    missing = [path for path in captions if not path.is_file()]
    if missing:
        raise DataError(_counted("picture", missing, f"named in {metadata.name} but not in the folder"))
    strange = [path for path in captions if path not in set(files)]
    if strange:
        raise DataError(
            _counted("file", strange, f"named in {metadata.name} that no picture reader knows by its ending")
        )
    return {path: text for path, text in captions.items() if text} if "text" in columns else dict.fromkeys(captions, "")


def _controls(folder: Path) -> dict[Path, Path]:
    """Picture -> control picture, where the metadata names one."""
    metadata = _metadata_file(folder)
    rows = [row for row in _rows(metadata) if row.get("file_name") and row.get(CONTROL_COLUMN)] if metadata else []
    return {folder / str(row["file_name"]): folder / str(row[CONTROL_COLUMN]) for row in rows}


def _rows(metadata: Path) -> list[dict]:
    if metadata.suffix == ".csv":
        with open(metadata, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    rows = []
    for number, line in enumerate(_read_text(metadata).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{metadata} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{metadata} line {number} must be an object with 'file_name' and 'text', not {line[:60]!r}."
            )
        rows.append(row)
    return rows


def _open_all(files: Sequence[Path], captions: dict[Path, str], prompt: str | None, folder: Path) -> list[Picture]:
    bare = [path for path in files if not captions.get(path)]
    if bare and not prompt:
        raise DataError(
            _counted("picture", bare, "without a caption")
            + " Add metadata.jsonl or .txt files beside the pictures, or one prompt for all with --instance-prompt."
        )
    pictures, broken = [], []
    for path in files:
        try:
            size, digest = _check(path)
        except UNREADABLE as error:
            broken.append(f"{path.relative_to(folder)} ({error})")
            continue
        pictures.append(Picture(path, captions.get(path) or str(prompt), size, digest))
    if broken:
        raise DataError(f"{len(broken)} picture(s) cannot be read: {'; '.join(broken[:8])}. Repair or remove them.")
    return pictures


def _check(path: Path) -> tuple[tuple[int, int], str]:
    """Size and digest of a picture that decodes fully; raises what Pillow raises otherwise."""
    with Image.open(path) as image:
        width, height = image.size
        if width * height > LARGEST:
            raise ValueError(f"{width}x{height} is more than {LARGEST // 1_000_000} million pixels")
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} is smaller than {SMALLEST} pixels")
        image.load()
        return ImageOps.exif_transpose(image).size, hashlib.sha256(path.read_bytes()).hexdigest()


def _without_duplicates(pictures: Sequence[Picture], warnings: list[str]) -> list[Picture]:
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.digest, picture)
    doubles = [picture.path for picture in pictures if first[picture.digest] is not picture]
    if doubles:
        warnings.append(_counted("picture", doubles, "byte for byte a copy of another and left out"))
    return list(first.values())


def _counted(noun: str, paths: Iterable[Path], what: str) -> str:
    names = sorted(path.name for path in paths)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} {what}: {shown}."


def _metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _siblings(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
