"""Spectral residual (SVFit): D = U_r diag(delta) V_r^T, the top r singular directions of the base weight, frozen.

SVFit (arXiv 2409.05926) trains s from S_r in W - W_r + U_r diag(s) V_r^T; delta = s - S_r is the same function with the
same gradients, exact at the start in any dtype and on quantised bases. Trained: delta [r]. Count: min(r, rows, cols).
Options: ``relative`` (delta_i = rho_i S_i), ``nonneg`` (relu(S + s delta) with alpha's and the adapter's own weight in s, as
SVDiff's released code has it; several adapters at once are each clamped, not their sum). r may be a whole
number, "full" (the paper's 16x setting) or "energy:0.99" (resolved per layer by the tuner, see ``energy_rank``).
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.linalg.cache import cached
from smidgen.adapters.linalg.svd import truncated_svd
from smidgen.adapters.member import Factors, Tensors
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis


class Spectral(DiagonalInBasis):
    """D = U_r diag(delta) V_r^T."""

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
            u, s, vh = truncated_svd(weight, self.r)
            return {"up": u, "values": s, "down": vh}

        return cached(("svd", self.r), weight, compute), {}

    def factors(self, tensors: Tensors) -> Factors:
        found, values = super().factors(tensors), tensors["values"]
        if self.relative and found.diagonal is not None:
            found = found._replace(diagonal=found.diagonal * values)
        return found._replace(floor=-values) if self.nonneg else found
