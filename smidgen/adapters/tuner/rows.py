"""Rows of a batch through the adapters of a bank: which adapter each goes through, and the low-rank product for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import gcd

import torch
from torch import Tensor

from smidgen.adapters.member import Tensors
from smidgen.errors import SmidgenError


@dataclass(frozen=True)
class Rows:
    """A batch as runs of ``length`` rows, each run through one adapter: products are then one a run, not one a row.

    Args:
        index: the adapter of each run [runs]; -1 is the base model.
        length: rows of each run.
        weight: of each run's adapter [runs], 0 for the base model; None when all are 1.
        first: of the adapters where the runs' follow each other, first, first + 1, ...; None where they do not.
        axis: of the activations that the rows lie along, 0 or 1.
    """

    index: Tensor
    length: int
    weight: Tensor | None
    first: int | None
    axis: int = 0

    @classmethod
    def of(cls, rows: Sequence[int], weights: Sequence[float] | None = None) -> Rows:
        """The adapter of each row of a batch as runs, as long as they come.

        Example:
            >>> Rows.of([2, 2, 2, 2, 0, 0]).index
            tensor([2, 2, 0])
        """
        if not rows:
            raise SmidgenError("A batch through a bank has at least one row; none was given.")
        pairs = list(zip(rows, [1.0] * len(rows) if weights is None else weights, strict=True))
        pairs = [(row, weight if row >= 0 else 0.0) for row, weight in pairs]
        length = gcd(*(len(list(run)) for _, run in groupby(pairs)))
        runs = pairs[::length]
        index, weight = [row for row, _ in runs], [weight for _, weight in runs]
        uneven = torch.tensor(weight) if any(w != 1 for w in weight) else None
        follow = index[0] >= 0 and index == list(range(index[0], index[0] + len(index)))
        return cls(torch.tensor(index), length, uneven, index[0] if follow else None)

    def __len__(self) -> int:
        return len(self.index) * self.length

    def repeated(self, times: int) -> Rows:
        """Each row ``times`` times."""
        return replace(self, length=self.length * times)

    def stacked(self, copies: int) -> Rows:
        """All rows again and again."""
        if copies == 1:
            return self
        if len(self.index) == 1:
            return self.repeated(copies)
        weight = None if self.weight is None else self.weight.repeat(copies)
        return replace(self, index=self.index.repeat(copies), weight=weight, first=None)

    def scaled(self, scaling: Tensor) -> Rows:
        """With the weight of each adapter [adapters] on top."""
        own = scaling.index_select(0, self.index.clamp(min=0))
        return replace(self, weight=own * (self.index >= 0) if self.weight is None else own * self.weight)

    @cached_property
    def adapted(self) -> bool:
        """Whether some row goes through an adapter."""
        return bool((self.index >= 0).any())

    @cached_property
    def part(self) -> tuple[Tensor, Rows] | None:
        """Where some runs are the base model's and lie along the first axis: the places of all others, and their rows."""
        kept = (self.index >= 0).nonzero().flatten()
        if self.axis or len(kept) == len(self.index):
            return None
        weight = None if self.weight is None else self.weight[kept]
        weight = None if weight is None or bool((weight == 1).all()) else weight
        places = (kept[:, None] * self.length + torch.arange(self.length)).flatten()
        return places, replace(self, index=self.index[kept], weight=weight, first=None)

    @cached_property
    def partial(self) -> bool:
        """Whether some row has a weight other than one and none."""
        return self.weight is not None and bool(((self.weight != 0) & (self.weight != 1)).any())

    def pick(self, value: Tensor) -> Tensor:
        """The adapters' tensors [adapters, ...] -> the runs' [runs, ...]; any adapter's for a run of the base model."""
        if self.first is not None:
            return value.narrow(0, self.first, len(self.index))
        return value.index_select(0, self.index.clamp(min=0).to(value.device))

    def leading(self, x: Tensor) -> Tensor:
        """Activations with the axis of the rows in front, and back."""
        return x.transpose(0, 1) if self.axis else x

    def apply(self, function: Callable[[Tensor, Tensors], Tensor], x: Tensor, picked: Tensors) -> Tensor:
        """``function(rows, tensors)`` of each run: x [batch, ...], tensors [runs, ...] -> [batch, ...]."""
        runs = x.unflatten(0, (len(self.index), self.length))
        return torch.vmap(function)(runs, picked).flatten(0, 1)

    def weighed(self, value: Tensor) -> Tensor:
        """[runs or batch, ...] times each run's weight."""
        if self.weight is None:
            return value
        each = self.weight.to(value).repeat_interleave(len(value) // len(self.index))
        return value * each.reshape(-1, *[1] * (value.dim() - 1))


class LowRankShift(torch.autograd.Function):
    """y + x down^T up^T, each run of rows with factors of its own, in one pass over y.

    Shapes: y [batch, ..., rows], x [batch, ..., cols], up [runs, rows, k], down [runs, k, cols]; one dtype. The order of
    the products is what batched kernels like: others take up to ten times as long at k = 1, four times for one token a run.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total, hidden = LowRankShift.shifted(y, x, up, down)
        ctx.save_for_backward(x, up, down, hidden)
        return total

    @staticmethod
    def shifted(y: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """(y + x down^T up^T, down x^T [runs, k, n]) without a graph."""
        runs = _runs(x, down)
        if runs.shape[1] == 1:  # a decoding step
            hidden = torch.bmm(runs, down.mT)
            return torch.baddbmm(_runs(y, up), hidden, up.mT).reshape(y.shape), hidden.mT
        hidden = torch.bmm(down, runs.mT)
        sums = torch.addcmul if hidden.shape[1] == 1 else torch.baddbmm
        return sums(_runs(y, up), hidden.mT, up.mT).reshape(y.shape), hidden

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        x, up, down, hidden = ctx.saved_tensors
        runs, grads = _runs(x, down), _runs(grad, up)
        grad_hidden = torch.bmm(up.mT, grads.mT)
        grad_x = None
        if ctx.needs_input_grad[1]:
            product = torch.mul if hidden.shape[1] == 1 else torch.bmm
            grad_x = product(grad_hidden.mT, down).reshape(x.shape)
        return grad, grad_x, torch.bmm(hidden, grads).mT, torch.bmm(grad_hidden, runs)


def _runs(x: Tensor, factor: Tensor) -> Tensor:
    """[batch, ..., width] -> [runs, n, width], n tokens a run."""
    return x.reshape(len(factor), -1, x.shape[-1])
