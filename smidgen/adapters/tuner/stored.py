"""What an adapter's file holds of the adapter, and what its config says of the base it is saved on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.tuner import patterns
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.base import base_parts, rest_of
from smidgen.adapters.tuner.canary import make_canary
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.heads import named_heads
from smidgen.adapters.tuner.numbers import Numbers, collect, rounded
from smidgen.adapters.tuner.shards import why_partial
from smidgen.adapters.tuner.slot import Slot

logger = logging.getLogger("smidgen")

REBUILT = 1e-3  # relative error of deltas up to which factors count as made again; verify asks for twice that


def stored_tensors(layer: AdaptedLayer, adapter_name: str, store_factors: bool | None = None) -> dict[str, Tensor]:
    """Stored tensors of an adapter at a layer, its factors among them as it was made unless told; factors are made first
    if they are asked for or if pins depend on them."""
    slot = layer.smidgen_slots[adapter_name]
    assert isinstance(slot, Slot)
    if slot.residual is not None and (slot.residual.pins() or slot.store_factors or store_factors):
        slot = layer.slot(adapter_name)
    return slot.stored(store_factors)


def numbers(
    model: nn.Module, config: SmidgenConfig, adapter_name: str, given: Mapping[str, Any] | None = None
) -> Numbers:
    """What a save by this config writes of an adapter, from the live model or from a state dict, rounded as the file has it; see
    ``tuner/numbers.py``."""
    layers = adapted_layers(model, adapter_name)
    live = {target: stored_tensors(layer, adapter_name, config.store_factors) for target, layer in layers.items()}
    found = collect(layers, adapter_name, live, named_heads(model, adapter_name), given, config.store_dtype)
    return rounded(found, config.store_dtype, adapter_name)


def file_tensors(config: SmidgenConfig, found: Numbers) -> dict[str, Tensor]:
    """What an adapter's file holds, heads not included: packed, in the config's number format."""
    return packing.encode(packing.pack(found.stored), config.store_dtype, found.frozen)


@torch.no_grad()
def round_live(model: nn.Module, config: SmidgenConfig, adapter_name: str) -> None:
    """Gives an adapter in a model the numbers that its file will have."""
    found = numbers(model, config, adapter_name)
    for target, layer in adapted_layers(model, adapter_name).items():
        slot = layer.smidgen_slots[adapter_name]
        assert isinstance(slot, Slot)
        for name, value in slot.trained().items():
            value.copy_(found.stored[target][name])
    for name, (_, value) in named_heads(model, adapter_name).items():
        value.copy_(found.heads[name])


def settle(config: SmidgenConfig, layers: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Writes into the config of an adapter about to be saved the ties of its factors; and where the base weights changed
    since these were made, so that a file could not rebuild them, that they are stored."""
    if any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return
    here = {name for name, layer in layers.items() if not why_partial(layer.get_base_layer())}
    every = {
        n: layer.slot(adapter_name) if n in here else layer.smidgen_slots[adapter_name] for n, layer in layers.items()
    }
    slots = {n: s for n, s in every.items() if isinstance(s, Slot) and s.made_from}
    config.ties = {n: packing.encode_ties(s.ties) for n, s in slots.items() if s.ties is not None}
    moved = {name: layers[name].moved_since(slots[name]) for name in slots.keys() & here}
    if config.store_factors or not any(moved.values()) or _rebuilds(layers, slots, moved):
        return
    worst = max(moved, key=moved.__getitem__)
    config.store_factors = True
    logger.warning(
        "The base weights changed after the adapter was put in (that of %r by %.1e), so its factors cannot be made of them "
        "again: they are stored in the file, which is larger for it (store_factors=True). To keep files small, load or cast "
        "the base before the adapter is put in.",
        worst,
        moved[worst],
    )


def stamp(
    model: nn.Module, config: SmidgenConfig, layers: dict[str, AdaptedLayer], adapter_name: str, found: Numbers
) -> None:
    """Writes base lock and canary into the config of an adapter about to be saved."""
    if not layers or any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return
    if patterns.held(config):  # a file names its modules
        config.target_modules = set(layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    matrices = {n: layer.base_matrix(found.weights.get(n)).flatten(0, -2) for n, layer in layers.items()}
    config.base_lock = base_lock.make_lock(matrices, rest_of(base_parts(model, found), config, layers))
    config.mark_current().canary = make_canary(layers, adapter_name, found)


@torch.no_grad()
def _rebuilds(layers: dict[str, AdaptedLayer], slots: dict[str, Slot], moved: dict[str, float]) -> bool:
    """Whether the factors that base weights of now give make the deltas that the adapter has, as verify will ask."""
    off, size = 0.0, 0.0
    for name in (name for name, share in moved.items() if share > 0):
        slot, layer = slots[name], layers[name]
        again = Slot(slot.parts, slot.seed, size=slot.size, ties=slot.ties)
        again.fill(slot.trained() | {pin: getattr(slot, pin) for pin in slot.pins})
        again.to(next(slot.parameters()).device).prepare(layer.base_matrix)
        delta = slot.factors().dense()
        off += float((again.factors().dense() - delta).norm()) ** 2
        size += float(delta.norm()) ** 2
    return off <= REBUILT**2 * size
