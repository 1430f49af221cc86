"""What SVFit and LoLDU share: a trained diagonal between two frozen factors, D = s B diag(delta) A.

B [rows, r] and A [r, cols] follow from the base weight; the base weight itself is never rewritten. d Loss/d delta_i =
B_i^T G A_i^T needs no dense update. Both methods run through the same layer; only the factors differ.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.member import Factors, Residual, Tensors, scale_of
from smidgen.errors import ConfigError


class DiagonalInBasis(Residual):
    """D = s up diag(delta) down with frozen ``up`` and ``down``. Trained: delta [r]. Count: min(r, rows, cols)."""

    decomposes = True
    diagonal_between = stacks = True

    def __init__(self, rows: int, cols: int, r: int | str = 64, alpha: float | None = None, scaling: str = "plain"):
        super().__init__(rows, cols)
        most = min(rows, cols)
        if r == "full":
            r = most
        if not isinstance(r, int) or r < 1:
            raise ConfigError(f"r of {self.name!r} must be a whole number of at least 1 or 'full', got {r!r}.")
        self.r = min(r, most)
        self.scale = scale_of(alpha, self.r, scaling)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"delta": (self.r,)}

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"up": (self.rows, self.r), "down": (self.r, self.cols)}

    def diagonal(self, tensors: Tensors) -> Tensor:
        """The trained diagonal before scaling, [r]."""
        return tensors["delta"]

    def factors(self, tensors: Tensors) -> Factors:
        diagonal = self.diagonal(tensors)
        return Factors(tensors["up"], diagonal * self.scale if self.scale != 1 else diagonal, tensors["down"])
