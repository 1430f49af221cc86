"""What a base holds besides an adapter's targets, in a few numbers a block; and the fingerprint of a whole base.

A tensor is known by at most ``SAMPLES`` of its elements, at fixed places spread over all of it: a gather of 4 kB a
tensor, whatever its size, so a model of 7 billion parameters costs about one MB of reading. Tensors are pooled: the
matrices of each *block* (``encoder.layer.3``), the vectors (norms and biases, which no quantiser touches) of all blocks
of a stack (``encoder.layer.*``), and matrices and vectors of whatever stands beside the blocks (``embeddings``,
``classifier``). Of each group a lock keeps ``KEPT`` sums of all its samples under fixed random signs (fp32), from
which the difference of two bases is estimated as for the targets; a checksum of its shapes; and the coarsest number
format that holds its samples exactly, from which follows how far mere rounding can have moved them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLES = 1024
PROBES = 16  # of the targets together
KEPT = 2  # of a group
FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
MATRICES, VECTORS = "matrices", "norms and biases"
RECORD = np.dtype([("probes", "<f4", (KEPT,)), ("shapes", "u1"), ("format", "u1")])
_GOLDEN = 0.6180339887498949
_SURE = 4.0  # rounding moves a group's probes by so many times its expected size once in ten million


class Part(NamedTuple):
    """A tensor of a base: its shape, its samples in fp32 (None where they cannot be read: quantised, or on the meta
    device), the number format it is kept in."""

    shape: tuple[int, ...]
    samples: Tensor | None
    stored: torch.dtype
    quantised: bool = False


@dataclass(frozen=True)
class Group:
    """The tensors of one block that are matrices, or that are vectors."""

    where: str
    kind: str
    probes: Tensor
    shapes: int
    format: int
    size: float = 0.0  # |W|^2 of the scaled samples
    moved: tuple[float, ...] = ()  # |rounding|^2 expected of a cast to each of FORMATS
    in_fp8: float = 0.0  # of that, what tensors that are kept in fp8 owe to it whatever the format
    readable: bool = True

    @property
    def name(self) -> str:
        """For a sentence."""
        return self.where if self.kind == MATRICES else f"{self.where} ({self.kind})"

    @property
    def in_block(self) -> bool:
        """Whether it is one of the numbered blocks: no host exchanges them as it does a head or embeddings."""
        last = self.where.rpartition(".")[2]
        return last == "*" or last.isdigit()


@dataclass
class Comparison:
    """How the groups of a base compare with those of a lock.

    Attributes:
        differences: group -> estimated |W - W'| / |W|, of the groups that could be compared.
        changed: groups that differ by more than a cast explains, the most changed first.
        blocks: pooled difference of all groups of numbered blocks, 0 where a cast explains it.
        total: pooled difference of all groups; explained: what a cast explains of it.
        left_out: sentences about what could not be compared.
    """

    differences: dict[str, float] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    blocks: float = 0.0
    total: float = 0.0
    explained: float = 0.0
    left_out: list[str] = field(default_factory=list)


@lru_cache(maxsize=256)
def places(numel: int) -> Tensor:
    """Flat indices of the samples of a tensor of ``numel`` elements: all, or ``SAMPLES`` spread by the golden ratio."""
    if numel <= SAMPLES:
        return torch.arange(numel)
    spread = np.unique((np.arange(SAMPLES) * _GOLDEN % 1.0 * numel).astype(np.int64))
    return torch.from_numpy(spread)


def samples(tensor: Tensor) -> Tensor:
    """The samples of a tensor in fp32, on its device; nothing else of it is read.

    Example:
        >>> samples(torch.arange(6.0).reshape(2, 3)).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    tensor = tensor.detach()
    at = places(tensor.numel())
    if tensor.element_size() == 1:  # few kernels know fp8
        flat = tensor.contiguous().flatten().view(torch.uint8)
        return flat[at.to(tensor.device)].view(tensor.dtype).float()
    if tensor.dim() < 2:
        return tensor.flatten()[at.to(tensor.device)].float()
    return tensor[tuple(i.to(tensor.device) for i in torch.unravel_index(at, tensor.shape))].float()


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 letters that follow from the names, shapes and some 64 elements of each of a base's tensors, in their order.

    Example:
        >>> fingerprint([("a", torch.ones(3))]) == fingerprint([("a", torch.ones(4))])
        False
    """
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            with suppress(NotImplementedError):  # some quantised weights have no elements
                flat = tensor.detach().flatten()
                found.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def groups(parts: Mapping[str, Part]) -> dict[tuple[str, str], Group]:
    """The groups of named tensors, sorted, by (where, kind)."""
    return {key: _group(*key, {n: parts[n] for n in names}) for key, names in members(parts).items()}


def members(parts: Mapping[str, Part]) -> dict[tuple[str, str], list[str]]:
    """Which tensors are pooled in which group; none of them is read."""
    stacks = {block.rpartition(".")[0] for name in parts if (block := _block(name))}
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(parts):
        if prod(parts[name].shape):
            kind = MATRICES if len(parts[name].shape) > 1 else VECTORS
            found.setdefault((place_of(name, kind, stacks), kind), []).append(name)
    return dict(sorted(found.items()))


def place_of(name: str, kind: str, stacks: Collection[str]) -> str:
    """Where a tensor belongs, in a base whose numbered blocks are in ``stacks``.

    Example:
        >>> place_of("encoder.layer.3.output.dense.weight", MATRICES, {"encoder.layer"})
        'encoder.layer.3'
        >>> place_of("embeddings.LayerNorm.bias", VECTORS, {"encoder.layer"})
        'embeddings'
        >>> place_of("model.embed_tokens.weight", MATRICES, {"model.layers"})
        'model.embed_tokens'
    """
    block = _block(name)
    if block:
        return block if kind == MATRICES else f"{block.rpartition('.')[0]}.*".removeprefix(".")
    owner = name.rpartition(".")[0] or name
    above = owner.rpartition(".")[0]
    return owner if not above or any(f"{stack}.".startswith(f"{above}.") for stack in stacks) else above


def _block(name: str) -> str:
    """A tensor's name up to its first number, "" without one."""
    path = name.split(".")
    first = next((i for i, part in enumerate(path[:-1]) if part.isdigit()), None)
    return "" if first is None else ".".join(path[: first + 1])


def _group(where: str, kind: str, parts: Mapping[str, Part]) -> Group:
    shapes = zlib.crc32("\n".join(f"{n} {p.shape}" for n, p in parts.items()).encode()) % 256
    if any(part.samples is None for part in parts.values()):
        return Group(where, kind, torch.zeros(KEPT), shapes, 0, readable=False)
    values = [part.samples.double().cpu() for part in parts.values() if part.samples is not None]
    # A matrix is scaled by the root of its inputs, so that all tensors of a group weigh about the same.
    scales = [(prod(p.shape[1:]) / len(v)) ** 0.5 for p, v in zip(parts.values(), values, strict=True)]
    probes = torch.zeros(KEPT, dtype=torch.float64)
    for at, (value, scale) in enumerate(zip(values, scales, strict=True)):
        probes += _turn(at) * scale * (value @ _signs(len(value)))
    plain = [v for v, p in zip(values, parts.values(), strict=True) if p.stored.itemsize > 1]
    together = list(zip(values, scales, parts.values(), strict=True))
    return Group(
        where,
        kind,
        probes.float(),
        shapes,
        _format(plain),
        sum(float((v * c).square().sum()) for v, c, _ in together),
        tuple(
            sum(rounding(v, f) * c**2 for v, c, p in together if p.stored.itemsize > 1) if f is not torch.float32 else 0.0
            for f in FORMATS
        ),
        sum(rounding(v, p.stored) * c**2 for v, c, p in together if p.stored.itemsize == 1),
    )  # fmt: skip


@lru_cache(maxsize=64)
def signs(length: int, side: int) -> Tensor:
    """[length, 1 + PROBES] of +-1, the same on every machine: splitmix64 of the index."""
    z = np.arange(length * (1 + PROBES), dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (side + 1) % 2**64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z & np.uint64(1)).astype(np.float32) * 2 - 1).reshape(length, 1 + PROBES)


@lru_cache(maxsize=64)
def _signs(length: int) -> Tensor:
    return signs(length, 3)[:, :KEPT].double()


def _turn(at: int) -> Tensor:
    """[KEPT] of +-1 for the tensor at a place of its group, so that two tensors' changes do not add up by chance."""
    return signs(4096, 4)[at % 4096, :KEPT].double()


def _format(values: Iterable[Tensor]) -> int:
    """Place in FORMATS of the coarsest of the first three that holds all values exactly."""
    values = list(values)
    for at in (2, 1):
        if all(torch.equal(v.to(FORMATS[at]).to(v.dtype), v) for v in values):
            return at
    return 0


def rounding(values: Tensor, dtype: torch.dtype) -> float:
    """|error|^2 expected of values that were rounded to a format."""
    info = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(values, info.eps), torch.frexp(values).exponent - 1)
    return float(spacing.clamp(min=info.smallest_normal * info.eps).square().sum()) / 12


def format_of(values: Iterable[Tensor]) -> torch.dtype:
    """The coarsest of fp32, fp16 and bf16 that holds all values exactly."""
    return FORMATS[_format([v.double() for v in values])]


def record(found: Collection[tuple[str, str]]) -> tuple[str, np.ndarray]:
    """(names, zeros for the numbers) of groups for a lock: a line for each place, with 1 for matrices, 2 for vectors, 3
    for both."""
    kinds: dict[str, int] = {}
    for where, kind in found:
        kinds[where] = kinds.get(where, 0) + (1 if kind == MATRICES else 2)
    return "\n".join(f"{where} {mask}" for where, mask in kinds.items()), np.zeros(len(found), RECORD)


def numbers(found: Mapping[tuple[str, str], Group]) -> np.ndarray:
    """The numbers of groups, in the order of :func:`record`."""
    out = np.zeros(len(found), RECORD)
    for at, group in enumerate(found.values()):
        out[at] = (group.probes.numpy(), group.shapes, group.format)
    return out


def read_record(names: str, values: np.ndarray) -> dict[tuple[str, str], Group]:
    """Inverse of :func:`record`.

    Raises:
        ValueError: not such a record.
    """
    lines = [line.rpartition(" ") for line in names.split("\n")] if names else []
    keys = _keys({where: int(mask) for where, _, mask in lines})
    if len(keys) != len(values) or not np.isfinite(values["probes"]).all() or (values["format"] >= 3).any():
        raise ValueError("its groups of weights do not fit together")
    return {
        key: Group(*key, torch.from_numpy(row["probes"].copy()), int(row["shapes"]), int(row["format"]))
        for key, row in zip(keys, values, strict=True)
    }


def _keys(kinds: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(w, kind) for w, mask in kinds.items() for bit, kind in ((1, MATRICES), (2, VECTORS)) if mask & bit]


def compare(kept: Mapping[tuple[str, str], Group], found: Mapping[tuple[str, str], Group], same: float) -> Comparison:
    """Compares the groups of a lock with those of a base; differences below ``same`` are none."""
    out = Comparison()
    missing = [kept[key].name for key in kept if key not in found]
    reshaped, pooled = [], []
    for key, there in found.items():
        group = kept.get(key)
        if group is None or not there.readable:
            continue
        if group.shapes != there.shapes:
            reshaped.append(group.name)
            continue
        moved = float((there.probes - group.probes).double().square().mean())
        expected = there.in_fp8
        if group.format != there.format:
            expected += there.moved[there.format] + there.moved[group.format]
        pooled.append((there, moved, expected))
        size = max(there.size, 1e-300)
        out.differences[there.name] = (moved / size) ** 0.5
        if moved > _SURE**2 * expected + (10 * same) ** 2 * there.size:
            out.changed.append(there.name)
    out.changed.sort(key=lambda name: -out.differences[name])
    out.total, out.explained = _pooled(pooled)
    total, explained = _pooled([entry for entry in pooled if entry[0].in_block])
    out.blocks = total if total > 3 * explained else 0.0
    if missing:
        out.left_out.append(f"this base lacks {_few(missing)}")
    if reshaped:
        out.left_out.append(f"tensors of another shape or number at {_few(reshaped)}")
    return out


def _pooled(entries: Iterable[tuple[Group, float, float]]) -> tuple[float, float]:
    entries = list(entries)
    size = max(sum(group.size for group, _, _ in entries), 1e-300)
    return (sum(m for _, m, _ in entries) / size) ** 0.5, (sum(e for _, _, e in entries) / size) ** 0.5


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
