"""Reading an adapter folder with distrust: sizes, headers and JSON are checked before any tensor is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from smidgen.errors import AdapterFileError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
_MAX_CONFIG = 64 * 2**20
_PICKLES = ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``adapter_config.json`` of a folder as a dictionary.

    Raises:
        AdapterFileError: no folder or file, too large, no JSON object.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is no folder; an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}.")
    file = folder / CONFIG_NAME
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        more = (
            f" {LORA_NAME} is what diffusers writes: load_lora_weights or load_lora_adapter of diffusers reads a LoRA from it; "
            "of an adapter of smidgen's it does not hold the config, so save that with smidgen.save."
        )
        more = more if (folder / LORA_NAME).is_file() else ""
        raise AdapterFileError(f"{folder} has no {CONFIG_NAME} (it holds: {found}).{more}")
    if file.stat().st_size > _MAX_CONFIG:
        raise AdapterFileError(f"{file} is {file.stat().st_size:,} bytes; a config has at most {_MAX_CONFIG:,}.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterFileError(f"{file} is not valid JSON ({error}); restore it from the original adapter.") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{file} holds a {type(data).__name__}, not an object of options.")
    return data


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` of a folder. Pickle files are never opened.

    Raises:
        AdapterFileError: missing, truncated or otherwise broken.
    """
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        pickles = [name for name in _PICKLES if (Path(path) / name).exists()]
        more = f" {pickles[0]} is a pickle file, which can run code and is never read." if pickles else ""
        raise AdapterFileError(f"{path} has no {WEIGHTS_NAME}.{more}")
    return read_safetensors(file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        AdapterFileError: missing, truncated or otherwise broken.
    """
    if not file.is_file():
        raise AdapterFileError(f"{file} is not there.")
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size
        raise AdapterFileError(
            f"{file} ({size:,} bytes) is truncated or not a safetensors file ({error}); copy it again from its source."
        ) from error
