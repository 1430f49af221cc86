"""The first r steps of W = P L D U, partial row pivoting with the diagonal pulled out (LoLDU, arXiv 2410.13618, eq. 2).

r steps of elimination touch r pivot rows and r columns only, so the factors follow from a panel [m, r] and one
triangular solve. Recomputed pivots differ on a re-cast base (bf16: 73-97 % of them) and the adapter becomes unrelated;
following the *stored* pivots keeps the error below 2 % (bf16), which is why ``pivots`` is part of the interface.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smidgen.errors import ConfigError

_BLOCK = 32


class LDU(NamedTuple):
    """First r steps of an elimination: ``lower @ rows`` is their part of W, and all of W when r = min(m, n).

    pivots [r] int64 row indices of W; lower [m, r] = P L_r in the original row order, 1 at the pivots; diagonal [r],
    signed, 0 where an elimination step found nothing; rows [r, n] = diag(D) U before the diagonal is pulled out.
    """

    pivots: Tensor
    lower: Tensor
    diagonal: Tensor
    rows: Tensor

    @property
    def upper(self) -> Tensor:
        """U_r [r, n], unit upper; a row whose pivot is 0 has no such form and is zero."""
        alive = self.diagonal != 0
        return torch.where(alive, 1.0 / torch.where(alive, self.diagonal, 1.0), 0.0)[:, None] * self.rows


def ldu(
    weight: Tensor,
    r: int,
    pivots: Tensor | None = None,
    *,
    dead: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> LDU:
    """The first ``r`` elimination steps of a weight [m, n] on its device, computed and returned in ``dtype``.

    With ``pivots`` [r] those rows are followed, whatever their size, instead of searched: the way to rebuild an adapter
    on a re-cast base. A pivot below eps times the largest one counts as 0: its step eliminates nothing, no NaN ever. With
    ``dead``, a list of steps, the pivots of these count as 0 whatever they are.

    Raises:
        ConfigError: r outside 1..min(m, n), a weight that is no finite matrix, or pivots that are not r distinct rows.

    Example:
        >>> w = torch.randn(6, 4)
        >>> f = ldu(w, 4)
        >>> torch.allclose(f.lower @ torch.diag(f.diagonal) @ f.upper, w.double())
        True
        >>> torch.equal(ldu(w, 2).lower, f.lower[:, :2]) or torch.allclose(ldu(w, 2).lower, f.lower[:, :2])
        True
    """
    _check(weight, r)
    w = weight.detach().to(dtype)
    if pivots is None:
        return _searched(w, r)
    rows = pivots.to(device=w.device, dtype=torch.int64)
    if rows.shape != (r,) or rows.unique().numel() != r or rows.min() < 0 or rows.max() >= w.shape[0]:
        raise ConfigError(f"pivots are {r} distinct row indices below {w.shape[0]}, got {pivots.tolist()}")
    none = torch.zeros(r, dtype=torch.bool, device=w.device)
    return _followed(w, rows, none if dead is None else none.index_fill(0, dead.to(w.device, torch.int64), True))


def undetermined(f: LDU, tie: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Steps (int64) that rounding in fp32 decides: those with a pivot below ``tie`` of the largest, and of these the ones
    whose whole row is so small that their atom has no direction. Numerical rank shows in them, whatever the machine.

    Example:
        >>> w = torch.ones(4, 4) + torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        >>> [steps.tolist() for steps in undetermined(ldu(w, 3))]
        [[2], [2]]
    """
    pivots, sizes = f.diagonal.abs(), f.rows.norm(dim=1)
    weak = pivots <= tie * pivots.max()
    return weak.nonzero()[:, 0], (weak & (sizes <= tie * sizes.max())).nonzero()[:, 0]


def raw_atoms(f: LDU) -> tuple[Tensor, Tensor]:
    """(B [m, r], A [r, n]) = (P L_r, U_r) of the paper; an atom whose pivot is 0 is zero in both.

    Example:
        >>> b, a = raw_atoms(ldu(torch.tensor([[0.0, 2.0], [4.0, 2.0]]), 2))
        >>> b.tolist(), a.tolist()
        ([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.5], [0.0, 1.0]])
    """
    return f.lower * (f.diagonal != 0), f.upper


def unit_atoms(f: LDU) -> tuple[Tensor, Tensor]:
    """(B [m, r], A [r, n]) with unit norms |B_i| = |A_i| = 1, so that one learning rate suits every atom.

    Atom i points where L_i U_i points. It is built from the rows D_i U_i with the sign of D_i absorbed, hence without a
    division by the pivot: an atom whose pivot is 0 keeps its direction, and only an empty row gives a zero atom.

    Example:
        >>> b, a = unit_atoms(ldu(torch.randn(5, 3), 3))
        >>> torch.allclose(b.norm(dim=0) * a.norm(dim=1), torch.ones(3, dtype=torch.float64))
        True
    """
    size = f.rows.norm(dim=1, keepdim=True)
    alive = size > _eps(f.lower, f.rows) * size.max()
    sign = torch.where(f.diagonal < 0, -1.0, 1.0).to(size.dtype)
    a = torch.where(alive, f.rows / torch.where(alive, size, 1.0), 0.0) * sign[:, None]
    b = f.lower / f.lower.norm(dim=0) * alive.T
    return b, a


def _searched(w: Tensor, r: int) -> LDU:
    """LAPACK's pivoted LU of the first r columns, then one triangular solve for the other columns."""
    m = w.shape[0]
    packed, swaps, _ = torch.linalg.lu_factor_ex(w[:, :r])
    order = _permutation(swaps, m, w.device)
    lower = packed.tril(-1)
    lower.diagonal().fill_(1.0)
    rows = w.new_zeros(r, w.shape[1])
    rows[:, :r] = packed[:r].triu()
    rows[:, r:] = torch.linalg.solve_triangular(lower[:r], w[order[:r], r:], upper=False, unitriangular=True)
    unsorted = torch.empty_like(lower)
    unsorted[order] = lower
    return _guarded(order[:r].clone(), unsorted, rows)


def _followed(w: Tensor, pivots: Tensor, forced: Tensor) -> LDU:
    """Blocked elimination along given pivot rows: 32 columns in full, then one update of the remaining panel."""
    r = pivots.numel()
    rows, lower = w[pivots].clone(), w[:, :r].clone()
    floor = _eps(w) * w[:, :r].abs().max()
    for start in range(0, r, _BLOCK):
        stop = min(start + _BLOCK, r)
        block = slice(start, stop)
        square = _eliminate(rows[block, block].clone(), floor, forced[block])
        dead = (square.diagonal().abs() <= floor) | forced[block]
        square.diagonal()[dead] = 0.0
        unit = square.tril(-1) + torch.eye(stop - start, dtype=w.dtype, device=w.device)
        top = square.triu()
        rows[block, start:] = torch.linalg.solve_triangular(unit, rows[block, start:], upper=False, unitriangular=True)
        rows[block, block] = top
        lower[:, block] = _divide(lower[:, block], top)
        lower[:, stop:] -= lower[:, block] @ rows[block, stop:r]
        rows[stop:, start:] -= lower[pivots[stop:], block] @ rows[block, start:]
    rank = torch.arange(r, device=w.device)
    lower[pivots] = lower[pivots].tril(-1)
    lower[pivots, rank] = 1.0
    return _guarded(pivots, lower, rows.triu())


def _eliminate(square: Tensor, floor: Tensor, forced: Tensor) -> Tensor:
    """Unpivoted LU of a small square block, packed; a pivot below ``floor``, or forced to be 0, eliminates nothing."""
    for i in range(square.shape[0] - 1):
        factor = torch.where((square[i, i].abs() > floor) & ~forced[i], square[i + 1 :, i] / square[i, i], 0.0)
        square[i + 1 :, i] = factor
        square[i + 1 :, i + 1 :] -= factor[:, None] * square[i, i + 1 :]
    return square


def _divide(panel: Tensor, top: Tensor) -> Tensor:
    """panel top^-1 for an upper triangular ``top`` [b, b]; a column whose pivot is 0 comes out as 0."""
    dead = top.diagonal() == 0
    safe = torch.where(dead[:, None], torch.eye(len(top), dtype=top.dtype, device=top.device), top)
    return torch.linalg.solve_triangular(safe, panel, upper=True, left=False) * ~dead


def _guarded(pivots: Tensor, lower: Tensor, rows: Tensor) -> LDU:
    diagonal = rows.diagonal()
    alive = diagonal.abs() > _eps(lower, rows) * diagonal.abs().max()
    return LDU(pivots, lower, torch.where(alive, diagonal, 0.0), rows)


def _permutation(swaps: Tensor, m: int, device: torch.device) -> Tensor:
    """Row order from LAPACK's 1-based list of swaps."""
    order = list(range(m))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, device=device)


def _eps(*tensors: Tensor) -> float:
    """Rounding of an elimination of this size, relative to its largest number."""
    return torch.finfo(tensors[0].dtype).eps * max(max(t.shape) for t in tensors)


def _check(weight: Tensor, r: int) -> None:
    if weight.dim() != 2:
        raise ConfigError(f"ldu needs a matrix [m, n], got shape {tuple(weight.shape)}")
    if not 1 <= r <= min(weight.shape):
        raise ConfigError(f"the rank of an ldu is 1..min(m, n) = {min(weight.shape)}, got {r}")
    if not torch.isfinite(weight).all():
        raise ConfigError("ldu needs finite numbers, got a weight with NaN or infinity")
