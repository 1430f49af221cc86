"""Output rotation: S = diag(R_1, ..., R_n), each R_k orthogonal through Cayley's map, as in ``transforms/rotation.py``.

Orthogonal finetuning as it was published (Qiu et al. 2023, arXiv 2306.07280, equation 3, W' = R W on the output side). Trained: the
strictly lower triangles of the Q_k, [blocks, b(b-1)/2] with b = out / blocks. Count: blocks * b(b-1)/2.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.member import Output, Tensors
from smidgen.adapters.transforms.rotation import BlockRotation


class OutputRotation(BlockRotation, Output):
    """S = block-diagonal rotation.

    Args:
        width: output features.
        blocks: number of blocks; must divide the width. Without it blocks have ``block_size`` features.
        block_size: features of a block; the largest divisor of the width not above it is taken.
    """

    name = "output_rotation"
    rates_like = "oft"

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        return {"q": -self.nearest(weight.mT, change.mT)}  # of W^T S^T, and the transpose of a rotation negates Q
