"""Magnitude (DoRA): S = diag(m) / |W T + D|, the norm of each row of the weight trained apart from its direction.

    S_ii = (|W_i| + e_i) / |(W T + D)_i|,    W'_i = (|W_i| + e_i) (W T + D)_i / |(W T + D)_i|

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5), with D of rank r; the norms are those of rows, one for each output
feature, as in the released code and in peft. Its m is kept as e, the difference from |W_i|. By ``detach`` (section 4.3,
and peft) the norm in the denominator is a constant in the backward pass; without it gradients are those of the formula.
Trained: e [width]. Count: out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from smidgen.adapters.member import Output, Tensors


class Magnitude(Output):
    """S = diag(m) / |W T + D|.

    Args:
        width: output features.
        detach: treat |W T + D| as a constant in the backward pass.
    """

    name = "magnitude"
    rates_like = "lora"
    normed = True
    diagonal = linear = True  # alone, where |W T + D| is |W|
    exact_gradient: ClassVar[Mapping[str, Any]] = {"detach": False}

    def __init__(self, width: int, detach: bool = True) -> None:
        super().__init__(width)
        self.detach = detach

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"e": (self.width,)}

    def shift(self, y: Tensor, tensors: Tensors) -> Tensor:
        before, after = tensors["base_norms"], tensors["norms"]
        after = after.detach() if self.detach else after
        return y * ((before - after + tensors["e"]) / after.where(after > 0, 1.0)).to(y.dtype)

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """Each feature by itself."""
        norms = weight.norm(dim=1)
        before = tensors.get("base_norms", norms)
        return {"e": norms - before + (weight * change).sum(1) / norms.clamp(min=1e-300)}
