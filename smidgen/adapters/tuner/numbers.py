"""The numbers of a save: the live model's, or those of a state dict handed to it.

A moving average, the best step, shards that were gathered: what is given is what is written, and lock and canary are of
the numbers written. Names are the model's own, however it was wrapped when the state dict was taken.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.tuner.shards import in_pieces, whole, why_partial
from smidgen.errors import SmidgenError

logger = logging.getLogger("smidgen")

_WRAPPERS = ("module.", "base_model.model.")  # of DistributedDataParallel and averaged models; of peft
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass
class Numbers:
    """What is written of an adapter.

    Attributes:
        stored: target -> stored tensors by full name, whole and detached.
        heads: tensors of the heads in modules_to_save, named as in the file.
        weights: target -> base weight as its layer holds it, where the live model has only a piece of it.
        base: all tensors of the given state dict by their names in the base model, None where none was given.
        frozen: full names of the factors among the stored tensors.
    """

    stored: dict[str, dict[str, Tensor]]
    heads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] | None = None
    frozen: frozenset[str] = frozenset()

    def held(self, name: str, live: Tensor, piece: bool = False) -> Tensor:
        """A tensor of the base model, whole: the live one, or the given one where the live one is (known as) a piece.

        Raises:
            SmidgenError: there is neither.
        """
        piece = piece or in_pieces(live) or tuple(getattr(live, "ds_shape", live.shape)) != tuple(live.shape)
        if not piece:
            return live
        given = None if self.base is None else self.base.get(name)
        if given is None and (self.base is not None or not in_pieces(live)):
            raise SmidgenError(
                f"{name!r} of the base is not here whole, and the base lock is made of it: save without a state dict on every "
                "process (FSDP2), give a full state dict that holds the base's tensors, or save within "
                "deepspeed.zero.GatheredParameters."
            )
        return whole((live if given is None else given).detach())


def plain_name(key: str) -> str:
    """A name of a state dict without what wrappers put into it.

    Example:
        >>> plain_name("module._orig_mod.base_model.model.encoder.weight")
        'encoder.weight'
    """
    for inside in _INSIDE:
        key = key.replace(inside, "")
    while key.startswith(_WRAPPERS):
        key = key.removeprefix(next(w for w in _WRAPPERS if key.startswith(w)))
    return key


def base_name(name: str) -> str:
    """The name of a tensor in the base model, without adapters' wrapping: ``up.base_layer.bias`` is ``up.bias``."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


@torch.no_grad()
def collect(
    layers: Mapping[str, Any],
    adapter_name: str,
    live: Mapping[str, Mapping[str, Tensor]],
    heads: Mapping[str, tuple[str, Tensor]],
    given: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Numbers:
    """The numbers of an adapter as they are to be written, before they are rounded.

    Args:
        layers: adapted layers by target.
        adapter_name: its name in the model.
        live: target -> stored tensors by full name, as the model has them.
        heads: name in the file -> (name in the model's state dict, tensor) of the heads it trained.
        given: a state dict of the model, wrapped or not, or the adapter's own (``get_peft_model_state_dict``). Frozen
            tensors that it leaves out are the live model's.
        dtype: number format of an adapter's own state dict, as in its config.

    Raises:
        SmidgenError: it lacks trained numbers, has others' shapes or pins, or what is to be written is not finite or not
            here whole.
    """
    named = None if given is None else {plain_name(k): v for k, v in given.items() if isinstance(v, Tensor)}
    slots = {target: layer.smidgen_slots[adapter_name] for target, layer in layers.items()}
    packed = {k: v for k, v in (named or {}).items() if packing.is_packed(k)}
    found = Numbers({}, base=None if named is None else {base_name(k): v for k, v in named.items()})
    if packed:
        where, layout = "the given state dict", {t: slot.layout() for t, slot in slots.items()}
        unpacked = packing.unpack(packing.decode(packed, dtype, where), layout, where)
    for target, slot in slots.items():
        found.stored[target] = own = {}
        for name, mine in live[target].items():
            key = plain_name(f"{target}.smidgen_slots.{adapter_name}.{name}")
            value = mine if named is None else unpacked[target].get(name) if packed else named.get(key)
            if value is None and name in slot.trained():
                raise SmidgenError(_missing(key, adapter_name))
            shape, kind = slot.layout(store_factors=True)[name]
            own[name] = _checked(key, mine if value is None else value, shape)
            if name in slot.pins:
                if not torch.equal(own[name].cpu().long(), mine.cpu().long()):
                    raise SmidgenError(
                        f"{key} of the given state dict is not the model's: its numbers go with other factors, of another "
                        "base. Load that adapter, or give a state dict of this model."
                    )
                own[name] = own[name].to(kind)
        if why_partial(base := layers[target].get_base_layer()):
            found.weights[target] = found.held(f"{target}.weight", base.weight, piece=True)
    for name, (key, mine) in heads.items():
        key = plain_name(key)
        value = mine if named is None else named.get(key, named.get(plain_name(name)))
        if value is None:
            raise SmidgenError(_missing(key, adapter_name))
        found.heads[name] = _checked(key, value, tuple(getattr(mine, "ds_shape", mine.shape)))
    _check_finite(found, adapter_name)
    residuals = [slot.residual for slot in slots.values() if slot.residual is not None]
    found.frozen = frozenset(f"residual_{name}" for residual in residuals for name in residual.factor_shapes())
    return found


@torch.no_grad()
def rounded(found: Numbers, dtype: str, adapter_name: str) -> Numbers:
    """Numbers as they come back from a file of a number format: what is in it is what lock and canary are of.

    Raises:
        AdapterFileError: a number that the format cannot hold.
    """
    if dtype == "float32":
        return found
    packed = packing.pack(found.stored)
    kept = packing.decode(packing.encode(packed, dtype, found.frozen), dtype, "this adapter")
    layout = {t: {n: (tuple(v.shape), v.dtype) for n, v in own.items()} for t, own in found.stored.items()}
    back = packing.unpack(kept, layout)
    stored = {
        target: {n: back[target][n].to(v.device, torch.float32) if v.is_floating_point() else v for n, v in own.items()}
        for target, own in found.stored.items()
    }
    heads = packing.encode(found.heads, packing.HALVES) if dtype in packing.CODES else found.heads
    _say_lost(packed, kept, dtype, found.frozen, adapter_name)
    return replace(found, stored=stored, heads=heads)


MOST_ROUNDED = 0.2  # |rounded - number| / |number|, above which a save says so


def _say_lost(
    packed: Mapping[str, Tensor], kept: Mapping[str, Tensor], dtype: str, frozen: Collection[str], adapter_name: str
) -> None:
    trained = [name for name, value in packed.items() if value.is_floating_point() and name not in frozen]
    whole = sum(float(packed[name].double().square().sum()) for name in trained)
    lost = sum(float((packed[name].double() - kept[name].double()).square().sum()) for name in trained)
    if lost > MOST_ROUNDED**2 * whole:
        logger.warning(
            "Rounded to %s for its file, the numbers of adapter %r change by %.0f%% of their size. Score it as it comes back from the "
            "file, or save it with store_dtype=%r.",
            dtype,
            adapter_name,
            100 * (lost / whole) ** 0.5,
            "int8" if dtype == "int4" else "float16" if dtype == "int8" else "float32",
        )


def _missing(key: str, adapter_name: str) -> str:
    return (
        f"The given state dict holds no {key!r}, which adapter {adapter_name!r} trained: give one of this model, as "
        "model.state_dict() makes it, on every process that saves."
    )


def _checked(key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = whole(value.detach())
    if tuple(value.shape) != shape:
        raise SmidgenError(
            f"{key} has shape {tuple(value.shape)}, it should be {shape}. Where a sharded model keeps a piece of it, gather "
            "it first (deepspeed.zero.GatheredParameters) and save within, or give the gathered state_dict."
        )
    return value


def _check_finite(found: Numbers, adapter_name: str) -> None:
    tensors = {f"{t}.{n}": v for t, own in found.stored.items() for n, v in own.items()} | found.heads
    bad = [name for name, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise SmidgenError(
            f"Adapter {adapter_name!r} holds NaN or infinite numbers in {len(bad)} of {len(tensors)} tensors, the first "
            f"{bad[0]!r}: not saved, no file of it could be loaded. The training diverged; lower the learning rate, or save "
            "the state dict of an earlier step (state_dict=)."
        )


def renamed(given: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of the model's own; what it has besides is left out."""
    named = {plain_name(key): value for key, value in given.items()}
    return {key: named[plain_name(key)] for key in live if plain_name(key) in named}


def check_complete(tensors: Mapping[str, Any], wanted: Mapping[str, Any], adapter_name: str) -> None:
    """What was taken from a given state dict must be all that the adapter has.

    Raises:
        SmidgenError: naming what it lacks.
    """
    for key in wanted:
        if key not in tensors:
            raise SmidgenError(_missing(key, adapter_name))
