"""Checksums: an adapter's config tells what its two files held when they were saved.

``checksum`` in ``adapter_config.json`` holds two in base64: ``tensors``, the SHA-256 of every tensor of the file (names,
number formats, shapes and bytes, in the order of the names; heads included), and ``options``, 128 bits of that of every
option of the config that is not at its default. What others may write anew without harm (``FREE``: where the base lies, versions, the task) is not
an option. A flipped bit, or a config and weights of two saves, are told by them; they do not tell who wrote a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import AdapterFileError

KEY = "checksum"
FREE = frozenset(
    (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "task_type",
        "peft_type",
        "peft_version",
        "auto_mapping",
        KEY,
    )
)
_WRAP = "base_model.model."


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a file's tensors, whether or not peft's ``base_model.model.`` stands before their names.

    Example:
        >>> of_tensors({"residual_delta": torch.zeros(2)}) == of_tensors({"residual_delta": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((name.removeprefix(_WRAP), tensor) for name, tensor in tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _text(digest.digest())


def of_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The checksum of a config's options: sets are lists in order, what is at its default is left out."""
    kept = {n: value for n, value in options.items() if n not in FREE and not (n in defaults and value == defaults[n])}
    return _text(hashlib.sha256(json.dumps(kept, sort_keys=True, default=sorted).encode()).digest()[:16])


def check_tensors(wanted: str | None, tensors: Mapping[str, Tensor], where: str) -> None:
    """Holds the tensors of a file against the checksum in its config, if there is one.

    Raises:
        AdapterFileError: they are not those that were saved with this config.
    """
    if wanted is not None and of_tensors(tensors) != wanted:
        raise AdapterFileError(
            f"{where}: the tensors in adapter_model.safetensors are not those that were saved with this adapter_config.json "
            "(their SHA-256 differs): the file was damaged or changed, or the two are from different saves. Copy both again "
            f'from their source; if you changed the tensors on purpose, take "{KEY}" out of the config.'
        )


def _text(digest: bytes) -> str:
    return base64.b64encode(digest).decode().rstrip("=")
