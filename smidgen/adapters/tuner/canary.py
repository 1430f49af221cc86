"""The canary: a fingerprint of what an adapter does to each layer, taken at save and re-checked by ``verify``.

For each target the delta W (T - I) + D is sketched by its norm and a few bilinear probes (as the base lock sketches
weights). On the right base the rebuilt delta has the same sketch; wrong factors, a wrong base or a half-loaded file
do not.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.adapters.checkpoint.base_lock import PROBES, sketch
from smidgen.adapters.tuner.layer import ShiftLayer
from smidgen.errors import AdapterFileError


def delta_sketches(layers: Mapping[str, ShiftLayer], adapter_name: str) -> Tensor:
    """[layers, 1 + PROBES] fp32 over the sorted names: norm and probes of each delta matrix."""
    return torch.stack([sketch(layers[name].delta_matrix(adapter_name)) for name in sorted(layers)])


def make_canary(layers: Mapping[str, ShiftLayer], adapter_name: str) -> dict[str, Any]:
    """The canary of an adapter, JSON-ready."""
    with torch.no_grad():
        sketches = delta_sketches(layers, adapter_name)
    return {"sketch": base64.b64encode(sketches.numpy().astype("<f4").tobytes()).decode()}


def read_canary(canary: Mapping[str, Any], layers: int) -> Tensor:
    """[layers, 1 + PROBES] of a stored canary.

    Raises:
        AdapterFileError: damaged.
    """
    try:
        raw = np.frombuffer(base64.b64decode(canary["sketch"], validate=True), dtype="<f4").astype(np.float32)
        return torch.from_numpy(raw.reshape(layers, 1 + PROBES).copy())
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"canary in adapter_config.json is damaged ({error}); restore the file.") from error


def delta_error(stored: Tensor, found: Tensor) -> float:
    """Estimated relative difference of two sets of deltas, over all layers."""
    change = ((found - stored)[:, 1:] ** 2).mean(dim=1).sum()
    size = (stored[:, 0] ** 2).sum()
    return float((change / size).sqrt()) if size > 0 else float(change.sqrt())
