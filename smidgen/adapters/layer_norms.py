"""How much an adapter file changes each layer, told without the base model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.base_lock import read_lock
from smidgen.adapters.checkpoint.formats import Lora
from smidgen.adapters.methods import make_members
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.tuner.building import rank_at
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.slot import Members, layout_of
from smidgen.errors import SmidgenError


def lora_norm(lora: Lora) -> float:
    """|s b a| of a layer, through the small Gram matrices of its factors."""
    b, a = lora.b.double(), lora.a.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt()) * abs(lora.scale)


def layer_norms(own: SmidgenConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], str]:
    """(layer -> norm, what is measured) of a file of ours: the update of a plain lora, the trained numbers of all others.
    Empty where the file does not say which numbers are whose: without a lock, and for transforms of convolutions."""
    if not own.base_lock:
        return {}, ""
    lock = read_lock(own.base_lock)
    members = {}
    for name, (rows, cols) in zip(lock.targets, lock.shapes, strict=True):
        r = rank_at(own, name)
        options = own.residual_options | ({} if r is None or not own.residual else {"r": r})
        try:
            members[name] = Members(*make_members(own, options, cols, rows, cols))
        except (SmidgenError, TypeError):
            return {}, ""
    packed = {name: value for name, value in tensors.items() if packing.is_packed(name)}
    layout = {name: layout_of(member, own.store_factors) for name, member in members.items()}
    sizes = {key: sum(prod(one[key][0]) for one in layout.values() if key in one) for key in packed}
    if any(value.numel() != sizes[key] for key, value in packed.items()):
        return {}, ""
    plain = own.residual == LowRank.name and not own.transform and not own.output
    norms = {}
    for name, found in packing.unpack(packed, layout).items():
        residual = members[name].residual
        if plain and isinstance(residual, LowRank):
            norms[name] = lora_norm(Lora(found["residual_b"], found["residual_a"], residual.scale))
        else:
            trained = [v.double() for v in found.values() if v.is_floating_point()]
            norms[name] = float(sum(v.square().sum() for v in trained) ** 0.5)
    return norms, "update" if plain else "trained numbers"
