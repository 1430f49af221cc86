"""API keys: a JSON file of their hashes, and what each may do.

    {"ann": {"sha256": "9f86...", "adapters": ["ann/*", "house"], "write": false}}

A key is 256 random bits, so a plain hash of it cannot be searched. It is shown once, when it is made.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from smidgen.adapters.atomic import new_file
from smidgen.errors import ConfigError, did_you_mean

logger = logging.getLogger("smidgen")

PREFIX = "sk-smidgen-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Key:
    """Who asks: a name for the log, the adapters it may use, and whether it may add and delete those."""

    name: str
    sha256: str = ""
    adapters: tuple[str, ...] = ("*",)  # names or patterns (ann/*)
    write: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether this key's adapters include ``adapter``."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYONE = Key("anyone", write=True)  # asks a server without keys


def hashed(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file by name.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = {
            name: Key(name, str(row["sha256"]), tuple(map(str, row["adapters"])), row["write"] is True)
            for name, row in found.items()
        }
        if wrong := [name for name, key in keys.items() if not re.fullmatch("[0-9a-f]{64}", key.sha256)]:
            raise ValueError(f"the key {wrong[0]!r} has no SHA-256 hash")
        return keys
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no API keys ({error}); `smidgen keys add` writes such a file.") from error


def add_key(path: Path, name: str, adapters: Sequence[str] = ("*",), write: bool = False) -> str:
    """Adds a key to a file, which need not be there yet; returns the key itself, which is written nowhere.

    Raises:
        ConfigError: the name is taken or none, or no adapter is named.
    """
    keys = read_keys(path) if os.path.lexists(path) else {}
    if not _NAME.fullmatch(name):
        raise ConfigError(f"A key's name is up to 64 letters, digits, '.', '_', '@' or '-', not {name[:100]!r}.")
    if name in keys:
        raise ConfigError(f"{path} has a key {name!r} already; remove it first, or choose another name.")
    if not adapters or not all(adapters):
        raise ConfigError("Name the adapters of the key, or '*' for all.")
    secret = PREFIX + secrets.token_urlsafe(32)
    _write(path, keys | {name: Key(name, hashed(secret), tuple(adapters), write)})
    return secret


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of a file; a server that runs refuses it from its next request on."""
    keys = read_keys(path)
    if name not in keys:
        raise ConfigError(f"{path} has no key {name!r}.{did_you_mean(name, keys)}")
    _write(path, {other: key for other, key in keys.items() if other != name})


def _write(path: Path, keys: Mapping[str, Key]) -> None:
    rows = {name: {k: v for k, v in asdict(key).items() if k != "name"} for name, key in keys.items()}
    with new_file(path) as beside:
        beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path.chmod(0o600)


class Keyring:
    """The keys of a server; the file is read again when it has changed, so that a key removed is a key refused."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seen: object = None
        self._keys: tuple[Key, ...] = ()
        if path is not None:
            self._read()

    def find(self, authorization: str | None) -> Key | None:
        """The key of an ``Authorization`` header; ``ANYONE`` on a server without keys, None where it is wrong or missing."""
        if self.path is None:
            return ANYONE
        self._read()
        given = hashed(_secret(authorization or ""))
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, given)]  # each is compared
        return matches[0] if matches else None

    def _read(self) -> None:
        assert self.path is not None
        try:
            found = self.path.stat()
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            mark = None
        if self._seen == (mark,):
            return
        try:
            self._keys = tuple(read_keys(self.path).values())
        except ConfigError as error:
            if self._seen is None:
                raise
            logger.error("Nobody is let in until the file of keys can be read again: %s", error)
            self._keys = ()
        self._seen = (mark,)


def _secret(authorization: str) -> str:
    """The key in ``Bearer KEY``, or in ``Basic base64(NAME:KEY)``, which is what browsers send after they asked."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return ""
