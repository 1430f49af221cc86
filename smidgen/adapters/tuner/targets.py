"""Which modules an adapter goes on: every name must hit something that can carry it, or an error with near names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from smidgen.adapters.tuner.kinds import KIND_NAMES, kind_of
from smidgen.errors import ConfigError, TargetError, did_you_mean


def check_names(target_modules: Iterable[str] | str | None, names: list[str], matched: list[str]) -> None:
    """Every entry of ``target_modules`` must match a module.

    Args:
        target_modules: names or ends of names, or one regular expression.
        names: names of all modules of the model.
        matched: names that matched as a whole (after excludes).

    Raises:
        TargetError: with the nearest names there are.
    """
    if target_modules is None or target_modules == "all-linear":
        return
    ends = sorted({n.rpartition(".")[2] for n in names if n})
    if isinstance(target_modules, str):
        if not matched:
            raise TargetError(
                f"target_modules {target_modules!r} (a regular expression that must match a whole module name) matches "
                f"nothing.{did_you_mean(target_modules.rpartition('.')[2], ends)} Modules end in: {_some(ends)}."
            )
        return
    for entry in sorted(target_modules):
        if not any(n == entry or n.endswith(f".{entry}") for n in names):
            near = did_you_mean(entry, names) if "." in entry else did_you_mean(entry, ends)
            raise TargetError(f"target_modules: no module is named {entry!r}.{near} Modules end in: {_some(ends)}.")
    if not matched:
        raise TargetError(f"target_modules {sorted(target_modules)} are all excluded or left out by other options.")


def check_layer(name: str, layer: nn.Module) -> None:
    """A target must be of a supported kind.

    Raises:
        TargetError: naming its class and what is supported.
    """
    if kind_of(layer) is None:
        raise TargetError(f"Target {name!r} is a {type(layer).__name__}; adapters go on {', '.join(KIND_NAMES)}.")


def _some(ends: list[str], most: int = 20) -> str:
    named = [e for e in ends if not e.isdigit()]
    return ", ".join(named[:most]) + (", ..." if len(named) > most else "")


def parse_energy(r: str, residual: str | None) -> float:
    """The share e of ``r="energy:e"``.

    Raises:
        ConfigError: no share in (0, 1], or a residual without singular values.
    """
    try:
        share = float(r.removeprefix("energy:"))
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ConfigError(f"r='energy:SHARE' takes a share above 0 and at most 1, e.g. 'energy:0.99'; got {r!r}.")
    if residual != "spectral":
        raise ConfigError(f"r={r!r} needs singular values: the 'spectral' residual (svfit), not {residual!r}.")
    return share
