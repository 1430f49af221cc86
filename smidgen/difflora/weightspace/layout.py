"""The layout: what each number of an adapter's vector is. An adapter becomes one row, a row becomes an adapter.

A layout lists the trained tensors in order (target, name, shape, offset), the factor in front of the residual, the
adapter's config and the base it sits on. It is plain JSON. Any method has one: LoRA's factors, SVFit's and LoLDU's
vectors, TLoRA's cores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.checkpoint import base_lock
from smidgen.adapters.export import export
from smidgen.adapters.tuner.base import base_matrices
from smidgen.adapters.tuner.building import make_slot
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.injection import remove
from smidgen.errors import AdapterFileError, BaseLockError, DataError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIG = (
    "method", "transform", "residual", "output", "r", "transform_options", "residual_options", "output_options",
    "rank_pattern", "seed",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "store_factors", "store_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a row: ``row[offset : offset + size]`` is tensor ``side`` of target ``key``, times ``scale`` in
    the delta (alpha / r; 1 without alpha)."""

    key: str
    side: str
    shape: tuple[int, ...]
    offset: int
    scale: float = 1.0

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def columns(self) -> slice:
        """Where the tensor lies in a row."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Layout:
    """An ordered list of tensors and the adapter's config.

    Attributes:
        entries: in the order of the row.
        config: fields of :class:`smidgen.SmidgenConfig` that rebuild the adapter.
        base: ``sha256`` of the target weights in fp32 and their ``lock`` (see ``adapters/checkpoint/base_lock.py``).
        dtype: number format of stored rows.
    """

    entries: tuple[Entry, ...]
    config: dict[str, Any] = field(hash=False)
    base: dict[str, Any] = field(hash=False)
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(entry.size for entry in self.entries)

    @property
    def digest(self) -> str:
        """SHA-256 of the layout: rows belong together when it is the same."""
        known = json.loads(self.to_json())
        known["base"] = self.base["sha256"]  # the lock's sketches round differently from machine to machine
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def pack(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """target -> name -> tensor [..., *shape] laid end to end: [..., size]; leading axes are kept.

        Raises:
            AdapterFileError: naming a tensor that is missing, unknown or of another shape.
        """
        found = {(key, side) for key, own in tensors.items() for side in own}
        wanted = {(entry.key, entry.side) for entry in self.entries}
        for key, side in sorted(wanted - found):
            raise AdapterFileError(f"The adapter lacks {side!r} of {key!r}, which the layout calls for.")
        for key, side in sorted(found - wanted):
            hint = did_you_mean(key, {entry.key for entry in self.entries})
            raise AdapterFileError(f"The layout knows no tensor {side!r} of {key!r}.{hint}")
        parts = []
        for entry in self.entries:
            value = tensors[entry.key][entry.side]
            if tuple(value.shape[value.ndim - len(entry.shape) :]) != entry.shape:
                raise AdapterFileError(
                    f"{entry.side!r} of {entry.key!r} has shape {tuple(value.shape)}, the layout has {entry.shape}: "
                    "adapters of one zoo share rank and targets."
                )
            parts.append(value.flatten(value.ndim - len(entry.shape)))
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: Tensor) -> dict[str, dict[str, Tensor]]:
        """Inverse of :meth:`pack`: [..., size] -> target -> name -> [..., *shape], views with gradients."""
        self.check_width(rows)
        out: dict[str, dict[str, Tensor]] = {}
        parts = rows.split([entry.size for entry in self.entries], -1)  # one gradient for all of them
        for entry, part in zip(self.entries, parts, strict=True):
            out.setdefault(entry.key, {})[entry.side] = part.reshape(*rows.shape[:-1], *entry.shape)
        return out

    def check_width(self, rows: Tensor) -> None:
        """Raises DataError when the last axis is not that of this layout."""
        if rows.shape[-1] != self.size:
            raise DataError(f"Rows have {rows.shape[-1]} numbers, the layout has {self.size}.")

    def factor_pairs(self) -> Iterator[tuple[Entry, Entry]]:
        """(a [r, cols], b [rows, r]) of every target whose residual is a product of two trained factors."""
        if self.config.get("residual") == "low_rank":
            known = {(entry.key, entry.side): entry for entry in self.entries}
            for (key, side), entry in known.items():
                if side == "residual_a":
                    yield entry, known[key, "residual_b"]

    def check_same(self, other: Layout, what: str = "These adapters") -> None:
        """Raises BaseLockError for another base, DataError for another family, rank, target or number format."""
        if self.base.get("sha256") != other.base.get("sha256"):
            raise BaseLockError(
                f"{what} were trained on another base (weights {_short(other.base)}, here {_short(self.base)}); a zoo "
                "holds adapters of one base, to the bit."
            )
        for name in ("residual", "transform", "output"):
            if self.config.get(name) != other.config.get(name):
                raise DataError(f"{what} have {name} {other.config.get(name)!r}, here it is {self.config.get(name)!r}.")
        mine, theirs = ({(e.key, e.side): e for e in layout.entries} for layout in (self, other))
        for key, side in sorted(mine.keys() ^ theirs.keys()):
            owner = "only they" if (key, side) in theirs else "they do not"
            raise DataError(f"{what} sit on other targets: {owner} have {side!r} of {key!r}.")
        for place, entry in mine.items():
            if theirs[place].shape != entry.shape:
                raise DataError(
                    f"{what} have {entry.side!r} of {entry.key!r} in shape {theirs[place].shape}, here {entry.shape}: "
                    "mixed ranks."
                )
        if self.digest != other.digest:
            raise DataError(f"{what} have the same tensors in another order, scale, number format or config.")

    def to_json(self) -> str:
        """The layout as JSON, keys sorted; equal layouts give equal text."""
        entries = [[e.key, e.side, list(e.shape), e.offset, e.scale] for e in self.entries]
        known = {"entries": entries, "config": self.config, "base": self.base, "dtype": self.dtype}
        return json.dumps(known, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "The layout") -> Layout:
        """Inverse of :meth:`to_json`; DataError when it is damaged."""
        try:
            data = json.loads(text)
            entries = tuple(
                Entry(str(key), str(side), tuple(map(int, shape)), int(offset), float(scale))
                for key, side, shape, offset, scale in data["entries"]
            )
            layout = cls(entries, dict(data["config"]), dict(data["base"]), str(data["dtype"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} is damaged ({error}).") from error
        ends = [entry.offset + entry.size for entry in entries]
        if not {"sha256", "lock"} <= layout.base.keys():
            raise DataError(f"{where} is damaged: it does not say which base it belongs to.")
        if layout.dtype not in DTYPES or [entry.offset for entry in entries] != [0, *ends[:-1]]:
            raise DataError(
                f"{where} is damaged: offsets do not follow each other, or dtype {layout.dtype!r} is unknown."
            )
        return layout


def is_lora(layout: Layout) -> bool:
    """Whether adapters of ``layout`` are plain LoRA."""
    return not (layout.config.get("transform") or layout.config.get("output")) and bool(list(layout.factor_pairs()))


def layout_of(model: nn.Module, config: smidgen.SmidgenConfig, dtype: str = "float32") -> Layout:
    """The layout of an adapter of ``config`` on the adapted layers of ``model``.

    Raises:
        DataError: the model carries no adapter.

    Example:
        >>> model = smidgen.adapt(nn.Sequential(nn.Linear(4, 6)), "lora", r=1, target_modules=["0"])
        >>> layout_of(model, model.peft_config["default"]).size
        10
    """
    layers = adapted_layers(model)
    if not layers:
        raise DataError("The model carries no adapter; call smidgen.adapt first.")
    entries: list[Entry] = []
    offset = 0
    for key in sorted(layers):
        slot = make_slot(config, layers[key].get_base_layer(), key)
        scale = float(getattr(slot.residual, "scale", 1.0))
        for side, value in slot.trained().items():
            shape = tuple(value.shape)
            entries.append(Entry(key, side, shape, offset, scale if side.startswith("residual") else 1.0))
            offset += prod(shape)
    return Layout(tuple(entries), plain_config(config), base_of(layers), dtype)


def plain_config(config: smidgen.SmidgenConfig) -> dict[str, Any]:
    """The fields that rebuild an adapter, JSON-ready."""
    values = {name: getattr(config, name) for name in _CONFIG}
    return {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in values.items() if v not in (None, {}, [])}


def base_of(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What pins the base down: the target weights' hash, and the lock that tells a re-cast copy from another base."""
    matrices = base_matrices(dict(layers))
    digest = hashlib.sha256()
    for name in sorted(matrices):
        digest.update(f"{name} {tuple(matrices[name].shape)}".encode())
        digest.update(matrices[name].detach().float().cpu().contiguous().numpy().tobytes())
    return {"sha256": digest.hexdigest(), "lock": base_lock.make_lock(matrices)}


def check_model(layout: Layout, model: nn.Module) -> None:
    """Raises BaseLockError unless ``model`` holds the weights the layout's adapters were trained on (a re-cast copy of
    them will do)."""
    keys = set(base_lock.read_lock(layout.base["lock"]).targets)
    layers = {name: module for name, module in _plain_modules(model).items() if name in keys}
    for missing in sorted(keys - layers.keys()):
        hint = did_you_mean(missing, _plain_modules(model))
        raise BaseLockError(f"This base has no module {missing!r}, which the adapters sit on.{hint}")
    base_lock.check_lock(layout.base["lock"], base_matrices(layers)).raise_if_other()


def write_adapter(
    layout: Layout, row: Tensor, model: nn.Module, folder: str | os.PathLike[str], as_peft: bool = False
) -> Path:
    """Writes one row [size] as an ordinary adapter folder; ``model`` is the plain base and stays as it was. With ``as_peft`` a plain
    LoRA is written in peft's own form, alpha in B, which is ours too.

    Raises:
        BaseLockError: the model is another base.
    """
    check_model(layout, model)
    config = smidgen.SmidgenConfig(**layout.config)
    if as_peft:
        config.residual_options = {k: v for k, v in config.residual_options.items() if k not in ("alpha", "scaling")}
        scales = [
            torch.full((entry.size,), entry.scale if entry.side == "residual_b" else 1.0) for entry in layout.entries
        ]
        row = row.detach().float() * torch.cat(scales)
    name = "row"
    smidgen.adapt(model, config, name)
    try:
        tensors = layout.unpack(row.detach().float())
        with torch.no_grad():
            for key, layer in adapted_layers(model, name).items():
                for side, parameter in layer.slot(name).trained().items():
                    parameter.copy_(tensors[key][side])
        return export(model, folder, "peft", name).folder if as_peft else smidgen.save(model, folder, name)
    finally:
        remove(model, name)


def _plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    carried = adapted_layers(model)
    return {n: m for n, m in model.named_modules() if ".base_layer" not in n and ".smidgen_slots" not in n} | carried


def _short(base: Mapping[str, Any]) -> str:
    return str(base.get("sha256", "unknown"))[:12]
