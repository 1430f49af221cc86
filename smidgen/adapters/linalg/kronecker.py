"""Products with a Kronecker matrix, (A_1 kron ... kron A_D) x, without forming it.

Neighbouring modes are merged into two factors: fewer passes over memory for a few more multiplications. Each product
also rotates the axes: A @ Z.view(-1, n)^T takes the last mode off the end and puts it in front, so after both the modes
stand in order and the tokens last; one copy puts the tokens first again (a following layer must see the memory order it
sees without an adapter, or its rounding changes). Tokens go in blocks that stay in the processor's cache. Only x and
the factors are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

_BLOCK = 2**17  # numbers of x at a time: half a megabyte in fp32, with its intermediates inside a level-2 cache


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
    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    with torch.autocast(kind, enabled=False):  # which would round I + E to 16 bits, and break the backward pass
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
        blocks = [(left @ _inner(rows, left, right).T).reshape(x.shape[-1], -1).T for rows in _blocks(x)]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0].contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        x, left, right = ctx.saved_tensors
        parts = [_backward(rows, g, left, right) for rows, g in zip(_blocks(x), _blocks(grad), strict=True)]
        grad_x, grad_left, grad_right = zip(*parts, strict=True)
        return torch.cat(grad_x), sum(grad_left), sum(grad_right)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _BLOCK // max(1, x.shape[-1])))


def _inner(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """right applied to the last mode of rows [n, a b], which is then in front: [b n, a]."""
    return (right @ rows.reshape(-1, right.shape[0]).T).reshape(-1, left.shape[0])


def _backward(rows: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outer = grad.T.reshape(left.shape[0], -1)
    inner = (outer.T @ left).reshape(right.shape[0], -1)
    grad_right = inner @ rows.reshape(-1, right.shape[0])
    return (inner.T @ right).reshape(rows.shape), outer @ _inner(rows, left, right), grad_right
