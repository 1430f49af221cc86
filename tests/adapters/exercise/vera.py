"""VeRA-like residual: D = diag(b) B diag(d) A, A [r, cols] and B [rows, r] random, frozen and shared by equal matrices.

VeRA (Kopiczko et al. 2023, arXiv 2310.11454, equation 2). A and B are Kaiming-normal and follow from ``key`` and their
shape, so every layer of a shape, and every adapter, has the same ones and no file holds them. b = 0 and d = ``start_d``
at the start. Trained: d [r] and b [rows]. Count: r + rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from smidgen.adapters.member import Factors, Residual, Tensors, stable_noise
from smidgen.errors import ConfigError


class Vera(Residual):
    """D = diag(b) B diag(d) A.

    Args:
        rows, cols: shape of the matrix.
        r: rank >= 1; costs one number, so it may be large.
        key: another number gives other A and B.
        start_d: d at the start.
    """

    name = "vera"
    rates_like = "svfit"  # the paper's rates are 10 to 100 times its LoRA's

    def __init__(self, rows: int, cols: int, r: int = 256, key: int = 0, start_d: float = 0.1) -> None:
        super().__init__(rows, cols)
        if not isinstance(r, int) or r < 1:
            raise ConfigError(f"r of a vera residual must be a whole number of at least 1, got {r!r}.")
        self.r, self.key, self.start_d = r, key, start_d

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"d": (self.r,), "b": (self.rows,)}

    def start(self, seed: str) -> dict[str, Tensor]:
        return {"d": torch.full((self.r,), self.start_d), "b": torch.zeros(self.rows)}

    def constants(self, seed: str) -> dict[str, Tensor]:
        return {"A": shared(self.key, "A", self.r, self.cols), "B": shared(self.key, "B", self.rows, self.r)}

    def factors(self, tensors: Tensors) -> Factors:
        return Factors(tensors["b"][:, None] * tensors["B"], tensors["d"], tensors["A"])


@cache
def shared(key: int, name: str, rows: int, cols: int) -> Tensor:
    """A frozen random matrix: the same object for whoever asks again."""
    return stable_noise(f"vera/{key}/{name}", (rows, cols), (2 / cols) ** 0.5)
