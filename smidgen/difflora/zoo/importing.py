"""A zoo from LoRA files that others trained: one layout for all, alphas folded in, nothing rounded unless asked for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import smidgen
from smidgen.adapters.checkpoint.formats import Lora
from smidgen.bases.families import EMBEDDED, load_base
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.weightspace.canonical import refactor
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.zoo.names import Names, find, read_lora
from smidgen.difflora.zoo.records import Record, pack_group
from smidgen.difflora.zoo.status import Status, status
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import hashed_split
from smidgen.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SHARD = 64  # adapters in a group
Ranks = dict[str, int]


def import_zoo(
    folder: Path,
    out: Path,
    base: str = EMBEDDED,
    rank: int | None = None,
    held_out_share: float = 0.1,
    ignore_text_encoder: bool = False,
) -> Status:
    """Reads every LoRA below ``folder`` into a zoo in ``out``.

    A person's name is the first part of the path below ``folder``, so that several checkpoints of one person fall on one
    side of the split. Factors are kept as they are with their scale folded into B.

    Args:
        base: the base they were trained on; every target is checked against it.
        rank: bring all to this rank by SVD and give those that lack a target a delta of zero there; the manifest says
            what each lost. None: all must have the same targets and ranks.

    Raises:
        AdapterFileError, DataError: naming the file and what is wrong with it.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}.")
    loaded = load_base(base)
    names, paths = Names(loaded), find(folder)
    every = {
        name: {t: len(f.a) for t, f in read_lora(p, names, ignore_text_encoder).items()} for name, p in paths.items()
    }
    ranks = _common(every) if rank is None else dict.fromkeys(sorted({t for own in every.values() for t in own}), rank)
    zoo = Zoo.create(out, AdaptedPipeline(loaded, _config(ranks)).layout, {"imported": _digest(paths), "rank": rank})
    identities = list(paths)
    for group in range(-(-len(identities) // SHARD)):
        if zoo.has(group):
            continue
        rows, lines = [], []
        for name in identities[group * SHARD : (group + 1) * SHARD]:
            row, lost = _row(zoo.layout, read_lora(paths[name], names, ignore_text_encoder), ranks)
            split = hashed_split(Path(name).parts[0], held_out_share)
            note = f"re-factored to rank {rank}: {lost:.2%} of its delta lost" if lost > 0 else ""
            rows.append(row)
            lines.append(Record(name, group, 0, split, 0, True, "kept", note, None, None, None, None, ""))
        zoo.commit(pack_group(zoo.layout, group, torch.stack(rows), lines))
    return status(out)


def _common(every: dict[str, Ranks]) -> Ranks:
    """The targets and ranks that all adapters share; DataError naming two that differ."""
    kinds = Counter(json.dumps(own, sort_keys=True) for own in every.values())
    usual = json.loads(kinds.most_common(1)[0][0])
    odd = [name for name, own in every.items() if own != usual]
    if odd:
        own = every[odd[0]]
        target = min(own.keys() ^ usual.keys() or {t for t in usual if own[t] != usual[t]})
        raise DataError(
            f"{len(odd)} of {len(every)} adapters have other targets or ranks than the rest: {odd[0]!r} has "
            f"{_rank_words(own.get(target))} at {target!r}, most have {_rank_words(usual.get(target))}. Leave them out, or "
            "bring all to one rank with --rank (the loss is stated for each)."
        )
    return dict(sorted(usual.items()))


def _rank_words(rank: int | None) -> str:
    return "nothing" if rank is None else f"rank {rank}"


def _config(ranks: Ranks) -> smidgen.SmidgenConfig:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {target: rank for target, rank in ranks.items() if rank != usual}
    return smidgen.config("lora", r=usual, rank_pattern=pattern, target_modules=sorted(ranks))


def _row(layout: Layout, factors: dict[str, Lora], ranks: Ranks) -> tuple[Tensor, float]:
    """The adapter as a row, and the share of its delta that was lost (Frobenius over all targets)."""
    tensors: dict[str, dict[str, Tensor]] = {}
    lost = total = 0.0
    shapes = {(entry.key, entry.side): entry.shape for entry in layout.entries}
    for target, rank in ranks.items():
        b = torch.zeros(shapes[target, "residual_b"])
        a = torch.zeros(shapes[target, "residual_a"])
        if target in factors:
            own = factors[target]
            size = float((own.b.T @ own.b * (own.a @ own.a.T)).sum().clamp(min=0)) * own.scale**2
            error = 0.0
            if len(own.a) == rank:
                b, a = own.b * own.scale, own.a
            else:
                b, a, error = refactor(own.b, own.a, own.scale, rank)
            lost, total = lost + error**2 * size, total + size
        tensors[target] = {"residual_a": a, "residual_b": b}
    return layout.pack(tensors), (lost / total) ** 0.5 if total > 0 else 0.0


def _digest(paths: dict[str, Path]) -> str:
    """What was imported, so that another folder is not mixed in on resuming."""
    return hashlib.sha256(json.dumps(sorted(paths)).encode()).hexdigest()
