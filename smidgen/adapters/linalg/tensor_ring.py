"""Tensor rings: matrices and vectors as closed chains of small cores (TLoRA, arXiv 2501.08727, sections 3.1-3.2).

A *ring matrix* is a list of cores ``A_d`` of shape [bond, bond, I_d, I_d], a *ring vector* a list of cores
[bond, bond, n_d]; the bond axes come first, and core 0 is the slowest index (C order, same as ``torch.kron``)::

    T[(i1..iD), (j1..jD)] = trace(A_1[i1, j1] A_2[i2, j2] ... A_D[iD, jD])

Split in two, a ring of bond rank R is a sum of R^2 Kronecker products, T = sum_rs L[r, s] kron M[s, r].
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from smidgen.errors import ConfigError

_BLOCK = 2**20  # numbers of an intermediate at a time: inside the caches


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The dense matrix T [I, I] of ring cores [bond, bond, I_d, I_d], with I = I_1 ... I_D.

    Example:
        >>> a, b = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 3, 3)
        >>> torch.allclose(ring_matrix([a, b]), torch.kron(a[0, 0], b[0, 0]))
        True
    """
    _check(cores, 4)
    split = _split(_modes(cores))
    if split == len(cores):
        return torch.einsum("aaij->ij", reduce(join_matrices, cores))
    left, right = reduce(join_matrices, cores[:split]), reduce(join_matrices, cores[split:])
    dense = torch.einsum("abij,bakl->ikjl", left, right)
    return dense.reshape(left.shape[2] * right.shape[2], left.shape[3] * right.shape[3])


def halves(modes: Sequence[int]) -> tuple[int, int]:
    """Widths of the two halves that cost least: of a ring of these modes; the second is 1 for a single core.

    Example:
        >>> halves((8, 16, 16))
        (128, 16)
    """
    split = _split(tuple(modes))
    return math.prod(modes[:split]), math.prod(modes[split:])


def ring_rows_difference(rows: Tensor, cores: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """rows (T - T') over the last axis, for the ring matrices T and T' of two lists of cores, in 2 R^2 products with Kronecker
    factors and without a cancellation of large numbers: T - T' = sum_rs (L - L')[r, s] kron M[s, r] + L'[r, s] kron (M - M')[s, r].

    Example:
        >>> a, b = ([torch.randn(2, 2, n, n) for n in (2, 3)] for _ in range(2))
        >>> rows = torch.randn(5, 6)
        >>> torch.allclose(ring_rows_difference(rows, a, b), rows @ (ring_matrix(a) - ring_matrix(b)), atol=1e-4)
        True
    """
    _check(cores, 4)
    split = _split(_modes(cores))
    (left, right), (left0, right0) = (_halved(each, split) for each in (cores, others))
    lefts = torch.cat([left - left0, left0]).to(rows.dtype)  # [2 R^2, a, a]
    rights = torch.cat([right, right - right0]).to(rows.dtype)  # [2 R^2, b, b]
    terms, a, b = len(lefts), lefts.shape[-1], rights.shape[-1]
    first, second = (
        rights.transpose(0, 1).reshape(b, -1),
        lefts.permute(2, 1, 0).reshape(a, -1),
    )  # [b, terms b], [a, a terms]
    blocks = rows.reshape(-1, a * b).split(max(1, _BLOCK // (a * b * terms)))
    moved = [second @ (block.reshape(-1, b) @ first).view(len(block), a * terms, b) for block in blocks]
    return torch.cat(moved).reshape(rows.shape)


def _halved(cores: Sequence[Tensor], split: int) -> tuple[Tensor, Tensor]:
    """L [R^2, a, a] over (r, s) and M [R^2, b, b] over (s, r), both with (r, s) in the same order."""
    left = reduce(join_matrices, cores[:split])
    if split == len(cores):
        bond = left.shape[0]
        right = torch.eye(bond, dtype=left.dtype, device=left.device)[:, :, None, None]
    else:
        right = reduce(join_matrices, cores[split:])
    return left.flatten(0, 1), right.transpose(0, 1).flatten(0, 1)


def ring_vector_factors(out_cores: Sequence[Tensor], in_cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """P [O, R^2] and Q [R^2, I] with P Q = Delta, the ring vector of ``out_cores + in_cores`` read as a matrix [O, I].

    So a tensor-ring residual of bond rank R *is* a LoRA of rank R^2. Cores are [bond, bond, n_d].

    Example:
        >>> out, into = [torch.randn(2, 2, 3), torch.randn(2, 2, 2)], [torch.randn(2, 2, 5)]
        >>> p, q = ring_vector_factors(out, into)
        >>> p.shape, q.shape
        (torch.Size([6, 4]), torch.Size([4, 5]))
    """
    _check([*out_cores, *in_cores], 3)
    p, q = reduce(join_vectors, out_cores), reduce(join_vectors, in_cores)
    return p.flatten(0, 1).mT, q.transpose(0, 1).flatten(0, 1)


def _split(modes: tuple[int, ...]) -> int:
    """Where to cut the ring in two so that the two halves cost least; ``len(modes)`` for a single core."""
    if len(modes) == 1:
        return 1
    return min(range(1, len(modes)), key=lambda s: math.prod(modes[:s]) + math.prod(modes[s:]))


def join_matrices(a: Tensor, b: Tensor) -> Tensor:
    """One core [R, R, ik, jl] from two neighbours [R, R, i, j] and [R, R, k, l]."""
    return torch.einsum("rsij,stkl->rtikjl", a, b).flatten(4, 5).flatten(2, 3)


def join_vectors(a: Tensor, b: Tensor) -> Tensor:
    """One core [R, R, nm] from two neighbours [R, R, n] and [R, R, m]."""
    return torch.einsum("rsn,stm->rtnm", a, b).flatten(2, 3)


def _modes(cores: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(core.shape[-1] for core in cores)


def _check(cores: Sequence[Tensor], axes: int) -> None:
    kind = "[bond, bond, I_d, I_d]" if axes == 4 else "[bond, bond, n_d]"
    if not cores or any(core.dim() != axes or core.shape[2] != core.shape[-1] for core in cores):
        raise ConfigError(f"ring cores have shape {kind}, got {[tuple(core.shape) for core in cores]}")
    bonds = [core.shape[:2] for core in cores]
    if any(bond != bonds[0] or bond[0] != bond[1] for bond in bonds):
        raise ConfigError(f"ring cores share one square bond, got bonds {[tuple(bond) for bond in bonds]}")
