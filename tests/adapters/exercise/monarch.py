"""Monarch transform: T = P^T (I + L) P (I + R), R and L block-diagonal, P the permutation that deals blocks out.

Monarch matrices (Dao et al. 2022, arXiv 2204.00595, definition 3.1), kept as differences from the identity: R = L = 0 at
the start. R has ``blocks`` blocks of b = width / blocks features and mixes within a block; P puts feature j of block i at
place i of group j, and L mixes within the b groups, so that every output sees every input.
Trained: R [blocks, b, b] and L [b, blocks, blocks]. Count: width (b + blocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.member import Tensors, Transform
from smidgen.errors import ConfigError


class Monarch(Transform):
    """T = P^T (I + L) P (I + R).

    Args:
        width: input features.
        blocks: number of blocks of R; must divide the width. The divisor nearest to its square root unless given.
    """

    name = "monarch"

    def __init__(self, width: int, blocks: int | None = None) -> None:
        super().__init__(width)
        divisors = [b for b in range(1, width + 1) if width % b == 0]
        self.blocks = min(divisors, key=lambda b: abs(b - width**0.5)) if blocks is None else blocks
        if self.blocks not in divisors:
            raise ConfigError(f"blocks must divide the width {width}, got {blocks!r}; one of {divisors} would work.")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        n, b = self.blocks, self.width // self.blocks
        return {"R": (n, b, b), "L": (b, n, n)}

    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        dealt = _mixed(x.unflatten(-1, (self.blocks, -1)), tensors["R"]).mT
        return _mixed(dealt, tensors["L"]).mT.flatten(-2)


def _mixed(pieces: Tensor, blocks: Tensor) -> Tensor:
    """(I + block) of each piece: [..., k, j] and [k, i, j] -> [..., k, i]."""
    return pieces + torch.einsum("...kj,kij->...ki", pieces, blocks.to(pieces.dtype))
