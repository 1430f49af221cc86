"""Least squares by which members are fitted to a change of a weight: in float64, closed where there is a closed form.

A ring is linear in each of its cores, so one core after the other is solved for while the others stand (alternating least
squares; Zhao et al. 2016, arXiv 1606.05535, algorithm 2). On a change that a ring made this ends at rounding in about ten
sweeps from any start; on another it settles. A call makes a few sweeps from the cores it is given, to be called again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from smidgen.adapters.linalg.tensor_ring import join_matrices, join_vectors, ring_vector_factors

SWEEPS = 5  # of a call
_NUDGE = 1e-6  # float64 differences over it are right to ten digits
_EXACT = 1e-13  # relative error that ends an iteration


def solve_gram(gram: Tensor, right: Tensor) -> Tensor:
    """x of least norm with gram x = right, for a positive semidefinite ``gram`` [k, k] and ``right`` [k, columns].

    Example:
        >>> solve_gram(torch.eye(2) * 2, torch.ones(2, 1)).flatten().tolist()
        [0.5, 0.5]
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not failed and bool(diagonal.min() > 1e-6 * diagonal.max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > 1e-14 * values[-1].clamp(min=1e-300), 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.mT @ right))


def leading_product(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r], Vh [r, n] of the ``r`` leading singular triplets in float64, by the Gram matrix of the short side."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = leading_product(matrix.mT, r)
        return vh.mT, s, u.mT
    vectors = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :r]
    inner = vectors.mT @ matrix
    values = inner.norm(dim=1)
    return vectors, values, inner / values.clamp(min=1e-300)[:, None]


def fit_ring_vector(
    matrix: Tensor, cores: Sequence[Tensor], out_modes: Sequence[int], in_modes: Sequence[int]
) -> list[Tensor]:
    """Cores [bond, bond, n_d] of the ring vector nearest to a matrix [rows, cols], whose padding up to the modes is free.

    Example:
        >>> wanted = [torch.randn(1, 1, 2).double() for _ in range(2)]
        >>> matrix = wanted[0][0, 0, :, None] * wanted[1][0, 0]
        >>> a, b = fit_ring_vector(matrix, [torch.ones(1, 1, 2).double() for _ in range(2)], [2], [2])
        >>> torch.allclose(a[0, 0, :, None] * b[0, 0], matrix)
        True
    """
    found, bond, count = list(cores), cores[0].shape[0], len(cores)
    rows, cols = matrix.shape
    wide = matrix.new_zeros(prod(out_modes), prod(in_modes))
    for _ in range(SWEEPS):
        if wide.shape != matrix.shape:
            p, q = ring_vector_factors(found[: len(out_modes)], found[len(out_modes) :])
            wide = p @ q
        wide[:rows, :cols] = matrix
        tensor = wide.reshape(*out_modes, *in_modes)
        for d in range(count):
            rest = reduce(join_vectors, [*found[d + 1 :], *found[:d]]) if count > 1 else torch.eye(bond)[..., None]
            known = rest.to(matrix).permute(2, 1, 0).flatten(1)  # [others, bond^2]
            wanted = tensor.permute(*range(d + 1, count), *range(d), d).reshape(-1, tensor.shape[d])
            off = wanted - known @ found[d].flatten(0, 1)
            step = solve_gram(known.mT @ known, known.mT @ off)
            found[d] = found[d] + step.unflatten(0, (bond, bond))
        if bool((off - known @ step).norm() <= _EXACT * wanted.norm()):
            break
    return found


def fit_ring_matrix(weight: Tensor, wanted: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores [bond, bond, I_d, I_d] of the ring matrix T for which ``weight T`` [n, width] is nearest to ``wanted``; what T
    does to the padding of the width is free.

    Example:
        >>> w, t = torch.randn(9, 4).double(), torch.kron(torch.randn(2, 2), torch.randn(2, 2)).double()
        >>> a, b = fit_ring_matrix(w, w @ t, [torch.eye(2)[None, None].double() for _ in range(2)])
        >>> torch.allclose(torch.kron(a[0, 0], b[0, 0]), t)
        True
    """
    found, bond, count = list(cores), cores[0].shape[0], len(cores)
    modes = [core.shape[-1] for core in cores]
    width, padded = weight.shape[1], prod(modes)
    if len(weight) > width:  # as many rows as the width say it all
        q, weight = torch.linalg.qr(weight)
        wanted = q.mT @ wanted
    x = torch.nn.functional.pad(weight, (0, padded - width)).reshape(-1, *modes)
    n = len(x)
    y = x.new_zeros(n, padded)
    for _ in range(SWEEPS):
        if padded != width:
            y = x.reshape(n, padded) @ _dense(found)
        y[:, :width] = wanted
        target = y.reshape(n, *modes)
        for d in range(count):
            order = [*range(d + 2, count + 1), *range(1, d + 1)]
            rest = (
                reduce(join_matrices, [*found[d + 1 :], *found[:d]]) if count > 1 else torch.eye(bond)[..., None, None]
            )
            inner = x.permute(0, d + 1, *order).reshape(n, modes[d], -1)  # [n, I_d, others]
            known = torch.einsum("nik,srkj->njrsi", inner, rest.to(x)).reshape(-1, bond * bond * modes[d])
            goal = target.permute(0, *order, d + 1).reshape(-1, modes[d])
            off = goal - known @ found[d].flatten(0, 2)
            step = solve_gram(known.mT @ known, known.mT @ off)
            found[d] = found[d] + step.reshape(found[d].shape)
        if bool((off - known @ step).norm() <= _EXACT * goal.norm()):
            break
    return found


def _dense(cores: Sequence[Tensor]) -> Tensor:
    return torch.einsum("aaij->ij", reduce(join_matrices, cores))


def levenberg(function: Callable[[Tensor], Tensor], start: Tensor, wanted: Tensor, steps: int = 30) -> Tensor:
    """The numbers [k] near ``start`` whose ``function`` [n] is nearest to ``wanted`` [n] (Levenberg, 1944; Marquardt, 1963).

    The Jacobian [n, k] is held, by differences, so it is for small problems: for the last digits of what alternates slowly.

    Example:
        >>> found = levenberg(lambda x: x**3, torch.tensor([2.0]).double(), torch.tensor([27.0]).double())
        >>> round(float(found), 6)
        3.0
    """
    at, damping, size = start, 1e-3, float(wanted.norm().clamp(min=1e-300))
    off = wanted - function(at)
    for _ in range(steps):
        steps_out = _NUDGE * torch.eye(len(at), dtype=at.dtype)
        slope = torch.stack([(function(at + step) + off - wanted) / _NUDGE for step in steps_out], 1)
        gram, right = slope.mT @ slope, slope.mT @ off
        for _ in range(8):
            diagonal = gram.diagonal() + 1e-12 * gram.diagonal().max()
            moved = at + solve_gram(gram + damping * diagonal.diag(), right[:, None])[:, 0]
            now = wanted - function(moved)
            if bool(now.norm() < off.norm()):
                break
            damping *= 8
        else:
            break
        gain = float(1 - now.norm() / off.norm())
        at, off, damping = moved, now, damping / 8
        if float(off.norm()) < _EXACT * size or gain < 1e-6:
            break
    return at
