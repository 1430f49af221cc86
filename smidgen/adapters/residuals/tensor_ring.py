"""Tensor-ring residual (TLoRA): D[(o..),(i..)] = s trace(B^1[o1]..B^D[oD] C^1[i1]..C^D[iD]).

TLoRA (Tao et al. 2025, arXiv 2501.08727). It equals a low-rank product of rank R^2 exactly (P = chain of B, Q = chain
of C), so it exports to LoRA without loss. s = alpha/sqrt(R) in the authors' scripts (alpha = 1). B^1 = 0 at the start.
Start scales of the other cores: ``std="code"`` (released code: C^d 1/sqrt(I_d), B^d sqrt(O_d)/R^2) or ``"text"`` (the
paper's total sqrt(n_out)/n_in, much colder). Trained: all cores. Count: R^2 (sum O_d + sum I_d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.linalg.least_squares import fit_ring_vector
from smidgen.adapters.linalg.shapes import factorize, smooth_width
from smidgen.adapters.linalg.tensor_ring import ring_vector_factors
from smidgen.adapters.member import Factors, Residual, Tensors, scale_of, stable_noise, whole_rank
from smidgen.errors import ConfigError


class TensorRingResidual(Residual):
    """D = s TR(B, C).

    Args:
        rows, cols: shape of the matrix; rough widths are padded and cut.
        r: ring rank R >= 1.
        alpha, scaling: s = alpha/sqrt(R) by default with alpha = 1.
        std: "code" or "text", the published start scales.
        order: number of cores on each side.
    """

    name = "tensor_ring"
    alternating = True

    def __init__(
        self,
        rows: int,
        cols: int,
        r: int = 2,
        alpha: float | None = 1.0,
        scaling: str = "rslora",
        std: str = "code",
        order: int = 3,
    ) -> None:
        super().__init__(rows, cols)
        whole_rank(r, "residual_rank")
        if std not in ("code", "text"):
            raise ConfigError(f"std of a tensor-ring residual is 'code' or 'text', got {std!r}.")
        self.r, self.scale, self.std = r, scale_of(alpha, r, scaling), std
        self.out_modes = factorize(smooth_width(rows, order), order)
        self.in_modes = factorize(smooth_width(cols, order), order)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {f"b{d}": (self.r, self.r, n) for d, n in enumerate(self.out_modes)}
        return out | {f"c{d}": (self.r, self.r, n) for d, n in enumerate(self.in_modes)}

    def start(self, seed: str) -> dict[str, Tensor]:
        return {
            name: torch.zeros(shape)
            if name == "b0"
            else stable_noise(f"{seed}/{name}", shape, self._std(name, shape[-1]))
            for name, shape in self.shapes().items()
        }

    def _std(self, name: str, n: int) -> float:
        R = self.r
        if self.std == "code":
            return n**0.5 / R**2 if name.startswith("b") else n**-0.5
        return (n * R) ** 0.5 / R if name.startswith("b") else R**0.5 / (n * R)

    def factors(self, tensors: Tensors) -> Factors:
        out = [tensors[f"b{d}"] for d in range(len(self.out_modes))]
        inner = [tensors[f"c{d}"] for d in range(len(self.in_modes))]
        p, q = ring_vector_factors(out, inner)
        return Factors(p[: self.rows] * self.scale, None, q[:, : self.cols])

    def fit(self, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """A few sweeps of alternating least squares over the cores, from the given ones."""
        names = [*(f"b{d}" for d in range(len(self.out_modes))), *(f"c{d}" for d in range(len(self.in_modes)))]
        cores = fit_ring_vector(change / self.scale, [tensors[n] for n in names], self.out_modes, self.in_modes)
        return dict(zip(names, cores, strict=True))
