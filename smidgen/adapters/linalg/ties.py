"""Singular vectors that a weight does not determine, fixed so that every machine rebuilds the same.

Directions whose singular values are equal may be turned into each other, those of zero values besides independently on
both sides, and a rounding of the weight turns nearly equal ones: by the size of the rounding over their distance (Davis
and Kahan; Stewart and Sun, *Matrix Perturbation Theory*, ch. V). LAPACK then returns what its path happens to give. Here

* values below ``TIE`` of the largest are beyond the numerical rank: their directions are zero;
* within a *cluster*, a run of values that follow each other by less than ``TIE`` of the largest, the space is what is
  determined. Its basis is the orthonormal one nearest to the projections of chosen coordinate axes (symmetric
  orthogonalisation, Loewdin 1950): the same for any basis one starts from, and it follows the space smoothly.

Rank, clusters and axes are the *ties* of a weight. They are chosen once, on the weight an adapter is made for, and kept
with the adapter; whoever rebuilds the factors follows them and chooses nothing, so that a re-cast copy of the base,
whose equal values have drifted apart, gives the same factors too. A weight without ties has none to keep. One whose rank
is below min(rows, cols), repeated rows say, keeps its rank even where no kept value is tied: it marks a weight that does not
determine its factors, of which a load asks more. That is looked for up to ``WIDEST``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.adapters.linalg.svd import leading, signs
from smidgen.errors import ConfigError

WIDEST = 2048  # min(rows, cols): beyond, the Cholesky factorisation that finds the rank would cost more than the rest
TIE = 1e-5  # of the largest singular value: a hundred times what one rounding in fp32 moves


def svd_with_ties(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``r`` leading singular triplets U [m, r], S [r], Vh [r, n] as :func:`truncated_svd` has them, and their ties
    (int32, empty when there are none): [rank, then for each cluster its start, its end and an axis for each direction].

    Example:
        >>> svd_with_ties(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)[3].tolist()
        []
        >>> svd_with_ties(torch.diag(torch.tensor([3.0, 2.0, 2.0, 0.0])), 4)[3].tolist()
        [3, 1, 3, 1, 2]
    """
    u, s, vh, beyond = leading(weight, r)
    floor = TIE * float(s[0])
    rank = int((s > floor).sum())
    values = torch.cat([s[:rank], s.new_tensor([beyond] if rank == r and r < min(weight.shape) else [])])
    if rank == r and bool((values.diff().abs() > floor).all()):
        return u, s, vh, torch.tensor([rank] if _deficient(weight, floor) else [], dtype=torch.int32)
    full, every, _ = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    found, start = [rank], 0
    while start < rank:
        stop = start + 1
        while stop < len(every) and every[stop] > floor and float(every[stop - 1] - every[stop]) <= floor:
            stop += 1
        if stop > start + 1:
            found += [start, stop, *_axes(full[:, start:stop], min(stop, r) - start)]
        start = stop
    return u, s, vh, torch.tensor(found, dtype=torch.int32)


def follow_ties(weight: Tensor, r: int, ties: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r], Vh [r, n] of a weight along the ties of the one that an adapter was made for, float32.

    Raises:
        ConfigError: ties that no weight of this shape has.

    Example:
        >>> w = torch.linalg.qr(torch.randn(6, 6))[0]  # all singular values are 1
        >>> ties = svd_with_ties(w, 4)[3]
        >>> u, s, vh = follow_ties(w, 4, ties)
        >>> torch.allclose(follow_ties(w + 1e-7 * torch.randn(6, 6), 4, ties)[0], u, atol=1e-4)
        True
    """
    rank, clusters = _read(ties, r, weight.shape)
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    side = signs(u[:, :rank].float()).double()
    up, values, down = u[:, :r] * 0.0, s[:r] * 0.0, vh[:r] * 0.0
    up[:, :rank], values[:rank], down[:rank] = u[:, :rank] * side, s[:rank], vh[:rank] * side[:, None]
    for start, stop, axes in clusters:
        left, right = u[:, start:stop], vh[start:stop]
        a, _, b = torch.linalg.svd(left[axes], full_matrices=False)
        turn = (a @ b).mT  # [cluster, axes]: the nearest orthonormal columns to left[axes]^T
        here = slice(start, start + len(axes))
        up[:, here], values[here], down[here] = left @ turn, s[start:stop].mean(), turn.mT @ right
    return up.float(), values.float(), down.float()


def _deficient(weight: Tensor, floor: float) -> bool:
    """Whether the least singular value of a weight is not above ``floor``: W W^T - floor^2 has no Cholesky factor."""
    w = weight.detach().double()
    gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    if len(gram) > WIDEST:
        return False
    return bool(
        torch.linalg.cholesky_ex(gram - floor**2 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))[1]
    )


def _axes(basis: Tensor, count: int) -> list[int]:
    """``count`` coordinate axes whose projections on the span of ``basis`` [m, c] are far from dependent: each time the one
    with the longest projection besides those chosen, the first of equals."""
    rest, chosen = basis.clone(), list[int]()
    for _ in range(count):
        sizes = rest.square().sum(1)
        at = int((sizes >= sizes.max() * (1 - 1e-3)).nonzero()[0])
        chosen.append(at)
        direction = rest[at] / rest[at].norm()
        rest -= (rest @ direction)[:, None] * direction
    return chosen


def _read(ties: Tensor, r: int, shape: torch.Size) -> tuple[int, list[tuple[int, int, list[int]]]]:
    numbers, clusters, at, before = ties.tolist(), [], 1, 0
    try:
        rank = numbers[0]
        fits = 0 <= rank <= r <= min(shape)
        while at < len(numbers):
            start, stop = numbers[at], numbers[at + 1]
            axes = numbers[at + 2 : at + 2 + min(stop, r) - start]
            fits &= before <= start < min(stop, rank) and stop <= min(shape) and len(axes) == min(stop, r) - start
            fits &= len(set(axes)) == len(axes) and all(0 <= axis < shape[0] for axis in axes)
            clusters.append((start, stop, axes))
            at, before = at + 2 + len(axes), stop
            if not fits:
                break
    except IndexError:
        fits = False
    if not fits:
        raise ConfigError(f"These are no ties of a weight {tuple(shape)} at rank {r}: {numbers[:12]}.")
    return rank, clusters
