"""Seeded residual: D = s sum_i delta_i u_i v_i^T, u_i and v_i fixed random sign vectors of norm one, delta from zero.

The spectral residual with random directions for singular ones. On trained networks a singular pair sees about the same
gradient as a random pair (docs/decisions/0007-byte-budget.md), so nothing is lost, and much is gained: no decomposition
and no base weight, the same bits on every machine and on quantised bases, and r beyond min(rows, cols). Pairs of sign
vectors are nearly orthogonal as matrices (<D_i, D_j> ~ 1/sqrt(rows cols)) without being orthogonal themselves. Relatives:
VeRA (arXiv 2310.11454), NOLA (arXiv 2310.02556), RandLoRA (arXiv 2502.00987). Trained: delta [r]. Count: r.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.member import Factors, Residual, Tensors, scale_of, stable_signs, whole_rank


class Seeded(Residual):
    """D = s sum_i delta_i u_i v_i^T.

    Args:
        rows, cols: shape of the matrix.
        r: number of directions, at least 1, or "full" for min(rows, cols); not clamped.
        alpha, scaling: see :func:`smidgen.adapters.member.scale_of`; s = 16/sqrt(r) by default, with which one learning
            rate suits few directions and many.
    """

    name = "seeded"
    diagonal_between = stacks = linear = True

    def __init__(
        self, rows: int, cols: int, r: int | str = 64, alpha: float | None = 16.0, scaling: str = "rslora"
    ) -> None:
        super().__init__(rows, cols)
        self.r = whole_rank(r, "r of a 'seeded' residual", full=min(rows, cols))
        self.scale = scale_of(alpha, self.r, scaling)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"delta": (self.r,)}

    def constants(self, seed: str) -> dict[str, Tensor]:
        up = stable_signs(f"{seed}/up", (self.rows, self.r)) / self.rows**0.5
        down = stable_signs(f"{seed}/down", (self.r, self.cols)) / self.cols**0.5
        return {"up": up, "down": down}

    def factors(self, tensors: Tensors) -> Factors:
        delta = tensors["delta"]
        return Factors(tensors["up"], delta * self.scale if self.scale != 1 else delta, tensors["down"])
