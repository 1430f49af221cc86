"""The base lock: a sketch of every target's base weight that tells apart same base, re-cast base and another base.

For each target its shape, norm and ``PROBES`` bilinear sketches u^T W v with fixed random signs are kept (fp32). The
difference of two sketches estimates |W - W'| without bias, so one number, the relative difference of the weights, is
measured: below ``SAME`` the base is the same, below ``CAST`` it is the same base in another number format (tolerated
and reported), above it is another base (an error).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.errors import AdapterFileError, BaseLockError, did_you_mean

PROBES = 8
SAME, CAST = 1e-5, 0.15


@dataclass
class LockReport:
    """How a base compares with the one an adapter was made for.

    Attributes:
        state: "same", "cast" (another number format), "other" or "unlocked" (the adapter carries no lock).
        difference: estimated |W - W'| / |W| over all targets.
        worst: (target, its estimate).
        problems: sentences, empty when the base may be used.
    """

    state: str
    difference: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    problems: list[str] = field(default_factory=list)

    def raise_if_other(self) -> None:
        """Raises :class:`BaseLockError` when there are problems."""
        if self.problems:
            raise BaseLockError(" ".join(self.problems))


@lru_cache(maxsize=64)
def _signs(length: int, side: int) -> Tensor:
    """[length, PROBES] of +-1, the same on every machine: splitmix64 of the index."""
    z = np.arange(length * PROBES, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (side + 1) % 2**64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z & np.uint64(1)).astype(np.float32) * 2 - 1).reshape(length, PROBES)


def sketch(matrix: Tensor) -> Tensor:
    """[1 + PROBES] fp32: norm of the matrix [rows, cols], then u_k^T W v_k."""
    w = matrix.detach().float()
    rows, cols = (_signs(n, side).to(w.device) for side, n in enumerate(w.shape))
    values = ((w @ cols) * rows).sum(dim=0)
    return torch.cat([w.norm()[None], values]).cpu()


def make_lock(matrices: Mapping[str, Tensor]) -> dict[str, Any]:
    """The lock of named base weights [rows, cols], as JSON-ready data."""
    names = sorted(matrices)
    sketches = torch.stack([sketch(matrices[n]) for n in names])
    return {
        "targets": names,
        "shapes": [list(matrices[n].shape) for n in names],
        "sketch": base64.b64encode(sketches.numpy().astype("<f4").tobytes()).decode(),
        "dtype": str(next(iter(matrices.values())).dtype).removeprefix("torch."),
    }


def read_lock(lock: Mapping[str, Any]) -> tuple[list[str], list[tuple[int, ...]], Tensor]:
    """(targets, shapes, sketches [targets, 1 + PROBES]) of a lock.

    Raises:
        AdapterFileError: the lock is not one.
    """
    try:
        names = [str(n) for n in lock["targets"]]
        shapes = [tuple(int(i) for i in s) for s in lock["shapes"]]
        raw = np.frombuffer(base64.b64decode(lock["sketch"], validate=True), dtype="<f4").astype(np.float32)
        sketches = torch.from_numpy(raw.reshape(len(names), 1 + PROBES).copy())
        if len(shapes) != len(names) or not names:
            raise ValueError("lengths differ")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"base_lock in adapter_config.json is damaged ({error}); restore the file.") from error
    return names, shapes, sketches


def check_lock(lock: Mapping[str, Any] | None, matrices: Mapping[str, Tensor]) -> LockReport:
    """Compares a lock with the named base weights [rows, cols] of a model."""
    if not lock:
        return LockReport("unlocked")
    names, shapes, sketches = read_lock(lock)
    problems = _coverage_problems(names, list(matrices))
    problems += [
        f"Target {n!r} has shape {tuple(matrices[n].shape)} in this base, the adapter was made for {s}."
        for n, s in zip(names, shapes, strict=True)
        if n in matrices and tuple(matrices[n].shape) != s
    ][:3]
    if problems:
        return LockReport("other", float("inf"), problems=problems)
    found = torch.stack([sketch(matrices[n]) for n in names])
    change = ((found - sketches)[:, 1:] ** 2).mean(dim=1)
    norms = sketches[:, 0].clamp(min=1e-30)
    each = change.sqrt() / norms
    total = float((change.sum() / (norms**2).sum()).sqrt())
    at = int(each.argmax())
    report = LockReport("same" if total < SAME else "cast", total, (names[at], float(each[at])))
    if not total < CAST:
        report.state = "other"
        report.problems = [
            f"This is another base model than the one the adapter was made for: its weights differ by {total:.0%} "
            f"(most at {names[at]!r}: {float(each[at]):.0%}); up to {CAST:.0%} is tolerated for a re-cast or quantised "
            "copy of the same base. Load the base named in adapter_config.json."
        ]
    return report


def _coverage_problems(wanted: list[str], found: list[str]) -> list[str]:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    problems = []
    if missing:
        hint = did_you_mean(missing[0], extra or found)
        problems.append(f"This base lacks {len(missing)} of {len(wanted)} target modules, e.g. {missing[0]!r}.{hint}")
    if extra:
        problems.append(
            f"This base has {len(extra)} modules that match the targets but that the adapter does not know, "
            f"e.g. {extra[0]!r}; it has more layers than the base the adapter was made for."
        )
    return problems
