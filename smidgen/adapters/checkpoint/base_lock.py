"""The base lock: a sketch of the targets' base weights that tells apart same base, re-cast base and another base.

Kept are the targets' names and shapes (deflated), the norm of all weights, ``PROBES`` numbers that each mix all of them
(sums of u^T W v with fixed random signs, fp32), and one such number for each target alone (fp16). The difference of two
sketches estimates |W - W'| without bias, so one number, the relative difference of the weights, is measured. All other
tensors of the base are kept in a few numbers a block (``base_groups``), with the number formats that weights are in. The
rule (docs/verify.md says it for people):

* below ``SAME``: the same base;
* no more than rounding from one number format to the other explains, or at most ``CAST`` at quantised targets: a cast,
  tolerated and reported;
* more, but at most ``CAST`` over the targets and over all else in the numbered blocks: a base that was changed
  (fine-tuned, merged into), tolerated with a warning that measures it block by block; heads, embeddings and whatever
  else is outside the blocks may differ altogether;
* more than ``CAST``: another base, an error that names what differs most.

400 bytes for 12 targets, 900 for 128, and 200 to 900 for the rest.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.adapters.checkpoint import base_groups
from smidgen.adapters.checkpoint.base_groups import PROBES, Group, Part, signs
from smidgen.errors import AdapterFileError, BaseLockError, did_you_mean

FORMAT_LETTERS = {torch.float32: "f", torch.float16: "h", torch.bfloat16: "b"}
SAME, CAST = 1e-5, 0.15
_HALVES = 1e-2  # relative difference below which the rounding of the targets' own probes (fp16) would count
_MAX_NAMES = 8 * 2**20


@dataclass
class LockReport:
    """How a base compares with the one an adapter was made for.

    Attributes:
        state: "same", "cast" (another number format), "changed" (fine-tuned, merged into, or the like), "other" or
            "unlocked" (the adapter carries no lock).
        difference: estimated |W - W'| / |W| over all targets.
        worst: (target, its estimate).
        problems: sentences, empty when the base may be used.
        changed: block -> its difference, of those that differ by more than another number format explains.
        rest: difference over all weights that are no targets, None where the lock does not hold them.
        notes: sentences about what is different or could not be compared.
    """

    state: str
    difference: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    problems: list[str] = field(default_factory=list)
    changed: dict[str, float] = field(default_factory=dict)
    rest: float | None = None
    notes: list[str] = field(default_factory=list)

    def raise_if_other(self, advice: str = "") -> None:
        """Raises :class:`BaseLockError` when there are problems, ``advice`` added if shapes are right."""
        if self.problems:
            error = BaseLockError(" ".join(self.problems) + (advice if self.difference < float("inf") else ""))
            error.report = self
            raise error


@dataclass(frozen=True)
class Lock:
    """A base lock as read: targets by name, their shapes, ``pooled`` [1 + PROBES], ``own`` [targets]; the number format
    that holds the targets' values, and the groups of all other weights (None in locks of before there were any)."""

    targets: list[str]
    shapes: list[tuple[int, ...]]
    pooled: Tensor
    own: Tensor
    format: torch.dtype = torch.float32
    rest: dict[tuple[str, str], Group] | None = None


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


def make_lock(matrices: Mapping[str, Tensor], rest: Mapping[str, Part] | None = None) -> dict[str, Any]:
    """The lock of named base weights [rows, cols], as JSON-ready data; ``rest`` are all other tensors of the base."""
    names = sorted(matrices)
    sketches = torch.stack([sketch(matrices[n]) for n in names])
    pooled = pool(sketches)
    lock = blank_lock(matrices, rest) | {
        "sketch": encode(pooled, "<f4"),
        "own": encode(sketches[:, -1] / _unit(pooled, len(names)), "<f2"),
    }
    if rest is not None:
        readable = {key: group for key, group in base_groups.groups(rest).items() if group.readable}
        lock["places"] = _deflate(base_groups.record(readable)[0])
        lock["rest"] = base64.b64encode(base_groups.numbers(readable).tobytes()).decode()
        held = base_groups.format_of(base_groups.samples(matrices[n]).cpu() for n in names)
        lock["format"] = FORMAT_LETTERS[held]
    return lock


def blank_lock(matrices: Mapping[str, Tensor], rest: Mapping[str, Part] | None = None) -> dict[str, Any]:
    """A lock of the same length with zeros for the targets' sketches: names and shapes are there, no target is read."""
    names = sorted(matrices)
    lock = {
        "targets": _deflate("\n".join(f"{n} {' '.join(map(str, matrices[n].shape))}" for n in names)),
        "sketch": encode(torch.zeros(1 + PROBES), "<f4"),
        "own": encode(torch.zeros(len(names)), "<f2"),
        "dtype": str(next(iter(matrices.values())).dtype).removeprefix("torch."),
    }
    if rest is not None:
        found = base_groups.members(rest)
        places, numbers = base_groups.record([k for k, n in found.items() if not any(rest[i].quantised for i in n)])
        lock |= {"format": "f", "places": _deflate(places), "rest": base64.b64encode(numbers.tobytes()).decode()}
    return lock


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
        held = {letter: dtype for dtype, letter in FORMAT_LETTERS.items()}[lock.get("format", "f")]
        rest = None
        if "rest" in lock:
            numbers = np.frombuffer(base64.b64decode(lock["rest"], validate=True), dtype=base_groups.RECORD)
            rest = base_groups.read_record(_inflate(lock["places"]), numbers)
    except (KeyError, IndexError, TypeError, ValueError, zlib.error) as error:
        raise AdapterFileError(f"base_lock in adapter_config.json is damaged ({error}); restore the file.") from error
    return Lock(names, shapes, pooled, own, held, rest)


def renamed(lock: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A lock of the same targets by other names (old -> new), in the same order, in which their probes are added up. What
    it holds of the rest of the base goes by the old names and is left out."""
    kept = read_lock(lock)
    lines = [f"{names.get(n, n)} {' '.join(map(str, s))}" for n, s in zip(kept.targets, kept.shapes, strict=True)]
    return {key: lock[key] for key in lock if key not in ("places", "rest")} | {"targets": _deflate("\n".join(lines))}


def check_lock(
    lock: Mapping[str, Any] | None,
    matrices: Mapping[str, Tensor],
    rest: Mapping[str, Part] | None = None,
    stored: Mapping[str, torch.dtype | None] | None = None,
) -> LockReport:
    """Compares a lock with the named base weights [rows, cols] of a model.

    Args:
        lock: as :func:`make_lock` wrote it; None says "unlocked".
        matrices: the targets.
        rest: all other tensors of the base; without them, or without any in the lock, only the targets are compared.
        stored: number format that each target is kept in, None for a quantised one; its own format unless given.
    """
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
    if kept.rest is not None and rest is not None:
        _compare_rest(kept, matrices, found, each, rest, stored or {}, report)
    if not total < CAST:
        report.problems.append(
            f"This is another base model than the one the adapter was made for: its weights differ by {total:.0%} "
            f"(most at {kept.targets[at]!r}); up to {CAST:.0%} is tolerated for a re-cast, quantised or lightly tuned copy "
            "of the same base. Load the base named in adapter_config.json."
        )
    if report.problems:
        report.state = "other"
    return report


def _compare_rest(
    kept: Lock,
    matrices: Mapping[str, Tensor],
    found: Tensor,
    each: Tensor,
    rest: Mapping[str, Part],
    stored: Mapping[str, torch.dtype | None],
    report: LockReport,
) -> None:
    """Puts into a report what the weights beside the targets say, and whether rounding explains the targets."""
    assert kept.rest is not None
    compared = base_groups.compare(kept.rest, base_groups.groups(rest), SAME)
    report.rest, report.notes = compared.total, compared.left_out
    report.changed = {name: compared.differences[name] for name in compared.changed}
    if report.state == "same" and compared.total >= SAME:
        report.state = "cast"
    explained, quantised = _explained(kept, matrices, found, stored)
    if report.difference >= SAME and not quantised and report.difference > 3 * explained:
        blocks: dict[str, list[float]] = {}
        for name, one in zip(kept.targets, each.tolist(), strict=True):
            blocks.setdefault(base_groups.place_of(name, base_groups.MATRICES, ()), []).append(one)
        sizes = {where: (sum(d * d for d in own) / len(own)) ** 0.5 for where, own in blocks.items()}
        for where, size in sizes.items():
            if size > max(_HALVES / 4, 3 * explained):
                report.changed[f"{where} (targets)"] = size
        report.changed = report.changed or {"the targets": report.difference}
    if report.changed:
        report.state = "changed"
    if compared.blocks >= CAST:
        report.problems.append(
            "This is another base model than the one the adapter was made for: the weights of its blocks that are no targets "
            f"differ by {compared.blocks:.0%} (most in {difference_words(report, 1)}); up to {CAST:.0%} is tolerated. Load "
            "the base named in adapter_config.json."
        )


def _explained(
    kept: Lock, matrices: Mapping[str, Tensor], found: Tensor, stored: Mapping[str, torch.dtype | None]
) -> tuple[float, bool]:
    """(|rounding| / |W| over all targets that a cast between the two number formats costs, whether any is quantised)."""
    if any(name in stored and stored[name] is None for name in kept.targets):
        return 0.0, True
    values = {name: base_groups.samples(matrices[name]).double().cpu() for name in kept.targets}
    here = base_groups.format_of(values.values())
    moved = 0.0
    for at, name in enumerate(kept.targets):
        given = stored.get(name)
        own = given if given is not None and given.itemsize == 1 else here
        formats = {own} if own.itemsize == 1 else {own, kept.format} if own != kept.format else set()
        size = float(values[name].square().sum())
        error = sum(base_groups.rounding(values[name], f) for f in formats if f.itemsize < 4)
        moved += error / max(size, 1e-300) * float(found[at, 0]) ** 2
    return float((moved / max(float(found[:, 0].square().sum()), 1e-300)) ** 0.5), False


def difference_words(report: LockReport, most: int = 4) -> str:
    """The changed blocks of a report with their differences, the most changed first."""
    ordered = sorted(report.changed.items(), key=lambda item: -item[1])
    said = ", ".join(f"{where} by {size:.1%}" if size < 1 else f"{where} altogether" for where, size in ordered[:most])
    return said + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


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
