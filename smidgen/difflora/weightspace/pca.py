"""Principal components through the n x n Gram matrix: n adapters of any size, read in blocks.

    X = rows - mean,  X X^T = U L U^T,  components C = L^-1/2 U^T X,  latents X C^T

weights2weights (arXiv 2406.09413) models a zoo of LoRAs so. Latents are divided by each component's own deviation, so
the training identities are white in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.difflora.weightspace.codec import Codec, Prepared
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Mode
from smidgen.errors import ConfigError

NUMBERS = 2**28  # of a block at most: 1 GiB in fp32, which a fit holds about six times (two blocks, also in fp64)


class PCA(Codec):
    """Args: ``components`` at most (fewer when the rows span less); ``block`` rows in memory at a time, twice, or as many
    as have NUMBERS numbers."""

    name = "pca"

    def __init__(self, layout: Layout, normalise: Mode = "tensor", components: int = 64, block: int = 512) -> None:
        super().__init__(layout, normalise)
        if components < 1 or block < 1:
            raise ConfigError(f"components and block must be at least 1, got {components} and {block}.")
        self.components, self.block = components, block
        self.mean: Tensor | None = None
        self.basis: Tensor | None = None
        self.explained: list[float] = []

    def settings(self) -> dict[str, Any]:
        return {"components": self.components, "block": self.block}

    def _fit(self, rows: Prepared, folder: Path | None, progress: bool) -> None:
        size = min(self.block, max(1, NUMBERS // self.layout.size))
        mean = sum(block.double().sum(0) for block in rows.blocks(size)) / len(rows)
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        at = 0
        for first in rows.blocks(size):
            left, beside = first.double() - mean, 0
            for second in rows.blocks(size):  # the upper triangle is enough
                if beside >= at:
                    product = left @ (second.double() - mean).T
                    gram[at : at + len(first), beside : beside + len(second)] = product
                    gram[beside : beside + len(second), at : at + len(first)] = product.T
                beside += len(second)
            at += len(first)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        spanned = int((values > values[0] * 1e-10).sum()) if values[0] > 0 else 0
        kept = max(1, min(self.components, spanned, len(rows) - 1))
        mix = vectors[:, :kept] / values[:kept].clamp(min=1e-30).sqrt()
        basis, at = torch.zeros(kept, self.layout.size, dtype=torch.float64), 0
        for block in rows.blocks(size):
            basis += mix[at : at + len(block)].T @ (block.double() - mean)
            at += len(block)
        total = float(values.sum())
        self.mean, self.basis = mean.float(), basis.float()
        self.explained = [float(v) / total if total > 0 else 0.0 for v in values[:kept]]

    def _encode(self, rows: Tensor) -> Tensor:
        return (rows - self._fitted(self.mean).to(rows)) @ self._fitted(self.basis).to(rows).T  # type: ignore[no-any-return]

    def _decode(self, latents: Tensor) -> Tensor:
        return latents @ self._fitted(self.basis).to(latents) + self._fitted(self.mean).to(latents)  # type: ignore[no-any-return]

    def _latent_width(self, variance: Tensor) -> Tensor:
        return variance.sqrt()

    def _numbers(self) -> dict[str, Tensor]:
        return {
            "mean": self._fitted(self.mean),
            "basis": self._fitted(self.basis),
            "explained": torch.tensor(self.explained),
        }

    def _take(self, numbers: dict[str, Tensor]) -> None:
        self.mean, self.basis = numbers["mean"], numbers["basis"]
        self.explained = numbers["explained"].tolist()
