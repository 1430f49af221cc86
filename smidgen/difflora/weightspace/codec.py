"""Codecs: adapters' rows <-> latents, behind one interface.

    rows [n, size] -> canonical form -> normalise -> encode -> standardise -> latents [n, *latent_shape]

A codec is fitted on training identities alone and keeps all it learnt from them: the reference adapter of the canonical
form, the normaliser, its own numbers, and mean and deviation of its latents, so that whatever models the latents sees
numbers of variance one. Decoding is differentiable. On disk a codec is ``codec.safetensors`` and ``codec.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.weightspace.canonical import canonical_rows
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Mode, Normaliser, Statistics
from smidgen.difflora.weightspace.rows import Rows
from smidgen.errors import DataError

JSON, TENSORS = "codec.json", "codec.safetensors"
FORMAT = 1


class Codec(ABC):
    """Rows <-> latents. A member writes the five methods with an underscore and gets the rest.

    Args:
        layout: of the rows.
        normalise: see :class:`Normaliser`.
    """

    name: ClassVar[str]
    kept = torch.float32  # number format of the reference in files

    def __init__(self, layout: Layout, normalise: Mode = "tensor") -> None:
        self.layout, self.normalise = layout, normalise
        self.reference: Tensor | None = None
        self.normaliser: Normaliser | None = None
        self.latent_mean: Tensor | None = None
        self.latent_width: Tensor | None = None

    @abstractmethod
    def _fit(self, rows: Prepared, folder: Path | None, progress: bool) -> None:
        """Learns from normalised rows; a learned codec keeps its checkpoints in ``folder``."""

    @abstractmethod
    def _encode(self, rows: Tensor) -> Tensor:
        """Normalised rows [n, size] -> raw latents [n, *latent_shape]."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`_encode`, as far as it goes."""

    @abstractmethod
    def _numbers(self) -> dict[str, Tensor]:
        """All that was learnt, by name."""

    @abstractmethod
    def _take(self, numbers: dict[str, Tensor]) -> None:
        """Inverse of :meth:`_numbers`."""

    def settings(self) -> dict[str, Any]:
        """The member's own arguments, JSON-ready."""
        return {}

    # ---- what a codec does -----------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one adapter's latent."""
        return tuple(self._fitted(self.latent_mean).shape)

    def fit(self, rows: Rows, folder: str | os.PathLike[str] | None = None, progress: bool = True) -> Codec:
        """Learns from the rows of training identities; returns itself.

        ``folder`` keeps the checkpoints of a learned codec: a fit that was killed goes on where it was. Raises
        DataError when there are fewer than two rows.
        """
        if len(rows) < 2:
            raise DataError(f"A codec needs at least two training adapters, got {len(rows)}.")
        self.reference = canonical_rows(rows.take([0])[0], self.layout)
        statistics = Statistics(self.layout.size)
        for block in rows.blocks():
            statistics.add(canonical_rows(block, self.layout, self.reference))
        self.normaliser = statistics.normaliser(self.layout, self.normalise)
        prepared = Prepared(rows, self)
        self._fit(prepared, Path(folder) if folder is not None else None, progress)
        self._standardise(prepared)
        return self

    def _standardise(self, rows: Prepared) -> None:
        """One mean for each latent number and one deviation for all, kept with the codec."""
        statistics = None
        with torch.no_grad():
            for block in rows.blocks():
                latents = self._encode(block)
                shape = latents.shape[1:]
                statistics = statistics or Statistics(shape.numel())
                statistics.add(latents.flatten(1))
        assert statistics is not None
        self.latent_mean = statistics.mean.float().reshape(shape)
        width = self._latent_width(statistics.square / statistics.count)
        self.latent_width = width.clamp(min=1e-12).float().expand(shape.numel()).reshape(shape).clone()

    def _latent_width(self, variance: Tensor) -> Tensor:
        """Deviation(s) that latents are divided by, given their variances [numbers]: one for all."""
        return variance.mean().sqrt()

    def prepare(self, rows: Tensor) -> Tensor:
        """Canonical and normalised rows [n, size]."""
        normaliser = self._fitted(self.normaliser)
        return normaliser(canonical_rows(rows.float(), self.layout, self.reference))  # type: ignore[no-any-return]

    def encode(self, rows: Tensor) -> Tensor:
        """Rows [n, size] -> latents [n, *latent_shape], of mean 0 and variance about 1 on the training identities."""
        self.layout.check_width(rows)
        mean, width = self._fitted(self.latent_mean), self._fitted(self.latent_width)
        return (self._encode(self.prepare(rows)) - mean.to(rows.device)) / width.to(rows.device)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, *latent_shape] -> rows [n, size] of the layout; differentiable."""
        mean, width = self._fitted(self.latent_mean), self._fitted(self.latent_width)
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise DataError(f"Latents have shape {tuple(latents.shape[1:])}, this codec's have {self.latent_shape}.")
        raw = self._decode(latents * width.to(latents) + mean.to(latents))
        return self._fitted(self.normaliser).inverse(raw)  # type: ignore[no-any-return]

    def error(self, rows: Tensor) -> float:
        """Share of the normalised rows' power around their mean that is lost by encoding and decoding."""
        wanted = self.prepare(rows)
        with torch.no_grad():
            found = self._fitted(self.normaliser)(self.decode(self.encode(rows)))
        return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())

    @staticmethod
    def _fitted(value: Any) -> Any:
        if value is None:
            raise DataError("This codec has not been fitted; call fit(rows) or load_codec(folder).")
        return value

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``codec.safetensors`` and ``codec.json``, each in one step; a normaliser's numbers once where all are the same."""
        numbers = {f"own.{name}": value for name, value in self._numbers().items()}
        normaliser = self._fitted(self.normaliser)
        numbers |= {name: _once(getattr(normaliser, name)) for name in ("shift", "width")}
        numbers |= {"reference": self._fitted(self.reference).to(self.kept)}
        numbers |= {"latent_mean": self._fitted(self.latent_mean), "latent_width": self._fitted(self.latent_width)}
        content = save_tensors({name: value.detach().cpu().contiguous() for name, value in numbers.items()})
        described = {"format": FORMAT, "codec": self.name, "settings": self.settings(), "normalise": self.normalise}
        described |= {"layout": json.loads(self.layout.to_json()), "sha256": hashlib.sha256(content).hexdigest()}
        replace_file(Path(folder) / TENSORS, content)
        replace_file(Path(folder) / JSON, json.dumps(described, indent=1))
        return Path(folder)


def _once(values: Tensor) -> Tensor:
    return values[:1] if bool((values == values[0]).all()) else values


class Prepared:
    """Rows as a codec's own part sees them: canonical and normalised."""

    def __init__(self, rows: Rows, codec: Codec) -> None:
        self.rows, self.codec = rows, codec

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int = 64):  # type: ignore[no-untyped-def]
        """As in :class:`Rows`."""
        return (self.codec.prepare(block) for block in self.rows.blocks(size))

    def take(self, indices):  # type: ignore[no-untyped-def]
        """As in :class:`Rows`."""
        return self.codec.prepare(self.rows.take(indices))
