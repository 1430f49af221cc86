"""Folders of pictures of one subject: what they hold and what is wrong with them, and pictures as tensors.

Four layouts are read: an imagefolder (``metadata.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` with ``file_name`` and ``text``, in
the folder or in folders below), captions beside the pictures (``portrait.png`` and ``portrait.txt`` or ``.caption``),
kohya's folders (``10_ann person``), and bare pictures that share one prompt. Everything wrong is found before anything is
trained: what cannot be used raises DataError, what is merely odd or left out becomes a warning that counts and names the
files.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from torch import Tensor

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data import metadata
from smidgen.tasks.data.decoding import mended, read_text
from smidgen.tasks.data.listing import CONDITIONING, Listing, captions_beside, list_folder, repeats, sort_out
from smidgen.tasks.data.masks import NO_MASKS, Masks
from smidgen.tasks.data.pixels import ODD, decode, fit, known_endings
from smidgen.tasks.data.tables import counted


@dataclass(frozen=True)
class Picture:
    """One training picture: where it lies, its caption, its size (width, height), the SHA-256 of its file, the control
    picture that its metadata names, how often it counts beside the others, its mask (its own path: its opacity is the
    mask), and what its loss is multiplied with."""

    path: Path
    caption: str
    size: tuple[int, int]
    digest: str
    control: Path | None = None
    repeats: int = 1
    mask: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class PictureFolder:
    """The usable pictures of a folder in the order of their names, and warnings worth reading."""

    pictures: tuple[Picture, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self.pictures]

    def __str__(self) -> str:
        """How many pictures, captions and repeats: what a report says was trained on."""
        number, captions = len(self.pictures), len(set(self.captions))
        said = f"{_many(number, 'picture')} with {_many(captions, 'caption')}"
        times = Counter(picture.repeats for picture in self.pictures)
        if set(times) != {1}:
            said += ", counted " + ", ".join(f"{n} times ({_many(k, 'picture')})" for n, k in sorted(times.items()))
        return said

    def identity(self) -> list[list[str | int]]:
        """What decides a training: each picture's digest and caption, and its repeats, weight and mask where it has any."""
        return [[one.digest[:16], one.caption, *_further(one)] for one in self.pictures]


def read_folder(
    folder: str | Path,
    instance_prompt: str | None = None,
    resolution: int = 0,
    conditioned: bool = False,
    masks: Masks = NO_MASKS,
) -> PictureFolder:
    """Read and check every picture and caption of ``folder``.

    ``instance_prompt`` is the caption of pictures that have none. ``resolution`` (pixels, 0: unknown) is what the base
    draws; smaller pictures are warned about. ``conditioned`` pairs pictures with those of their name in a folder of
    conditioning pictures, ``masks`` says where their masks are. Raises DataError for an empty or missing folder, broken pictures, tables that do not fit the
    files (see ``metadata``), and pictures left without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder of pictures.{' It is a file.' if folder.is_file() else _near(folder)}"
        )
    found, warnings = list_folder(folder), list[str]()
    described, captions, controls = _described(found, warnings)
    found.pictures = [path for path in found.pictures if path not in set(controls.values())]
    twins = sort_out(found, described)
    candidates = masks.candidates(found)
    if conditioned and not controls:
        controls = twins
        found.left_out.pop(("picture", CONDITIONING), None)
    unlisted = [path for path in found.pictures if path not in described and found.table_of(path)]
    if unlisted:
        warnings.append(counted("picture", map(found.name, unlisted), "not named in the metadata and left out"))
    found.pictures = [path for path in found.pictures if path not in set(unlisted)]
    captions = _beside(found, captions, instance_prompt, warnings)
    if not found.pictures:
        endings, told = ", ".join(sorted(known_endings())), [*warnings, *found.warnings()]
        raise DataError(" ".join([f"{folder} holds no pictures to train on; known endings are {endings}.", *told]))
    pictures = _opened(found, captions, instance_prompt, resolution, warnings)
    sizes = {picture.path: picture.size for picture in pictures}
    paired = masks.paired(found, sizes, candidates, warnings)
    made = (replace(one, control=controls.get(one.path), mask=paired.get(one.path)) for one in pictures)
    return PictureFolder(tuple(made), tuple(warnings))


def bind(captions: Sequence[str], class_word: str, placeholder: str) -> list[str]:
    """Put ``placeholder`` before the first ``class_word`` of each caption that does not hold it yet.

    Example:
        >>> bind(["a portrait of a person, smiling", "sks in the rain"], "person", "sks")
        ['a portrait of a sks person, smiling', 'sks in the rain']
    """
    word, named = _word(class_word), _word(placeholder)
    without = [caption for caption in captions if not word.search(caption) and not named.search(caption)]
    if without:
        raise DataError(
            f"{len(without)} caption(s) do not hold the class word {class_word!r}, so {placeholder!r} has no place in "
            f"them, for example {without[0]!r}. Name the word they share with --class-word."
        )
    unnamed = lambda caption: word.sub(lambda match: f"{placeholder} {match.group(0)}", caption, count=1)  # noqa: E731
    return [caption if named.search(caption) else unnamed(caption) for caption in captions]


def of_class(captions: Sequence[str], class_word: str, placeholder: str) -> list[str]:
    """Captions with ``placeholder`` as captions of its class: inverse of ``bind``, and the class word where the
    placeholder stands alone.

    Example:
        >>> of_class(["a portrait of a sks person, smiling", "sks in the rain"], "person", "sks")
        ['a portrait of a person, smiling', 'person in the rain']
    """
    both = re.compile(rf"{_word(placeholder).pattern}(\s+{_word(class_word).pattern})?", re.IGNORECASE)
    return [both.sub(lambda match: (match.group(1) or class_word).strip(), caption) for caption in captions]


def _word(text: str) -> re.Pattern[str]:
    """``text`` where it stands alone, in any case of letters."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def load_picture(path: "str | Path | IO[bytes]", size: int | tuple[int, int]) -> "Image.Image":
    """The picture upright, on white where transparent, scaled to cover ``size`` (width, height; one number: a square) and
    cropped to the centre."""
    return fit(decode(path).image, size)


def to_tensor(images: Iterable["Image.Image"]) -> Tensor:
    """RGB pictures of one size -> [batch, 3, height, width] in -1..1."""
    import numpy

    stack = numpy.stack([numpy.asarray(image.convert("RGB"), dtype=numpy.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def remarks(seen: Mapping[str, tuple[frozenset[str], tuple[int, int]]], resolution: int = 0) -> list[str]:
    """Warnings about decoded pictures: name -> (what is odd about it, width and height), with the square that is trained on.

    Example:
        >>> remarks({"a.gif": (frozenset({"animated"}), (64, 64)), "b.png": (frozenset(), (4000, 40))})
        ['1 picture of several frames, of which the first is taken: a.gif.', '1 picture that loses most of itself to the \
crop to its centre square: b.png (4000x40, 1 % is kept).']
    """
    told = {odd: [name for name, (found, _) in seen.items() if odd in found] for odd in ODD}
    if "transparent" in told:
        told["flat"] = [name for name in told["flat"] if name not in told["transparent"]]
    warnings = [counted("picture", names, ODD[odd]) for odd, names in told.items() if names]
    shares = {name: (size, min(size) / max(size)) for name, (_, size) in seen.items()}
    cut = [f"{name} ({w}x{h}, {share:.0%} is kept)" for name, ((w, h), share) in shares.items() if share < 0.5]
    if cut:
        warnings.append(counted("picture", cut, "that loses most of itself to the crop to its centre square"))
    small = [name for name, (size, _) in shares.items() if min(size) < resolution]
    if small:
        warnings.append(counted("picture", small, f"smaller than the base's {resolution} pixels and will be enlarged"))
    return warnings


def _described(found: Listing, warnings: list[str]) -> tuple[set[Path], dict[Path, str], dict[Path, Path]]:
    """What the folder's tables say: the pictures they name, captions, and control pictures."""
    named, captions, controls = set[Path](), dict[Path, str](), dict[Path, Path]()
    for table in found.tables:
        entries = metadata.read_entries(found, table, warnings)
        warnings += metadata.repeated(entries, table)
        column = metadata.caption_column(table, metadata.columns_of(entries), warnings)
        named |= {entry.path for entry in entries}
        for path, text in metadata.captions_of(table, entries, column).items():
            if captions.setdefault(path, text) != text:
                raise DataError(
                    f"{table} describes {found.name(path)} as {text[:60]!r}, another table as {captions[path][:60]!r}. Keep one."
                )
        controls |= metadata.controls_of(found, table, entries)
    return named, captions, controls


def _beside(found: Listing, captions: dict[Path, str], prompt: str | None, warnings: list[str]) -> dict[Path, str]:
    """``captions`` of the tables, completed by the files beside the pictures and, without a ``prompt`` for all, by kohya's folder
    names."""
    files = captions_beside(found)
    texts = _read_texts(files, warnings)
    double = [found.name(files[path]) for path, text in texts.items() if captions.get(path, text) != text]
    if double:
        warnings.append(counted("caption file", double, "beside a picture that the metadata describes, not read"))
    words: dict[str, list[str]] = {}
    complete = texts | captions
    empty = [found.name(files[path]) for path in texts if not complete[path]]
    if empty:
        warnings.append(counted("caption file", empty, "that is empty"))
    for path in found.pictures:
        _, said = repeats(found, path)
        if said and not prompt and not complete.get(path):
            words.setdefault(said, []).append(found.name(path))
            complete[path] = said
    warnings += [counted("picture", names, f"captioned {said!r} by its folder's name") for said, names in words.items()]
    return complete


def _opened(
    found: Listing, captions: dict[Path, str], prompt: str | None, resolution: int, warnings: list[str]
) -> list[Picture]:
    bare = [path for path in found.pictures if not captions.get(path)]
    if bare and not prompt:
        raise DataError(
            " ".join(
                [
                    counted("picture", map(found.name, bare), "without a caption"),
                    "Add metadata.jsonl or .txt files beside the pictures, or one prompt for all with --instance-prompt.",
                    *([counted("file", found.others, "of no kind that is read")] if found.others else []),
                    *warnings,
                    *found.warnings(),
                ]
            )
        )
    if bare and len(bare) < len(found.pictures):
        warnings.append(counted("picture", map(found.name, bare), f"captioned {prompt!r}, the prompt for all"))
    pictures, broken, seen, first = [], [], {}, dict[str, Path]()
    for path in found.pictures:
        try:
            decoded = decode(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (DataError, OSError) as error:
            broken.append(f"{found.name(path)} ({error})")
            continue
        if first.setdefault(digest, path) != path:
            found.leave_out(path, "byte for byte a copy of another and left out")
            continue
        seen[found.name(path)] = decoded.odd, decoded.image.size
        if "transparent" not in decoded.odd:
            caption, (times, _) = captions.get(path) or str(prompt), repeats(found, path)
            pictures.append(Picture(path, caption, decoded.image.size, digest, repeats=times))
    if broken:
        raise DataError(f"{len(broken)} picture(s) cannot be read: {'; '.join(broken[:8])}. Repair or remove them.")
    warnings += [*found.warnings(), *remarks(seen, resolution)]
    if not pictures:
        raise DataError(" ".join([f"{found.folder} holds no picture with anything to see.", *warnings]))
    return pictures


def _read_texts(texts: Mapping[Path, Path], warnings: list[str]) -> dict[Path, str]:
    """Captions by picture, of the files beside them."""
    found: dict[Path, str] = {}
    for text in dict.fromkeys(texts.values()):
        try:
            read, broken = mended(read_text(text, warnings))
        except OSError as error:
            raise DataError(f"{text} cannot be read: {error.strerror}.") from error
        if broken:
            warnings.append(f"{text.name} holds half a character, a broken byte or a NUL, read as U+FFFD.")
        found[text] = read.strip()
    return {path: found[text] for path, text in texts.items()}


def _further(picture: Picture) -> list[str | int]:
    found: list[str | int] = [picture.repeats] if picture.repeats > 1 else []
    found += [f"weight {picture.weight}"] if picture.weight != 1 else []
    if picture.mask == picture.path:
        return [*found, "its opacity"]
    return found + ([hashlib.sha256(picture.mask.read_bytes()).hexdigest()[:16]] if picture.mask else [])


def _near(folder: Path) -> str:
    above = folder.parent
    return did_you_mean(folder.name, [path.name for path in above.iterdir() if path.is_dir()]) if above.is_dir() else ""


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
