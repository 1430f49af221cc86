"""Scale: S = I + diag(e), one trained factor for each output feature.

    (S y)_i = y_i + e_i y_i

The vectors l_k and l_v of (IA)^3 (Liu et al. 2022, arXiv 2205.05638, section 3.3), kept as the difference from one so that
weight decay pulls towards the base model; its l_ff, which scales the input of a layer, is the ``diagonal`` transform.
Trained: e [width]. Count: out.
"""

from __future__ import annotations

from torch import Tensor

from smidgen.adapters.member import Output, Tensors


class Scale(Output):
    """S = I + diag(e)."""

    name = "scale"
    rates_like = "svfit"
    diagonal = linear = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"e": (self.width,)}

    def shift(self, y: Tensor, tensors: Tensors) -> Tensor:
        return y * tensors["e"].to(y.dtype)

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """Each feature by itself."""
        return {"e": (weight * change).sum(1) / weight.square().sum(1).clamp(min=1e-300)}
