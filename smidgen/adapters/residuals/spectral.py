"""Spectral residual (SVFit): D = U_r diag(delta) V_r^T, the top r singular directions of the base weight, frozen.

SVFit (arXiv 2409.05926) trains s from S_r in W - W_r + U_r diag(s) V_r^T; delta = s - S_r is the same function with the
same gradients, exact at the start in any dtype and on quantised bases. Trained: delta [r]. Count: min(r, rows, cols).
Where singular values are equal or zero the weight does not determine the directions: see ``linalg/ties.py``.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.linalg.cache import cached
from smidgen.adapters.linalg.ties import follow_ties, svd_with_ties
from smidgen.adapters.member import Factors, Tensors
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis


class Spectral(DiagonalInBasis):
    """D = U_r diag(delta) V_r^T.

    Args:
        rows, cols: shape of the matrix.
        r: directions: a whole number, "full" (the paper's 16x setting), or "energy:0.99" (resolved for each layer by the
            tuner, see ``energy_rank``).
        alpha, scaling: see :func:`smidgen.adapters.member.scale_of`.
        relative: trains rho in delta_i = rho_i S_i.
        nonneg: keeps singular values at or above zero: relu(S + s delta), with alpha and the adapter's own strength in s, as
            SVDiff's released code has it. Several such adapters at once are each clamped, not their sum.
    """

    name = "spectral"

    def __init__(
        self,
        rows: int,
        cols: int,
        r: int | str = 64,
        alpha: float | None = None,
        scaling: str = "plain",
        relative: bool = False,
        nonneg: bool = False,
    ) -> None:
        super().__init__(rows, cols, r, alpha, scaling)
        self.relative, self.nonneg = relative, nonneg

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().factor_shapes() | {"values": (self.r,)}

    def decompose(self, weight: Tensor, pins: Tensors | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        def compute() -> dict[str, Tensor]:
            return dict(zip(("up", "values", "down", "ties"), svd_with_ties(weight, self.r), strict=True))

        def follow() -> dict[str, Tensor]:
            return dict(zip(("up", "values", "down"), follow_ties(weight, self.r, ties), strict=True))

        plain = (
            None
            if pins is not None and "ties" in pins
            else dict(cached(("svd with ties and rank", self.r), weight, compute))
        )
        ties = pins["ties"] if plain is None and pins is not None else plain.pop("ties")  # type: ignore[union-attr]
        if plain is not None and (pins is not None or not len(ties)):  # a file of before there were ties has none
            return plain, {}
        found = cached(("svd along ties", self.r, tuple(ties.tolist())), weight, follow)
        return found, {"ties": ties} if pins is None else {}

    def factors(self, tensors: Tensors) -> Factors:
        found, values = super().factors(tensors), tensors["values"]
        if self.relative and found.diagonal is not None:
            found = found._replace(diagonal=found.diagonal * values)
        return found._replace(floor=-values) if self.nonneg else found
