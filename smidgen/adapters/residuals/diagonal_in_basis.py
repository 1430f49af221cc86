"""What SVFit and LoLDU share: a trained diagonal between two frozen factors, D = s B diag(delta) A.

B [rows, r] and A [r, cols] follow from the base weight; the base weight itself is never rewritten. d Loss/d delta_i =
B_i^T G A_i^T needs no dense update. Both methods run through the same layer; only the factors differ.
"""

from __future__ import annotations

from smidgen.adapters.member import Factors, Residual, Tensors, scale_of, whole_rank


class DiagonalInBasis(Residual):
    """D = s up diag(delta) down with frozen ``up`` and ``down``. Trained: delta [r]. Count: min(r, rows, cols).

    s is alpha over the r that was asked for, also at a matrix that has fewer directions.
    """

    decomposes = True
    diagonal_between = stacks = linear = True

    def __init__(self, rows: int, cols: int, r: int | str = 64, alpha: float | None = None, scaling: str = "plain"):
        super().__init__(rows, cols)
        most = min(rows, cols)
        self.asked = whole_rank(r, f"r of a {self.name!r} residual", full=most)
        self.r = min(self.asked, most)
        self.scale = scale_of(alpha, self.asked, scaling)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"delta": (self.r,)}

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"up": (self.rows, self.r), "down": (self.r, self.cols)}

    def factors(self, tensors: Tensors) -> Factors:
        delta = tensors["delta"]
        return Factors(tensors["up"], delta * self.scale if self.scale != 1 else delta, tensors["down"])
