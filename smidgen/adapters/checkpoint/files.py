"""Reading an adapter folder with distrust: sizes, headers and JSON are checked before any tensor is made."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from smidgen.adapters.atomic import settle
from smidgen.errors import AdapterFileError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
RECIPE_ENDING = ".recipe"  # of a file that stands for an adapter; smidgen.difflora.use.recipes makes that of it
_MAX_CONFIG = 4 * 2**20
_MAX_DEPTH, _MAX_DIGITS = 12, 19
_PICKLES = ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``adapter_config.json`` of a folder as a dictionary.

    Raises:
        AdapterFileError: no folder or file, too large, no JSON object; a key twice, numbers or nesting beyond all reason.
    """
    folder = as_folder(path)
    file = folder / CONFIG_NAME
    if not os.path.lexists(file):
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        more = (
            f" {LORA_NAME} is what diffusers writes: load_lora_weights or load_lora_adapter of diffusers reads a LoRA from it; "
            "of an adapter of smidgen's it does not hold the config, so save that with smidgen.save."
        )
        more = more if (folder / LORA_NAME).is_file() else ""
        raise AdapterFileError(f"{folder} has no {CONFIG_NAME} (it holds: {found}).{more}")
    return parse_config(_read(file, _MAX_CONFIG), str(file))


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """The options in the bytes of a config.

    Raises:
        AdapterFileError: as :func:`read_config`.
    """
    try:
        data = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite
        )
        check_values(data)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where} is not valid JSON ({error}); restore it from the original adapter.") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{where} holds a {type(data).__name__}, not an object of options.")
    return data


def check_values(data: Any) -> None:
    """Refuses what no config holds: values nested deeper than ``_MAX_DEPTH``, numbers without end, half characters.

    Raises:
        ValueError: saying what.
    """
    level = [data]
    for _ in range(_MAX_DEPTH):
        for value in level:
            if isinstance(value, str):
                value.encode()  # a surrogate alone is a ValueError
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value} is no number that an option can have")
            elif isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
                raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list | tuple | set)
            for inner in (value if not isinstance(value, dict) else (*value, *value.values()))
        ]
        if not level:
            return
    raise ValueError(f"values are nested more than {_MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS + 1:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if len(text) > 64 or not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number that an option can have")
    return value


def is_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that stands for an adapter."""
    return Path(os.fsdecode(path)).suffix == RECIPE_ENDING and Path(os.fsdecode(path)).is_file()


def as_folder(path: str | os.PathLike[str]) -> Path:
    """A path as a folder that is there.

    Raises:
        AdapterFileError: it is none, or cannot be looked at.
    """
    try:
        folder = Path(os.fsdecode(path))
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError("a file")
        next(iter(os.scandir(folder)), None)
    except (OSError, ValueError, TypeError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise AdapterFileError(
            f"{_shown(path)} is no folder that can be read{why}; an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from error
    try:
        settle(folder)
    except OSError as error:
        raise AdapterFileError(
            f"{folder} holds the files of a save that was interrupted, and they cannot be put in place ({error.strerror}); make the "
            "folder writable, or save the adapter again."
        ) from error
    return folder


def check_file(file: Path) -> int:
    """The size of an ordinary file; what may wait or never end (a pipe, a device, a socket) is not opened.

    Raises:
        AdapterFileError: there is no such file, or something else under its name.
    """
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterFileError(f"{_shown(file)} cannot be read ({why}).") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "device")
        raise AdapterFileError(f"{_shown(file)} is a {kind}, not a file; copy the adapter again from its source.")
    return found.st_size


def _read(file: Path, most: int) -> bytes:
    size = check_file(file)
    if size > most:
        raise AdapterFileError(f"{file} is {size:,} bytes; a config has at most {most:,}.")
    try:
        with file.open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read ({error.strerror}).") from error


def _shown(path: object) -> str:
    text = str(path) if isinstance(path, str | os.PathLike) else repr(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` of a folder. Pickle files are never opened.

    Raises:
        AdapterFileError: missing, truncated or otherwise broken.
    """
    file = as_folder(path) / WEIGHTS_NAME
    if not os.path.lexists(file):
        pickles = [name for name in _PICKLES if (Path(path) / name).exists()]
        more = f" {pickles[0]} is a pickle file, which can run code and is never read." if pickles else ""
        raise AdapterFileError(f"{path} has no {WEIGHTS_NAME}.{more}")
    return read_safetensors(file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        AdapterFileError: missing, truncated or otherwise broken.
    """
    size = check_file(file)
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise AdapterFileError(
            f"{file} ({size:,} bytes) is truncated or not a safetensors file ({error}); copy it again from its source."
        ) from error


def public_name(base: str) -> str:
    """A base's name without the path it lies under, and without a hub revision: files that travel do not tell about this machine.

    Example:
        >>> public_name("/home/ann/sd15"), public_name("owner/name@main")
        ('sd15', 'owner/name')
    """
    path = Path(base).expanduser()
    return path.resolve().name if base and (path.is_absolute() or path.exists()) else base.partition("@")[0]
