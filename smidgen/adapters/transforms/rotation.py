"""Block-diagonal rotation (OFT): T = diag(R_1, ..., R_n), each R_k orthogonal through Cayley's map.

    R = (I - Q)^-1 (I + Q) = I + 2 (I - Q)^-1 Q,   Q = -Q^T

Orthogonal finetuning (Qiu et al. 2023, arXiv 2306.07280) on the input side, as peft has it. Trained: the strictly lower
triangles of the Q_k, [blocks, b(b-1)/2] with b = width / blocks. Count: blocks * b(b-1)/2. The paper rotates the output
side (b = out/blocks): ``outputs/rotation.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.member import Member, Tensors, Transform
from smidgen.errors import ConfigError

# Tangent of half an angle that is fitted: a half turn has none, and I - Q of larger ones is singular to fp32.
MOST = 1e3


class BlockRotation(Member):
    """A block-diagonal rotation of a space, of the input or of the output."""

    def __init__(self, width: int, blocks: int | None = None, block_size: int = 32) -> None:
        self.width = width
        if blocks is None:
            if block_size < 2:
                raise ConfigError(f"block_size must be at least 2, got {block_size}.")
            blocks = width // next(b for b in range(min(block_size, width), 0, -1) if width % b == 0)
        if blocks < 1 or width % blocks:
            near = [b for b in range(1, width + 1) if width % b == 0]
            best = sorted(near, key=lambda b: abs(b - blocks))[:3]
            raise ConfigError(f"blocks must divide the width {width}, got {blocks}; {sorted(best)} would work.")
        self.blocks, self.block = blocks, width // blocks
        if self.block == 1:
            more = f"; blocks=1 turns all {width} features together" if width > 1 else ""
            raise ConfigError(
                f"A rotation needs blocks of at least 2 features, a width of {width} gives blocks of 1{more}."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"q": (self.blocks, self.block * (self.block - 1) // 2)}

    def excess(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """R - I, [blocks, b, b]: exactly zero at the start. Solved in fp32 or better."""
        q = tensors["q"].to(torch.promote_types(tensors["q"].dtype, torch.float32))
        rows, cols = torch.tril_indices(self.block, self.block, offset=-1, device=q.device)
        flat = q.new_zeros(*q.shape[:-1], self.block * self.block)
        lower = flat.index_copy(-1, rows * self.block + cols, q).unflatten(-1, (self.block, self.block))
        skew = lower - lower.mT
        eye = torch.eye(self.block, dtype=q.dtype, device=q.device)
        return 2 * torch.linalg.solve(eye - skew, skew).to(dtype)

    def shift(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(R - I) x over the last axis."""
        excess = self.excess(tensors, x.dtype)
        pieces = x.unflatten(-1, (self.blocks, self.block))
        return torch.einsum("...kj,kij->...ki", pieces, excess).flatten(-2)

    def nearest(self, weight: Tensor, change: Tensor) -> Tensor:
        """q of the R whose ``weight (R - I)`` is nearest to ``change``, both [n, width]: for each block orthogonal Procrustes
        (Kabsch, 1976), through Cayley's inverse."""
        old, new = ((m.unflatten(-1, (self.blocks, self.block)).movedim(0, -2)) for m in (weight, weight + change))
        u, _, vh = torch.linalg.svd(old.mT @ new)
        side = torch.ones(u.shape[:-1], dtype=u.dtype)
        side[..., -1] = torch.linalg.det(u @ vh).sign()
        turn, eye = (u * side[..., None, :]) @ vh, torch.eye(self.block, dtype=u.dtype)
        skew = torch.linalg.lstsq((turn + eye).mT, (turn - eye).mT).solution.mT  # no Cayley form has a half turn
        angles, planes = torch.linalg.eigh(1j * (skew - skew.mT) / 2)
        angles = angles.clamp(-MOST, MOST)
        skew = (-1j * (planes * angles[..., None, :]) @ planes.mH).real
        rows, cols = torch.tril_indices(self.block, self.block, offset=-1)
        return skew[:, rows, cols]


class Rotation(BlockRotation, Transform):
    """T = block-diagonal rotation.

    Args:
        width: input features.
        blocks: number of blocks; must divide the width. Without it blocks have ``block_size`` features.
        block_size: features of a block; the largest divisor of the width not above it is taken.
    """

    name = "rotation"

    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x + self.shift(x, tensors)

    def row_shift(self, rows: Tensor, tensors: Tensors) -> Tensor:
        pieces = rows.unflatten(-1, (self.blocks, self.block))
        return torch.einsum("...ki,kij->...kj", pieces, self.excess(tensors, rows.dtype)).flatten(-2)

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        return {"q": self.nearest(weight, change)}
