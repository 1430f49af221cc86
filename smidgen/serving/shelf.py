"""The folder of adapters: which names there are, what each is, and whether it changed since.

A tree is read as it lies: each folder with an ``adapter_config.json`` is an adapter, its name the path to it
("ann", "team/ann"). The Hub's own cache, ``models--owner--name/snapshots/...``, is one too ("owner/name").
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smidgen.adapters.api import read_adapter
from smidgen.adapters.atomic import replace_folder
from smidgen.adapters.bank import structure
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, as_folder, check_file, public_name, read_config
from smidgen.adapters.components import component_folders
from smidgen.adapters.tuner.config import is_ours
from smidgen.bases.origin import TEMPLATE, Origin, read_origin
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, did_you_mean
from smidgen.serving.requests import AdapterInfo, UnknownAdapterError
from smidgen.tasks.control import hint

READ = (CONFIG_NAME, WEIGHTS_NAME, "report.json", "recipe.json", TEMPLATE)  # what an adapter's answers follow from
KEPT = (*READ, "README.md")  # what is copied of a folder that is added
DEPTH = 3  # folders from the library's down to an adapter's
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95}){0,2}")
_HUB = "models--"

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One version of an adapter, read and found whole. Adapters of one ``structure`` share a bank; ``heads``: it brings some."""

    name: str
    folder: Path
    signature: Signature
    fingerprint: str
    origin: Origin
    parameters: int
    structure: str
    heads: bool

    @property
    def base(self) -> str:
        return public_name(self.origin.base)

    @property
    def bytes(self) -> int:
        """In memory, where numbers are fp32."""
        return 4 * self.parameters

    def unchanged(self) -> bool:
        """Whether its files are still those that were read."""
        return signature(self.folder) == self.signature

    def info(self, resident: bool = False, pinned: bool = False) -> AdapterInfo:
        head = self.origin.head
        return AdapterInfo(
            self.name,
            self.fingerprint,
            self.origin.task,
            self.origin.method,
            self.base,
            self.bytes,
            self.parameters,
            head.labels if head is not None else (),
            max((stat[1] / 1e9 for stat in self.signature), default=0.0),
            resident,
            pinned,
        )


class Shelf:
    """The adapters in ``folder``; what was read of each is kept until its files change.

    Args:
        folder: need not be there yet.
        most: bytes that an adapter's file may have.
    """

    def __init__(self, folder: str | os.PathLike[str], most: int) -> None:
        self.folder, self.most = Path(folder), most
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._hub: dict[str, Path] = {}

    def names(self) -> list[str]:
        """Names of all adapter folders, whole or not, sorted."""
        return sorted(name for name, _ in _adapters(self.folder, "", DEPTH))

    def entry(self, name: str) -> Entry:
        """What is at ``name`` now.

        Raises:
            UnknownAdapterError: nothing is.
            SmidgenError: what is there cannot be served, and why.
        """
        folder = self.place(name)
        if folder is None:
            raise self._unknown(name)
        with self._lock:
            known = self._entries.get(name)
        if known is not None and known.folder == folder and known.unchanged():
            return known
        try:
            found = read(name, folder, self.most)
        except SmidgenError:
            if self.place(name) is None:  # it was deleted meanwhile
                raise self._unknown(name) from None
            raise
        with self._lock:
            self._entries[name] = found
        return found

    def _unknown(self, name: str) -> UnknownAdapterError:
        return UnknownAdapterError(f"There is no adapter {name!r} here.{did_you_mean(name, self.names())}")

    def place(self, name: str) -> Path | None:
        """The folder of an adapter, None where there is none."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return None
        folder = self.folder / name
        if not (folder / CONFIG_NAME).is_file():
            owner, _, rest = name.partition("/")
            snapshot = _snapshot(self.folder / f"{_HUB}{owner}--{rest}") if rest and "/" not in rest else None
            return snapshot
        inside = any((above / CONFIG_NAME).is_file() for above in folder.relative_to(self.folder).parents if above.name)
        return None if inside else folder

    def add(self, name: str, source: Path) -> None:
        """Puts a copy of ``source``, which was found whole, at ``name``, in one step."""
        with replace_folder(self.folder / name) as scratch:
            copy(source, scratch)
        self.forget(name)

    def around(self, name: str) -> str | None:
        """An adapter of which ``name`` would be a part, or that would be a part of ``name``: one of the two would be found no more.
        Looks where such a one can lie, and not at all adapters."""
        parts = name.split("/")
        for above in ("/".join(parts[:count]) for count in range(1, len(parts))):
            if self.place(above):
                return above
        below = (
            [one for one, _ in _adapters(self.folder / name, f"{name}/", DEPTH - len(parts))]
            if self.place(name) is None
            else []
        )
        if len(parts) == 1 and self.folder.is_dir():
            start = f"{_HUB}{name}--"
            cached = [entry.name for entry in os.scandir(self.folder) if entry.name.startswith(start)]
            below += [f"{name}/{one.removeprefix(start)}" for one in cached if _snapshot(self.folder / one)]
        return min(below, default=None)

    def remove(self, name: str) -> None:
        """Deletes an adapter's folder, and those around it that are then empty.

        Raises:
            UnknownAdapterError: there is none.
            SmidgenError: it lies in the Hub's cache, which is not ours to change.
        """
        folder = self.place(name)
        if folder is None:
            raise self._unknown(name)
        if folder != self.folder / name:
            raise ConfigError(f"{name!r} lies in a cache of the Hub ({folder}); remove it with the hf command line.")
        gone = folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}.removed")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        above = folder.parent
        while above != self.folder and not any(above.iterdir()):
            above.rmdir()
            above = above.parent
        self.forget(name)

    def forget(self, name: str) -> None:
        with self._lock:
            self._entries.pop(name, None)


def check_name(name: str) -> None:
    """Refuses what is no name of an adapter.

    Raises:
        ConfigError: with what would be one.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith(_HUB):
        raise ConfigError(
            f"{str(name)[:100]!r} is no name for an adapter: up to three parts with slashes between them, each of letters, digits, "
            "'_', '.' and '-', the first a letter or a digit."
        )


def copy(source: Path, scratch: Path) -> None:
    """Copies what an adapter consists of, and nothing else that lies beside it."""
    for name in KEPT:
        if (source / name).is_file():
            check_file(source / name)
            shutil.copyfile(source / name, scratch / name)


def signature(folder: Path) -> Signature:
    """What changes when a file of an adapter is written, without reading it; () where there is none."""
    found = []
    for name in READ:
        try:
            stat = os.stat(folder / name)
        except OSError:
            continue
        found.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def read(name: str, folder: Path, most: int) -> Entry:
    """Reads an adapter's folder with distrust.

    Raises:
        SmidgenError: it cannot be served: damaged, too large, of another kind, or being written just now.
    """
    for _ in range(3):
        before = signature(folder)
        found = _read(name, folder, before, most)
        if signature(folder) == before:
            return found
    raise AdapterFileError(f"The adapter {name!r} is being written; ask again when it is whole.")


def _read(name: str, folder: Path, before: Signature, most: int) -> Entry:
    as_folder(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise AdapterFileError(f"The adapter {name!r} has no {WEIGHTS_NAME}.")
    size = check_file(folder / WEIGHTS_NAME)
    if size > most:
        raise AdapterFileError(
            f"The adapter {name!r} has {size:,} bytes, more than the {most:,} that are allowed here (budget_bytes)."
        )
    origin = read_origin(folder)
    if hint.read_config(folder) is not None:
        raise ConfigError(f"The adapter {name!r} follows control images, which are not served: use smidgen generate.")
    if others := component_folders(folder):
        raise ConfigError(
            f"The adapter {name!r} also changes the {others[0].name}, which rows of one batch share; it is not served: use "
            "smidgen generate, or train it without --train-text-encoder."
        )
    if not is_ours(folder):
        kind = read_config(folder).get("peft_type")
        raise ConfigError(
            f"The adapter {name!r} is a {kind} of peft's, and adapters of its methods do not share a batch here."
        )
    config, tensors = read_adapter(folder)
    digest = hashlib.sha256()
    for file in READ:
        if (folder / file).is_file():
            content = (folder / file).read_bytes()
            digest.update(f"{file} {len(content)} ".encode() + content)
    count = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    return Entry(
        name, folder, before, digest.hexdigest()[:16], origin, count, structure(config), bool(config.modules_to_save)
    )


def _adapters(folder: Path, above: str, depth: int) -> Iterator[tuple[str, Path]]:
    """(name, folder) of the adapters below a folder."""
    try:
        inside = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return
    for entry in inside:
        path, name = Path(entry.path), f"{above}{entry.name}"
        if not above and entry.name.startswith(_HUB):
            snapshot, name = _snapshot(path), entry.name.removeprefix(_HUB).replace("--", "/", 1)
            if snapshot is not None:
                yield name, snapshot
        elif (path / CONFIG_NAME).is_file():
            if NAME.fullmatch(name):
                yield name, path
        elif depth > 1:
            yield from _adapters(path, f"{name}/", depth - 1)


def _snapshot(repository: Path) -> Path | None:
    """The folder of the Hub's cache that ``main`` names, if it holds an adapter."""
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = repository / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9a-f]{6,64}", commit) and (folder / CONFIG_NAME).is_file() else None
