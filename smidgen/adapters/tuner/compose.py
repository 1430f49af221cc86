"""A linear layer with a trained diagonal between wide frozen factors, at the cost of little more than the layer alone.

With N tokens, weight [m, n] and r directions, the activation side costs 2 N r (m + n) multiplications a training step.
Composed, W + B diag(d) A is formed once for the forward and once for the backward pass (2 r m n), and the gradient of d
is the diagonal of B^T (g^T x) A^T (N m n + r m n). For r near full and many tokens the second is cheaper, down to 1.5x
of the frozen layer, where the activation side needs 3x and the product form (gB) * (xA) 2x; ``worth`` says when.
Only x and d are kept for the backward pass, as the frozen layer's input would be for LoRA; no dense gradient outlives
the call. See docs/decisions/0003-composed-diagonal.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def worth(tokens: int, rows: int, cols: int, r: int) -> bool:
    """Whether composing takes fewer multiplications than the activation side, for forward and backward together."""
    return 2 * r * rows * cols + tokens * rows * cols < 2 * tokens * r * (rows + cols)


def repaid(tokens: int, rows: int, cols: int) -> bool:
    """Whether so many tokens went through the factors that W + D, kept for more of them, would have been made meanwhile: it takes
    r m n multiplications, they r (m + n) a token, eight times as slow for few tokens at once."""
    return 8 * tokens * (rows + cols) >= rows * cols


class ComposedLinear(torch.autograd.Function):
    """y = x (W + B diag(d) A)^T + bias; gradients for x and d only.

    Shapes: x [..., n], weight [m, n], bias [m] or None, up B [m, r], diagonal d [r], down A [r, n].
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, diagonal: Tensor, down: Tensor
    ) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, up, diagonal, down)
        return torch.nn.functional.linear(x, torch.addmm(weight, up * diagonal, down), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        x, weight, up, diagonal, down = ctx.saved_tensors
        grad_x = grad_diagonal = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ torch.addmm(weight, up * diagonal, down)
        if ctx.needs_input_grad[4]:
            dense = grad.flatten(0, -2).T @ x.flatten(0, -2)
            grad_diagonal = ((up.T @ dense) * down).sum(dim=1)
        return grad_x, None, None, None, grad_diagonal, None
