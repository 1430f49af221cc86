"""Products with a Kronecker matrix, (A_1 kron ... kron A_D) x, without forming it.

Each mode product is one long matrix product that also rotates the axes: A_d @ Z.view(-1, I_d)^T takes the last mode off
the end and puts it in front, so after D steps the modes stand in order and the tokens last; one copy puts the tokens
first again (a following layer must see the memory order it sees without an adapter, or its rounding changes).
Neighbouring modes are merged into two factors: fewer passes over memory for a few more multiplications. Only x and the
factors are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor


def kronecker_apply(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """(A_1 kron ... kron A_D) x along the last axis: factors [I_d, I_d], x [..., I_1 ... I_D]; core 0 slowest.

    Exact when every factor is the identity. Works under ``torch.func.vmap``.

    Example:
        >>> a, b = torch.randn(2, 2), torch.randn(3, 3)
        >>> x = torch.randn(5, 6)
        >>> torch.allclose(kronecker_apply([a, b], x), x @ torch.kron(a, b).T, atol=1e-5)
        True
    """
    left, right = _halves(factors)
    y: Tensor = _Rotated.apply(x.reshape(-1, x.shape[-1]), left, right)
    return y.view(x.shape)


def _halves(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two factors with the same product, cut where they are smallest; the right one may be [1, 1]."""
    modes = [f.shape[-1] for f in factors]
    cut = min(range(1, len(modes) + 1), key=lambda c: prod(modes[:c]) + prod(modes[c:]))
    one = factors[0].new_ones(1, 1)
    return reduce(torch.kron, factors[:cut]), reduce(torch.kron, factors[cut:], one) if cut < len(modes) else one


class _Rotated(torch.autograd.Function):
    """x [tokens, a b], left [a, a], right [b, b] -> (left kron right) x [tokens, a b]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        z = right @ x.reshape(-1, right.shape[0]).T
        z = left @ z.reshape(-1, left.shape[0]).T
        return z.reshape(x.shape[-1], -1).T.contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        x, left, right = ctx.saved_tensors
        rows = x.reshape(-1, right.shape[0])
        z = (right @ rows.T).reshape(-1, left.shape[0])
        outer = grad.T.reshape(left.shape[0], -1)
        grad_left = outer @ z
        inner = (outer.T @ left).reshape(right.shape[0], -1)
        return (inner.T @ right).reshape(x.shape), grad_left, inner @ rows
