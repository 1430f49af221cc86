"""The base lock: a sketch of the targets' base weights that tells apart same base, re-cast base and another base.

Kept are the targets' names and shapes (deflated), the norm of all weights, ``PROBES`` numbers that each mix all of them
(sums of u^T W v with fixed random signs, fp32), and one such number for each target alone (fp16). The difference of two
sketches estimates |W - W'| without bias, so one number, the relative difference of the weights, is measured: below
``SAME`` the base is the same, below ``CAST`` it is the same base in another number format (tolerated and reported),
above it is another base (an error that names the target that differs most). 400 bytes for 12 targets, 900 for 128.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.errors import AdapterFileError, BaseLockError, did_you_mean

PROBES = 16
SAME, CAST = 1e-5, 0.15
_HALVES = 1e-2  # relative difference below which the rounding of the targets' own probes (fp16) would count
_MAX_NAMES = 8 * 2**20


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


@dataclass(frozen=True)
class Lock:
    """A base lock as read: targets by name, their shapes, ``pooled`` [1 + PROBES], ``own`` [targets]."""

    targets: list[str]
    shapes: list[tuple[int, ...]]
    pooled: Tensor
    own: Tensor


@lru_cache(maxsize=64)
def signs(length: int, side: int) -> Tensor:
    """[length, 1 + PROBES] of +-1, the same on every machine: splitmix64 of the index."""
    z = np.arange(length * (1 + PROBES), dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (side + 1) % 2**64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z & np.uint64(1)).astype(np.float32) * 2 - 1).reshape(length, 1 + PROBES)


def sketch(matrix: Tensor) -> Tensor:
    """[2 + PROBES] fp32: norm of the matrix [rows, cols], then u_k^T W v_k; the last is the matrix's own probe."""
    w = matrix.detach().float()
    rows, cols = (signs(n, side).to(w.device) for side, n in enumerate(w.shape))
    values = ((w @ cols) * rows).sum(dim=0)
    return torch.cat([w.norm()[None], values]).cpu()


def pool(sketches: Tensor) -> Tensor:
    """[1 + PROBES] of all matrices together from their sketches [matrices, 2 + PROBES], in order."""
    mixed = (sketches[:, 1:-1] * signs(len(sketches), 2)[:, :PROBES]).sum(dim=0)
    return torch.cat([sketches[:, 0].norm()[None], mixed])


def encode(values: Tensor, dtype: str) -> str:
    """Numbers as text for a config; ``dtype`` is numpy's, e.g. "<f4"."""
    return base64.b64encode(values.detach().cpu().numpy().astype(dtype).tobytes()).decode()


def decode(text: Any, dtype: str, count: int) -> Tensor:
    """Inverse of :func:`encode`, fp32 [count].

    Raises:
        ValueError, TypeError: not such text.
    """
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).astype(np.float32)
    return torch.from_numpy(raw.reshape(count).copy())


def make_lock(matrices: Mapping[str, Tensor]) -> dict[str, Any]:
    """The lock of named base weights [rows, cols], as JSON-ready data."""
    names = sorted(matrices)
    sketches = torch.stack([sketch(matrices[n]) for n in names])
    pooled = pool(sketches)
    return blank_lock(matrices) | {
        "sketch": encode(pooled, "<f4"),
        "own": encode(sketches[:, -1] / _unit(pooled, len(names)), "<f2"),
    }


def blank_lock(matrices: Mapping[str, Tensor]) -> dict[str, Any]:
    """A lock of the same length with zeros for sketches: names and shapes are there, no weight is read."""
    names = sorted(matrices)
    return {
        "targets": _deflate("\n".join(f"{n} {' '.join(map(str, matrices[n].shape))}" for n in names)),
        "sketch": encode(torch.zeros(1 + PROBES), "<f4"),
        "own": encode(torch.zeros(len(names)), "<f2"),
        "dtype": str(next(iter(matrices.values())).dtype).removeprefix("torch."),
    }


def read_lock(lock: Mapping[str, Any]) -> Lock:
    """A lock as :func:`make_lock` wrote it.

    Raises:
        AdapterFileError: the lock is not one.
    """
    try:
        lines = [line.split(" ") for line in _inflate(lock["targets"]).split("\n")]
        names = [" ".join(line[:-2]) for line in lines]
        shapes: list[tuple[int, ...]] = [(int(line[-2]), int(line[-1])) for line in lines]
        pooled = decode(lock["sketch"], "<f4", 1 + PROBES)
        own = decode(lock["own"], "<f2", len(names)) * _unit(pooled, len(names))
    except (KeyError, IndexError, TypeError, ValueError, zlib.error) as error:
        raise AdapterFileError(f"base_lock in adapter_config.json is damaged ({error}); restore the file.") from error
    return Lock(names, shapes, pooled, own)


def check_lock(lock: Mapping[str, Any] | None, matrices: Mapping[str, Tensor]) -> LockReport:
    """Compares a lock with the named base weights [rows, cols] of a model."""
    if not lock:
        return LockReport("unlocked")
    kept = read_lock(lock)
    problems = _coverage_problems(kept.targets, list(matrices))
    problems += [
        f"Target {n!r} has shape {tuple(matrices[n].shape)} in this base, the adapter was made for {s}."
        for n, s in zip(kept.targets, kept.shapes, strict=True)
        if n in matrices and tuple(matrices[n].shape) != s
    ][:3]
    if problems:
        return LockReport("other", float("inf"), problems=problems)
    found = torch.stack([sketch(matrices[n]) for n in kept.targets])
    total = _difference(kept, found)
    each = (found[:, -1] - kept.own).abs() / found[:, 0].clamp(min=1e-30)
    at = int(each.argmax())
    report = LockReport("same" if total < SAME else "cast", total, (kept.targets[at], float(each[at])))
    if not total < CAST:
        report.state = "other"
        report.problems = [
            f"This is another base model than the one the adapter was made for: its weights differ by {total:.0%} "
            f"(most at {kept.targets[at]!r}); up to {CAST:.0%} is tolerated for a re-cast or quantised copy of the "
            "same base. Load the base named in adapter_config.json."
        ]
    return report


def _difference(kept: Lock, found: Tensor) -> float:
    """Estimated |W - W'| / |W| from a lock and the sketches [targets, 2 + PROBES] of a base."""
    size = float(kept.pooled[0].clamp(min=1e-30))
    mixed = float(((pool(found) - kept.pooled)[1:] ** 2).sum())
    if (mixed / PROBES) ** 0.5 < _HALVES * size:
        return (mixed / PROBES) ** 0.5 / size
    targets = len(kept.targets)
    own = float(((found[:, -1] - kept.own) ** 2).sum())  # estimates the same sum of squares, with as many terms
    return ((mixed + targets * own) / (PROBES + targets)) ** 0.5 / size


def _unit(pooled: Tensor, targets: int) -> float:
    """The root mean square norm of the targets, in units of which their own probes fit fp16."""
    return max(float(pooled[0]), 1e-30) / targets**0.5


def _deflate(text: str) -> str:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(packer.compress(text.encode()) + packer.flush()).decode()


def _inflate(text: Any) -> str:
    unpacker = zlib.decompressobj(-15)
    raw = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_NAMES)
    if not unpacker.eof:
        raise ValueError("its list of targets is cut short or endless")
    return raw.decode()


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
