"""How far apart adapters are, by what they do to the weights: |D_1 - D_2| over all targets, D = s B A.

Inner products of low-rank products need no dense matrix: <B_1 A_1, B_2 A_2> = sum((B_1^T B_2) * (A_1 A_2^T)), so
adapters of different ranks are compared too. Families without factors (SVFit, LoLDU: numbers over fixed factors) are
compared by their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smidgen.difflora.weightspace.layout import Layout

BLOCK = 256  # rows of either side at a time


def low_rank(layout: Layout) -> bool:
    """Whether all of an adapter is products of two factors."""
    return 2 * sum(1 for _ in layout.factor_pairs()) == len(layout.entries)


def comparable(first: Layout, second: Layout) -> bool:
    """Whether distances between adapters of the two layouts are defined here."""
    if first.digest == second.digest:
        return True
    shapes = [
        {b.key: (b.shape[0], a.shape[1]) for a, b in layout.factor_pairs()} if low_rank(layout) else {}
        for layout in (first, second)
    ]
    return bool(shapes[0]) and shapes[0] == shapes[1]


def inner(first: Tensor, layout: Layout, second: Tensor, other: Layout) -> Tensor:
    """Inner products [n, m] of the deltas of rows [n, numbers] and [m, numbers], in fp64."""
    if not low_rank(layout):
        return first.double() @ second.double().T
    theirs = {b.key: (a, b) for a, b in other.factor_pairs()}
    total = torch.zeros(len(first), len(second), dtype=torch.float64)
    for a, b in layout.factor_pairs():
        other_a, other_b = theirs[b.key]
        mine, yours = _factors(first, a, b), _factors(second, other_a, other_b)
        across = torch.einsum("nor,mos->nmrs", mine[1], yours[1])
        along = torch.einsum("nri,msi->nmrs", mine[0], yours[0])
        total += a.scale * other_a.scale * (across * along).sum((2, 3))
    return total


def distances(first: Tensor, layout: Layout, second: Tensor, other: Layout) -> Tensor:
    """Distances [n, m] between the deltas of rows [n, numbers] and [m, numbers]."""
    found = torch.empty(len(first), len(second), dtype=torch.float64)
    left, right = squares(first, layout), squares(second, other)
    for row in range(0, len(first), BLOCK):
        for column in range(0, len(second), BLOCK):
            rows, columns = slice(row, row + BLOCK), slice(column, column + BLOCK)
            product = inner(first[rows], layout, second[columns], other)
            found[rows, columns] = left[rows, None] + right[None, columns] - 2 * product
    return found.clamp(min=0).sqrt()


def squares(rows: Tensor, layout: Layout) -> Tensor:
    """Squared norms [n] of the deltas."""
    if not low_rank(layout):
        return rows.double().square().sum(1)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for a, b in layout.factor_pairs():
        left, right = _factors(rows, a, b)
        gram = torch.einsum("nor,nos->nrs", right, right) * torch.einsum("nri,nsi->nrs", left, left)
        total += a.scale**2 * gram.sum((1, 2))
    return total


def nearest(found: Tensor, count: int = 2, own: bool = False) -> tuple[Tensor, Tensor]:
    """The ``count`` least of distances [n, m] in each row, and where; ``own``: row i's place i is itself and is passed
    over."""
    if own:
        found = found + torch.diag(torch.full((len(found),), torch.inf, dtype=found.dtype))
    values, places = found.topk(min(count, found.shape[1]), largest=False)
    return values, places


def entries(rows: Tensor, layout: Layout, count: int, seed: int = 0) -> Tensor:
    """Some entries [n, count] of the deltas of rows [n, numbers] (without factors: of the rows), at places that are the
    same for all comparable layouts."""
    dice = torch.Generator().manual_seed(seed)
    if not low_rank(layout):
        return rows[:, torch.randint(layout.size, (count,), generator=dice)].double()
    pairs, found = sorted(layout.factor_pairs(), key=lambda pair: pair[0].key), []
    for _ in range(count):
        a, b = pairs[int(torch.randint(len(pairs), (), generator=dice))]
        row, column = (int(torch.randint(size, (), generator=dice)) for size in (b.shape[0], a.shape[1]))
        left, right = _factors(rows, a, b)
        found.append(a.scale * (right[:, row] * left[:, :, column]).sum(1))
    return torch.stack(found, 1)


class DeltaComponents:
    """Principal components of training deltas through their inner products, so that adapters of any comparable layout have
    coordinates in them.

    K = <D_i, D_j> centred = U L U^T; a delta d has the coordinates <d - mean, D - mean> U / sqrt(L), and these over their
    deviation sqrt(L / n) on the training adapters are the whitened ones.
    """

    def __init__(self, rows: Tensor, layout: Layout, count: int) -> None:
        self.rows, self.layout = rows, layout
        self.products = self._inner(rows, layout)
        values, vectors = torch.linalg.eigh(self._centred(self.products))
        kept = max(1, min(count, int((values > values[-1].clamp(min=1e-30) * 1e-9).sum())))
        self.values, self.vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)

    def __len__(self) -> int:
        return len(self.values)

    def whitened(self, rows: Tensor, layout: Layout) -> Tensor:
        """Coordinates [n, k] of rows [n, numbers]; of mean 0 and variance 1 on the training adapters."""
        found = self._centred(self._inner(rows, layout))
        return found @ self.vectors / self.values.clamp(min=1e-30) * len(self.rows) ** 0.5

    def _inner(self, rows: Tensor, layout: Layout) -> Tensor:
        return torch.cat([inner(part, layout, self.rows, self.layout) for part in rows.split(BLOCK)])

    def _centred(self, products: Tensor) -> Tensor:
        """Inner products [n, training] of deltas less the training mean."""
        means = self.products.mean(1)
        return products - products.mean(1, keepdim=True) - means + means.mean()


def _factors(rows: Tensor, a, b) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """A [n, r, cols] and B [n, rows, r] in fp64."""
    return rows[:, a.columns].reshape(-1, *a.shape).double(), rows[:, b.columns].reshape(-1, *b.shape).double()
