"""The canary: a fingerprint of what an adapter does to its layers, taken at save and re-checked by ``verify``.

The deltas W (T - I) + D of all targets are sketched together by their norm and a few probes (as the base lock sketches
weights). On the right base the rebuilt deltas have the same sketch; wrong factors, a wrong base or a half-loaded file do
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.checkpoint.base_lock import PROBES, decode, encode, pool, sketch
from smidgen.adapters.tuner.layer import ShiftLayer
from smidgen.adapters.tuner.numbers import Numbers
from smidgen.errors import AdapterFileError


def delta_sketches(layers: Mapping[str, ShiftLayer], adapter_name: str, numbers: Numbers | None = None) -> Tensor:
    """[layers, 2 + PROBES] fp32 over the sorted names: norm and probes of each delta matrix, of the live numbers or others."""
    own = Numbers({}) if numbers is None else numbers
    deltas = (layers[n].delta_matrix(adapter_name, own.stored.get(n), own.weights.get(n)) for n in sorted(layers))
    return torch.stack([sketch(delta.flatten(0, -2)) for delta in deltas])


def make_canary(layers: Mapping[str, ShiftLayer], adapter_name: str, numbers: Numbers) -> dict[str, Any]:
    """The canary of an adapter with these numbers, JSON-ready."""
    with torch.no_grad():
        made = {"sketch": encode(pool(delta_sketches(layers, adapter_name, numbers)), "<f4")}
        return made | ({"heads": encode(pool(head_sketches(numbers.heads)), "<f4")} if numbers.heads else {})


def head_sketches(heads: Mapping[str, Tensor]) -> Tensor:
    """[tensors, 2 + PROBES] fp32 over the sorted names: norm and probes of each tensor of the heads."""
    values = [heads[name] for name in sorted(heads)]
    return torch.stack([sketch(value.flatten(1) if value.ndim > 1 else value.reshape(1, -1)) for value in values])


def read_canary(canary: Mapping[str, Any], of: str = "sketch") -> Tensor:
    """[1 + PROBES] of a stored canary: of the deltas, or of the ``heads``.

    Raises:
        AdapterFileError: damaged.
    """
    try:
        return decode(canary[of], "<f4", 1 + PROBES)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"canary in adapter_config.json is damaged ({error}); restore the file.") from error


def delta_error(stored: Tensor, sketches: Tensor) -> float:
    """Estimated relative difference of stored deltas [1 + PROBES] and those with ``sketches`` [layers, 2 + PROBES]."""
    change = float(((pool(sketches) - stored)[1:] ** 2).mean()) ** 0.5
    size = float(stored[0])
    return change / size if size > 0 else change
