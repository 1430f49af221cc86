"""Diagonal transform: T = I + diag(e), one trained factor for each input feature.

    (T x)_i = x_i + e_i x_i

The input-side form of (IA)^3 (Liu et al. 2022, arXiv 2205.05638), kept as the difference from one so that weight decay
pulls towards the base model. Trained: e [width]. Count: width.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.member import Tensors, Transform


class Diagonal(Transform):
    """T = I + diag(e)."""

    name = "diagonal"
    rates_like = "svfit"
    linear = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"e": (self.width,)}

    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x + x * tensors["e"].to(x.dtype)

    def row_shift(self, rows: Tensor, tensors: Tensors) -> Tensor:
        return rows * tensors["e"].to(rows.dtype)

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """Each feature by itself."""
        return {"e": (weight * change).sum(0) / weight.square().sum(0).clamp(min=1e-300)}
