"""Files that are whole or not there: written beside, flushed to the disk, then moved. The one writer of all wings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

_WORK, _RECORD = ".saving", ".record"


@contextmanager
def new_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to, and puts that file at ``path`` in one step when the block ends well.

    On an error ``path`` is as it was and nothing is left beside it. The name beside is hidden and ends in the writer's
    process number and ``.tmp``. The file has the mode of ordinary files, whatever the writing library gave it. What may
    be lost with the machine's power, a cache, need not be ``durable``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        with _told_by_the_system(path):
            yield beside
        beside.chmod(mode)
        if durable:
            flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | str) -> None:
    """Puts ``content`` at ``path`` in one step: a reader sees the old file or the new one, never a part."""
    with new_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_files(folder: Path, gone: Collection[str] = ()) -> Iterator[Path]:
    """Gives a scratch folder whose files, sub-folders included, are in ``folder`` when the block ends well.

    On an error ``folder`` is as it was; a folder that was not there is not made. Files of other names stay in any case, but
    for those named in ``gone``. A process that is killed leaves the old files or the new: until they are all in place, the
    new ones lie in ``folder/.saving`` beside a record of what they replace, and whoever reads or writes the folder next
    finishes the work (:func:`settle`). Configs (``.json``) are moved last.
    """
    if folder.is_dir():
        settle(folder)
    scratch = _scratch(folder, next(path for path in _above(folder) if path.is_dir()))
    try:
        with _told_by_the_system(folder):
            yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        _make_ordinary(scratch, files)
        if folder.is_dir():
            _commit(scratch, folder, [path.relative_to(scratch).as_posix() for path in files], gone)
            settle(folder)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(scratch, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _told_by_the_system(place: Path) -> Iterator[None]:
    """Within, what the system refuses is an OSError: safetensors says it in a sentence."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error


def settle(folder: Path) -> None:
    """Finishes what a killed writer of ``folder`` began: its new files are moved into place, those that are gone removed.

    A file that somebody else wrote since wins, and all of the unfinished work is dropped. Nothing is done without such work.

    Raises:
        OSError: the folder cannot be written to.
    """
    work = folder / _WORK
    if not work.is_dir() or work.is_symlink():
        return
    record = _read_record(work)
    steps = [(name, old, new, work / name, folder / name) for name, (old, new) in record.items()]
    steps.sort(key=lambda step: (step[0].endswith(".json"), step[0]))
    inside = folder.resolve()
    for name, old, new, staged, place in steps:
        waits = staged.is_file() if new else place.exists()
        if (
            _mark(place) != (old if waits else new)
            or not _is_inside(name)
            or not place.resolve().is_relative_to(inside)
        ):
            break
    else:
        for _, _, new, staged, place in steps:
            with suppress(FileNotFoundError):  # another process was here first
                if new is None:
                    place.unlink()
                elif staged.is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staged, place)
        flush(folder)
    shutil.rmtree(work, ignore_errors=True)


def _commit(scratch: Path, folder: Path, names: list[str], gone: Collection[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "A folder is in the way of a file", str(folder / name))
        if (folder / name).parent.exists() and not (folder / name).parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "A file is in the way of a folder", str((folder / name).parent))
    record = {name: (_mark(folder / name), _mark(scratch / name)) for name in names}
    record |= {name: (_mark(folder / name), None) for name in gone if (folder / name).is_file()}
    write_file(scratch / _RECORD, json.dumps(record).encode())
    for _ in range(100):
        try:
            os.rename(scratch, folder / _WORK)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            settle(folder)  # of another writer
    flush(folder)


def _read_record(work: Path) -> dict[str, tuple[str | None, str | None]]:
    """What a writer was about to do; nothing when its record is not whole."""
    try:
        record = json.loads((work / _RECORD).read_bytes()[: 2**20])
        return {str(name): (old, new) for name, (old, new) in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _mark(path: Path) -> str | None:
    """A fingerprint of a file: its size and what stands at its two ends; None where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(str(size).encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
            return digest.hexdigest()
    except OSError:
        return None


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _make_ordinary(scratch: Path, files: list[Path]) -> None:
    """Gives files the mode of ordinary ones, whatever the writing library gave them, and has them on the disk."""
    probe = scratch / _RECORD
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in files:
        path.chmod(mode)
        flush(path)
    scratch.chmod(mode | (mode & 0o444) >> 2)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives a scratch folder that is at ``folder`` when the block ends well, instead of what was there.

    On an error ``folder`` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(folder, folder.parent)
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists():
            os.rename(folder, old)
        os.rename(scratch, folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for path in (scratch, old):
            shutil.rmtree(path, ignore_errors=True)


def _above(folder: Path) -> list[Path]:
    """``folder`` and those above it, of which none is a file: that is said before anything is made, not after the work."""
    paths = [folder.absolute(), *folder.absolute().parents]
    if any(os.path.lexists(path) and not path.is_dir() for path in paths):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return paths


def _scratch(folder: Path, above: Path) -> Path:
    """A hidden folder in ``above``; an error names ``folder``, which is what the caller knows."""
    try:
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=above))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_file(path: Path, content: bytes) -> None:
    """Writes ``content`` and has it flushed to the disk: for files in a folder that is itself put in place when whole."""
    path.write_bytes(content)
    flush(path)


def flush(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
