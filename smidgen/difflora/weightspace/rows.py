"""Rows of adapters that may be larger than memory: what codecs and normalisers read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Rows [n, size] in fp32, in an order that does not change while they are read; a zoo's ``rows`` are such."""

    def __len__(self) -> int: ...

    def blocks(self, size: int = 64) -> Iterator[Tensor]:
        """The rows from the first to the last, at most ``size`` at a time; may be called again."""
        ...

    def take(self, indices: Sequence[int]) -> Tensor:
        """Rows [len(indices), size] by their place."""
        ...


class TensorRows:
    """Rows that fit into memory.

    Example:
        >>> [len(block) for block in TensorRows(torch.zeros(5, 2)).blocks(2)]
        [2, 2, 1]
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.float()

    def __len__(self) -> int:
        return len(self.values)

    def blocks(self, size: int = 64) -> Iterator[Tensor]:
        yield from self.values.split(size)

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.values[torch.as_tensor(list(indices), dtype=torch.long)]
