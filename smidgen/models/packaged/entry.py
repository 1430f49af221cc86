"""What a packaged model or data set is: the pinned archives it is read from, and the function that writes its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        module: the Python module it installs, when an installed copy can serve too.
        payload: SHA-256 of the files that matter inside, by path; an installed copy must hold just these.
    """

    registry: Registry
    package: str
    version: str
    url: str
    sha256: str
    size: int
    module: str | None = None
    payload: Mapping[str, str] | None = None

    @property
    def filename(self) -> str:
        """Name of the archive in the cache and on the registry."""
        return self.url.rsplit("/", 1)[1]

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.registry}, {self.size / 1e6:.1f} MB)"


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
