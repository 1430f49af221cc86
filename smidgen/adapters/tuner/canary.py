"""The canary: a fingerprint of what an adapter does to its layers, taken at save and re-checked by ``verify``.

The deltas W (T - I) + D of all targets are sketched together by their norm and a few probes (as the base lock sketches
weights). On the right base the rebuilt deltas have the same sketch; wrong factors, a wrong base or a half-loaded file do
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.checkpoint.base_lock import PROBES, decode, encode, pool, sketch
from smidgen.adapters.tuner.layer import ShiftLayer
from smidgen.adapters.tuner.numbers import Numbers
from smidgen.errors import AdapterFileError, BaseLockError

# Largest relative error of rebuilt deltas: same base (other thread count or device), same base re-cast (what
# benchmarks/portability.py measures, with stored pivots), and with ties (singular values that are equal or zero).
CANARY_SAME, CANARY_CAST, CANARY_TIES = 2e-3, 0.15, 7e-3


def deltas(layers: Mapping[str, ShiftLayer], adapter_name: str, numbers: Numbers | None = None) -> Iterator[Tensor]:
    """The delta matrix of each layer, one at a time, over the sorted names: of the live numbers or others."""
    own = Numbers({}) if numbers is None else numbers
    return (layers[n].delta_matrix(adapter_name, own.stored.get(n), own.weights.get(n)) for n in sorted(layers))


def delta_sketch(delta: Tensor) -> Tensor:
    """[2 + PROBES] fp32: norm and probes of a delta matrix."""
    return sketch(delta.flatten(0, -2))


def delta_sketches(layers: Mapping[str, ShiftLayer], adapter_name: str, numbers: Numbers | None = None) -> Tensor:
    """[layers, 2 + PROBES] fp32 over the sorted names: :func:`delta_sketch` of each of :func:`deltas`."""
    return torch.stack([delta_sketch(delta) for delta in deltas(layers, adapter_name, numbers)])


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


def check_deltas(config: Any, layers: Mapping[str, ShiftLayer], adapter_name: str) -> None:
    """Refuses an adapter whose factors, made of this base's weights, are not those that it was trained with.

    Raises:
        BaseLockError: with the measured difference.
    """
    slots = [layer.slot(adapter_name) for layer in layers.values()]
    if not config.canary or config.store_factors or not any(s.residual and s.residual.decomposes for s in slots):
        return
    most = CANARY_TIES if config.ties else CANARY_CAST
    with torch.no_grad():
        error = delta_error(read_canary(config.canary), delta_sketches(layers, adapter_name))
    if not error <= most:
        raise BaseLockError(
            f"The adapter's factors, made of this base's weights, give deltas that differ by {error:.1%} from those it was "
            f"saved with (at most {most:.1%} is accepted{', as some of its weights have ties' if config.ties else ''})."
            f"{moving_advice(config)}"
        )


def moving_advice(config: Any) -> str:
    """What would move an adapter to this base, where something would."""
    if config.transform or config.output or config.store_factors:
        return ""
    return (
        " To move it here, save it with smidgen.save(..., store_factors=True) from a model on which it works: such a file "
        "goes on any base of these shapes."
    )


def delta_error(stored: Tensor, sketches: Tensor) -> float:
    """Estimated relative difference of stored deltas [1 + PROBES] and those with ``sketches`` [layers, 2 + PROBES]."""
    change = float(((pool(sketches) - stored)[1:] ** 2).mean()) ** 0.5
    size = float(stored[0])
    return change / size if size > 0 else change
