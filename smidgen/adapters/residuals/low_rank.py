"""Low-rank residual (LoRA): D = s B A, A [r, cols] Kaiming-uniform, B [rows, r] zero.

LoRA (Hu et al. 2021, arXiv 2106.09685). s = alpha/r, or alpha/sqrt(r) with ``scaling="rslora"``; 1 without alpha.
Trained: A and B. Count: r (rows + cols).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.linalg.least_squares import leading_product
from smidgen.adapters.member import Factors, Residual, Tensors, scale_of, stable_noise, whole_rank


class LowRank(Residual):
    """D = s B A.

    Args:
        rows, cols: shape of the matrix.
        r: rank >= 1; not clamped, as in LoRA.
        alpha, scaling: see :func:`smidgen.adapters.member.scale_of`.
    """

    name = "low_rank"
    stacks = True

    def __init__(self, rows: int, cols: int, r: int = 8, alpha: float | None = None, scaling: str = "plain") -> None:
        super().__init__(rows, cols)
        whole_rank(r, "r of a low-rank residual")
        self.r, self.scale = r, scale_of(alpha, r, scaling)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (self.r, self.cols), "b": (self.rows, self.r)}

    def start(self, seed: str) -> dict[str, Tensor]:
        a = stable_noise(f"{seed}/a", (self.r, self.cols), (3 * self.cols) ** -0.5)
        return {"a": a, "b": torch.zeros(self.rows, self.r)}

    def factors(self, tensors: Tensors) -> Factors:
        return Factors(tensors["b"] * self.scale if self.scale != 1 else tensors["b"], None, tensors["a"])

    def fit(self, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """The best product of rank r (Eckart and Young, 1936), its singular values shared between A and B."""
        up, values, down = leading_product(change, min(self.r, *change.shape))
        half = values.sqrt()
        a, b = change.new_zeros(self.r, self.cols), change.new_zeros(self.rows, self.r)
        a[: len(half)], b[:, : len(half)] = half[:, None] * down, up * half / self.scale
        return {"a": a, "b": b}
