"""Rows on their way into a zoo: the manifest's line of each, and a group of them as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from smidgen.difflora.weightspace.layout import DTYPES, Layout
from smidgen.difflora.zoo.tables import to_parquet

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One line of the manifest: row ``row`` of group ``group`` is the adapter of ``id`` after ``step`` steps.

    ``state`` is kept or rejected, then ``reason`` says why. ``loss`` and ``base_loss`` are denoising errors on the
    person's own pictures with the adapter and without; ``identity`` and ``base_identity`` the judge's scores of drawn
    pictures. ``last`` is false for the earlier ones of several checkpoints.
    """

    id: str
    group: int
    row: int
    split: str
    step: int
    last: bool
    state: str
    reason: str
    loss: float | None
    base_loss: float | None
    identity: float | None
    base_identity: float | None
    sha256: str


@dataclass(frozen=True)
class GroupFiles:
    """What a worker hands back: a shard and its manifest, as bytes ready to be put in place."""

    group: int
    shard: bytes
    manifest: bytes
    seconds: float = 0.0


def pack_group(layout: Layout, group: int, rows: Tensor, records: Sequence[Record], seconds: float = 0.0) -> GroupFiles:
    """Rows [n, size] and their lines (``row`` and ``sha256`` are filled in) as files; equal input gives equal bytes."""
    rows = rows.to("cpu", DTYPES[layout.dtype]).contiguous()
    described = json.dumps({"format": FORMAT, "group": group, "layout": layout.digest}, sort_keys=True)
    shard = save({"rows": rows}, metadata={"smidgen": described})  # one key: safetensors does not keep their order
    lines = [
        Record(**(vars(record) | {"group": group, "row": place, "sha256": row_digest(row)}))
        for place, (record, row) in enumerate(zip(records, rows, strict=True))
    ]
    return GroupFiles(group, shard, to_parquet(lines), seconds)


def row_digest(row: Tensor) -> str:
    """SHA-256 of a row's bytes in its stored number format."""
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
