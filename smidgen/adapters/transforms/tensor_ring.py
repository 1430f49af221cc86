"""Tensor-ring matrix transform (TLoRA): T[(i..),(j..)] = trace(A^1[i1,j1] ... A^D[iD,jD]).

TLoRA (Tao et al. 2025, arXiv 2501.08727), eq. for the TRM; index order C as in the released code (core 0 slowest, as
``torch.kron``). Rank 1 is the Kronecker product A^1 x ... x A^D. Trained: E^d = A^d - A^d_start, [R, R, I_d, I_d], so
that weight decay pulls T to the identity. Count: R^2 * sum I_d^2.

``init="triangular"`` (default above rank 1) breaks the symmetry that keeps the paper's start, A^d[r,r'] = I/R, at bond
rank one for ever (``init="paper"``, kept for parity). Both give T = I; triangular exactly, bit for bit.
Widths with large prime factors are padded: T acts on the padded space, restricted to the real features.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from smidgen.adapters.linalg.kronecker import kronecker_apply
from smidgen.adapters.linalg.least_squares import fit_ring_matrix
from smidgen.adapters.linalg.shapes import MOST_MODES, factorize, smooth_width
from smidgen.adapters.linalg.tensor_ring import halves, ring_matrix, ring_rows_difference
from smidgen.adapters.member import Tensors, Transform, stable_noise, whole_rank
from smidgen.errors import ConfigError, shown


class TensorRingTransform(Transform):
    """T = tensor-ring matrix.

    Args:
        width: input features.
        rank: ring rank R >= 1.
        init: "triangular" or "paper".
        order: number of cores D.
        mode_shape: factors (I_1, ..., I_D) of the width; found when not given.
    """

    name = "tensor_ring"
    alternating = True

    def __init__(
        self, width: int, rank: int = 1, init: str = "triangular", order: int = 3, mode_shape: list[int] | None = None
    ) -> None:
        super().__init__(width)
        whole_rank(rank, "transform_rank")
        if init not in ("triangular", "paper"):
            raise ConfigError(f"init of a tensor-ring transform is 'triangular' or 'paper', got {init!r}.")
        self.rank, self.init = rank, init
        self.padded = smooth_width(width, order)
        self.modes = tuple(mode_shape) if mode_shape else factorize(self.padded, order)
        if mode_shape:
            if len(self.modes) > MOST_MODES or not all(type(n) is int and 0 < n <= 4 * width for n in self.modes):
                raise ConfigError(
                    f"mode_shape is a list of at most {MOST_MODES} whole numbers from 1 to {4 * width}, got {shown(mode_shape)}."
                )
            self.padded = prod(self.modes)
            if not width <= self.padded <= 64 * width:
                raise ConfigError(f"mode_shape {list(self.modes)} spans {self.padded} features, the width is {width}.")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"e{d}": (self.rank, self.rank, n, n) for d, n in enumerate(self.modes)}

    def constants(self, seed: str) -> dict[str, Tensor]:
        return {f"start{d}": self._start_core(d, n, seed) for d, n in enumerate(self.modes)}

    def _start_core(self, d: int, n: int, seed: str) -> Tensor:
        R, eye = self.rank, torch.eye(n)
        if R == 1 or self.init == "paper":
            return (eye / R).expand(R, R, n, n).clone()
        core = torch.zeros(R, R, n, n)
        core[0, 0] = eye
        core[0, 1:] = stable_noise(f"{seed}/core{d}/row", (R - 1, n, n), 0.5 / n**0.5)
        if d > 0:
            core[1:, 1:] = stable_noise(f"{seed}/core{d}/rest", (R - 1, R - 1, n, n), (n * (R - 1)) ** -0.5)
        return core

    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        padded = self._padded(x)
        if self.rank == 1:
            wide = torch.promote_types(x.dtype, tensors["e0"].dtype)  # E is small beside I: never rounded to 16 bits
            y = kronecker_apply([f.to(wide) for f in self._factors(tensors)], padded.to(wide)).to(x.dtype)
        else:
            y = padded + padded @ self.excess(tensors).to(x.dtype).mT
        return self._cut(y)

    def row_shift(self, rows: Tensor, tensors: Tensors) -> Tensor:
        padded = self._padded(rows)
        if self.rank == 1:
            wide = torch.promote_types(rows.dtype, tensors["e0"].dtype)
            factors = [f.to(wide).mT for f in self._factors(tensors)]
            return self._cut((kronecker_apply(factors, padded.to(wide)) - padded).to(rows.dtype))
        cores, start = self._cores(tensors)
        if 2 * self.rank**2 * sum(halves(self.modes)) < self.padded:
            return self._cut(ring_rows_difference(padded, cores, start).to(rows.dtype))
        return self._cut(padded @ self.excess(tensors).to(rows.dtype))

    def excess(self, tensors: Tensors) -> Tensor:
        """T - I as a dense matrix in the trained dtype; exactly zero at the start, whatever the ring rank."""
        cores, start = self._cores(tensors)
        return ring_matrix(cores) - ring_matrix(start)

    def _cores(self, tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """The cores, and those of the start."""
        start = [tensors[f"start{d}"] for d in range(len(self.modes))]
        return [s + tensors[f"e{d}"] for d, s in enumerate(start)], start

    def _factors(self, tensors: Tensors) -> list[Tensor]:
        """The Kronecker factors [I_d, I_d] of rank 1."""
        return [core[0, 0] for core in self._cores(tensors)[0]]

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.padded - self.width)) if self.padded != self.width else x

    def _cut(self, y: Tensor) -> Tensor:
        return y[..., : self.width].contiguous() if self.padded != self.width else y

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """A few sweeps of alternating least squares over the cores, from the given ones."""
        given, starts = self._cores(tensors)
        cores = fit_ring_matrix(weight, weight + change, given)
        return {f"e{d}": core - start for d, (core, start) in enumerate(zip(cores, starts, strict=True))}
