"""The laws of adapters, shipped, so that a member written elsewhere is tested like the ones written here.

Example:
    >>> import smidgen
    >>> from smidgen import testing
    >>> testing.check(smidgen.config("svfit", r=4), kinds=["linear"], laws=["identity", "merge"])
    2

Laws are functions ``law_NAME(config, kind)`` that raise ``AssertionError`` with what was found; ``LAWS`` holds them by
name, ``LAYER_KINDS`` the layers they run on, and ``configs()`` every single member, every pair transform x residual and
every named method of the registries, so that a newcomer inherits all of it by being registered.
"""

from __future__ import annotations

from collections.abc import Iterable

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.testing.laws import LAWS, NOT_ON
from smidgen.testing.samples import (
    LAYER_KINDS,
    TOLERANCES,
    adapted,
    base,
    close,
    configs,
    differs,
    perturb,
    refused,
    same,
    snapshot,
    targeted,
    unchanged,
)


def check(config: SmidgenConfig, kinds: Iterable[str] | None = None, laws: Iterable[str] | None = None) -> int:
    """Runs laws for one config; the number of laws that held.

    Args:
        config: without targets; see :func:`smidgen.config`.
        kinds: names of ``LAYER_KINDS``; all that the config does not refuse unless given.
        laws: names of ``LAWS``; all unless given.

    Raises:
        AssertionError: a law does not hold, named with the layer kind.
    """
    held = 0
    for kind in kinds or [k for k in LAYER_KINDS if not refused(config, k)]:
        for law in laws or LAWS:
            if kind in NOT_ON.get(law, ()):
                continue
            try:
                LAWS[law](config, kind)
            except AssertionError as error:
                raise AssertionError(f"law {law!r} does not hold for {config.label()} on {kind!r}: {error}") from error
            held += 1
    return held


__all__ = [
    "LAWS",
    "LAYER_KINDS",
    "NOT_ON",
    "TOLERANCES",
    "adapted",
    "base",
    "check",
    "close",
    "configs",
    "differs",
    "perturb",
    "refused",
    "same",
    "snapshot",
    "targeted",
    "unchanged",
]
