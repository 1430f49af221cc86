"""Files that are whole or not there: written beside, flushed to the disk, then moved. The one writer of all wings."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
def new_files(folder: Path) -> Iterator[Path]:
    """Gives a scratch folder whose files, sub-folders included, are in ``folder`` when the block ends well.

    On an error ``folder`` is as it was; a folder that was not there is not made. Files of other names stay in any case.
    Configs (``.json``) are moved last, so that what they describe is there when they are.
    """
    scratch = _scratch(folder, next(path for path in _above(folder) if path.is_dir()))
    try:
        yield scratch
        files = [path for path in scratch.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
            place = folder / path.relative_to(scratch)
            with new_file(place) as beside:
                os.replace(path, beside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
