"""Uploaded adapters, hostile until verified: files of known names and bounded sizes, and nothing else of what was sent.

What comes is a zip archive or the files themselves. No name out of it becomes a path: the bytes of the config and of the
weights, and of the two reports that may lie beside them, are written to a hidden folder under the names that they have here,
and checked before anybody looks at the tensors.
"""

from __future__ import annotations

import json
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, parse_config
from smidgen.errors import AdapterFileError, did_you_mean
from smidgen.serving.answers import Refusal

FILES = (CONFIG_NAME, WEIGHTS_NAME)
TOLD = ("report.json", "recipe.json")  # taken where they are there: how it was trained, or predicted
MAX_JSON = 2**20
MAX_HEADER = 4 * 2**20  # of a safetensors file: 30,000 tensors
MAX_ENTRIES = 64  # of an archive
MAX_DIRECTORY = 2**16  # bytes of an archive's list of entries
_CODE = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".npy",
    ".npz",
    ".py",
    ".so",
    ".exe",
    ".jinja",
)  # what can run
_END, _END64 = b"PK\x05\x06", b"PK\x06\x07"


@contextmanager
def quarantine(above: Path) -> Iterator[Path]:
    """A hidden folder in ``above`` for what is not verified yet; gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=".upload-", dir=above))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack_archive(archive: IO[bytes], folder: Path, most: int) -> None:
    """Writes the config and the weights in a zip archive to ``folder``. Other harmless files (a card, pictures) are left out.

    Raises:
        Refusal: 400 for what is no such archive, 413 for one that unfolds to more than ``most`` bytes.
    """
    _check_directory(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _chosen(opened.infolist())
            if (size := sum(entry.file_size for entry in entries.values())) > most:
                raise Refusal(413, f"The archive unfolds to {size:,} bytes; an adapter has at most {most:,}.")
            for name, entry in entries.items():
                with opened.open(entry) as source:
                    _write(source, folder / name, most)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError) as error:
        raise Refusal(400, f"The archive cannot be read ({error}); send a zip of the adapter's folder.") from error
    check_files(folder)


def take_files(files: Mapping[str, IO[bytes]], folder: Path, most: int) -> None:
    """Writes the files of an adapter to ``folder``; ``files`` is by the names that they must have.

    Raises:
        Refusal: 400 for other names or what is in the files, 413 for their sizes.
    """
    missing = [name for name in FILES if name not in files]
    other = sorted(set(files) - {*FILES, *TOLD})
    if missing or other:
        hint = did_you_mean(other[0], FILES) if other else ""
        raise Refusal(
            400,
            f"An adapter is {CONFIG_NAME} and {WEIGHTS_NAME}"
            + (f"; {missing[0]} is missing" if missing else "")
            + (f"; {_shown(other[0])} is neither" if other else "")
            + f".{hint} A zip of the folder is taken too.",
        )
    for name, source in files.items():
        _write(source, folder / name, most)
    check_files(folder)


def check_files(folder: Path) -> None:
    """The config is a JSON object, and the header of the weights fits into their file.

    Raises:
        Refusal: 400.
    """
    try:
        for name in (CONFIG_NAME, *TOLD):
            if (folder / name).is_file():
                parse_config((folder / name).read_bytes(), name)
    except AdapterFileError as error:
        raise Refusal(400, str(error)) from error
    weights = folder / WEIGHTS_NAME
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER) or length < 2:
            raise Refusal(
                400,
                f"{WEIGHTS_NAME} ({size:,} bytes) is no safetensors file: its header would have {length:,} bytes, and it has at "
                f"most {max(0, min(size - 8, MAX_HEADER)):,}.",
            )
        header = file.read(length)
    try:
        if not isinstance(json.loads(header), dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"{WEIGHTS_NAME} is no safetensors file: its header is no JSON ({error}).") from error


def _check_directory(archive: IO[bytes]) -> None:
    """The list of entries is short, by the record at the archive's end that is read here and by ``zipfile``."""
    size = archive.seek(0, 2)
    archive.seek(max(0, size - 2**16 - 22 - 20))
    tail = archive.read()
    archive.seek(0)
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + 22:
        raise Refusal(400, "The archive cannot be read (it has no end); send a zip of the adapter's folder.")
    if tail[max(0, place - 20) : place].startswith(_END64):
        raise Refusal(400, "The archive is one for more than 4 GB (zip64); pack the two files of the adapter anew.")
    entries = int.from_bytes(tail[place + 10 : place + 12], "little")
    length = int.from_bytes(tail[place + 12 : place + 16], "little")
    if entries > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise Refusal(
            400,
            f"The archive lists {entries:,} entries ({length:,} bytes); one of an adapter has at most {MAX_ENTRIES}.",
        )


def _chosen(entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive that are read; one folder may be around them.

    Raises:
        Refusal: 400, an entry that no adapter's folder has, or one that lacks.
    """
    for entry in entries:
        _check_entry(entry)
    found: dict[str, zipfile.ZipInfo] = {}
    entries = [entry for entry in entries if not entry.filename.startswith("__MACOSX/")]
    wrapped = len({entry.filename.partition("/")[0] for entry in entries}) == 1
    for entry in entries:
        name = entry.filename.partition("/")[2] if wrapped and "/" in entry.filename else entry.filename
        if name in found:
            raise Refusal(400, f"The archive holds {name} twice.")
        if name in (*FILES, *TOLD):
            found[name] = entry
        elif name.rpartition("/")[2] in FILES:
            raise Refusal(
                400,
                f"The archive holds a second adapter, {_shown(name)}; send one of a single model, or each by itself.",
            )
    for name in FILES:
        if name not in found:
            held = ", ".join(_shown(entry.filename) for entry in entries[:5]) or "nothing"
            raise Refusal(400, f"The archive has no {name} (it holds: {held}).")
    return found


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    parts = name.split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in parts or name != entry.filename:
        raise Refusal(400, f"The archive names {_shown(name)}, which leads out of its folder.")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Refusal(400, f"{_shown(name)} in the archive is a link or a device, not a file.")
    if entry.flag_bits & 1:
        raise Refusal(400, f"{_shown(name)} in the archive is encrypted.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refusal(400, f"{_shown(name)} in the archive is packed by method {entry.compress_type}; use deflate.")
    if name.lower().endswith(_CODE):
        raise Refusal(400, f"{_shown(name)} in the archive can hold code; only safetensors and JSON are taken.")


def _write(source: IO[bytes], path: Path, most: int) -> None:
    """Copies at most ``most`` bytes, of JSON at most ``MAX_JSON``, whatever the source says of its size."""
    left = most = min(most, MAX_JSON) if path.suffix == ".json" else most
    with path.open("xb") as file:
        while chunk := source.read(min(left + 1, 2**20)):
            left -= len(chunk)
            if left < 0:
                raise Refusal(413, f"{path.name} has more than {most:,} bytes.")
            file.write(chunk)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}...")
