"""From a config to an adapter at one layer: its members, its slot, its rank."""

from __future__ import annotations

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from smidgen.adapters import methods
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.linalg.svd import energy_rank
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis
from smidgen.adapters.tuner import targets
from smidgen.adapters.tuner.base import base_matrix
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.adapters.tuner.slot import Members, Slot, Spec, layout_of
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, shown

_MOST_NUMBERS = 64  # trained for each number of a weight, more than any adapter has use for: before they are made


def make_slot(config: SmidgenConfig, layer: nn.Module, target: str, size: int | None = None) -> Slot:
    """A fresh slot for a base layer; ``size`` adapters of a bank if given."""
    ties = config.ties.get(target)
    kept = None if ties is None else packing.decode_ties(ties, target)
    return Slot(members_of(config, layer, target), f"{config.seed}/{target}", config.store_factors, size, kept)


def slot_layout(config: SmidgenConfig, layer: nn.Module, target: str) -> dict[str, Spec]:
    """What :func:`make_slot` would store, without making it."""
    return layout_of(members_of(config, layer, target), config.store_factors)


def rank_at(config: SmidgenConfig, target: str) -> int | str | None:
    """The r that a config asks for at a target, None for the residual's own."""
    ranks = config.rank_pattern
    return ranks[target] if target in ranks else ranks.get(get_pattern_key(ranks.keys(), target), config.r)  # type: ignore[arg-type]


def members_of(config: SmidgenConfig, layer: nn.Module, target: str) -> Members:
    """The members of a config at a base layer.

    Raises:
        ConfigError: an option that has no meaning at this geometry.
    """
    kind = kind_of(layer)
    assert kind is not None
    width, rows, cols, groups = kind.geometry(layer)
    options, r = dict(config.residual_options), rank_at(config, target)
    if r is not None and config.residual:
        options["r"] = r
    try:
        stacked = kind.name == "experts"  # whose rows are those of one
        members = methods.make_members(config, options, width, rows, cols, 1 if stacked else groups)
        trained = sum(member.count() for member in members if member is not None)
    except SmidgenError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        given = shown(config.transform_options | options | config.output_options)
        raise ConfigError(f"An option of {config.label()} has a value of the wrong type: {given} ({error}).") from error
    if trained > _MOST_NUMBERS * rows * cols + 2**20:
        raise ConfigError(
            f"{config.label()} would train {trained:,} numbers for a weight of {rows} x {cols} at {target!r}; take a smaller rank."
        )
    if config.old and isinstance(members[1], DiagonalInBasis):
        _check_alpha_of_old(members[1], target)
    return Members(*members, groups, stacked)


def _check_alpha_of_old(residual: DiagonalInBasis, target: str) -> None:
    """Files from before they had a checksum divided alpha by the r that a matrix had room for, and clamped before it.

    Raises:
        AdapterFileError: one whose effect that changes.
    """
    if residual.scale != 1 and (residual.asked > residual.r or getattr(residual, "nonneg", False)):
        raise AdapterFileError(
            f"This adapter was saved when alpha was divided by the r that a matrix has room for (at {target!r} {residual.r}, "
            f"asked for were {residual.asked}) and nonneg clamped before alpha: its effect would change. Load it with the "
            "version that wrote it, or train it again."
        )


def resolve_energy(config: SmidgenConfig, chosen: dict[str, nn.Module]) -> None:
    """``r="energy:0.99"`` becomes one r a layer in ``rank_pattern``, so that the file fixes it."""
    if not (isinstance(config.r, str) and config.r.startswith("energy:")):
        return
    share = targets.parse_energy(config.r, config.residual)
    for name, matrix in ((n, base_matrix(m)) for n, m in chosen.items() if n not in config.rank_pattern):
        values = torch.linalg.svdvals(matrix.float()).reshape(-1, min(matrix.shape[-2:]))
        config.rank_pattern[name] = max(energy_rank(own, share) for own in values)  # experts share one
