"""Normalisation of rows: statistics of the training identities alone, kept beside the codec that was trained on them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smidgen.difflora.weightspace.layout import Layout
from smidgen.errors import ConfigError, DataError, did_you_mean

Mode = Literal["tensor", "centred", "element", "x10"]
MODES = ("tensor", "centred", "element", "x10")


class Normaliser:
    """(row - shift) / width.

    Modes: ``tensor`` one mean and one standard deviation for each tensor of the layout (z-score); ``centred`` a mean
    for each number, one deviation for each tensor; ``element`` both for each number; ``x10`` no statistics, times 10
    (the paper's prototype).
    """

    def __init__(self, shift: Tensor, width: Tensor) -> None:
        self.shift, self.width = shift, width

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalised rows [..., size]."""
        return (rows - self.shift.to(rows)) / self.width.to(rows)

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows [..., size] in their own units."""
        return rows * self.width.to(rows) + self.shift.to(rows)


class Statistics:
    """Mean and variance of each number [size], one block of rows at a time (Chan's update, fp64)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.square = torch.zeros(size, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Takes rows [n, size] in."""
        values = block.double()
        n, mean = len(values), values.mean(0)
        delta, total = mean - self.mean, self.count + n
        self.square += (values - mean).square().sum(0) + delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def normaliser(self, layout: Layout, mode: str = "tensor") -> Normaliser:
        """The normaliser of these rows.

        Raises:
            ConfigError: an unknown mode.
            DataError: no rows were added.
        """
        if mode not in MODES:
            raise ConfigError(f"Unknown normalisation {mode!r}.{did_you_mean(mode, MODES)} Known: {', '.join(MODES)}.")
        if mode == "x10":
            return Normaliser(torch.zeros(layout.size), torch.full((layout.size,), 0.1))
        if self.count == 0:
            raise DataError("There are no training rows to take a mean and a deviation from.")
        shift, width = self.mean.clone(), (self.square / self.count).sqrt()
        for entry in layout.entries if mode != "element" else ():
            at = entry.columns
            spread = self.square[at].mean() / self.count  # around each number's own mean
            if mode == "tensor":
                centre = self.mean[at].mean()
                spread = spread + (self.mean[at] - centre).square().mean()
                shift[at] = centre
            width[at] = spread.sqrt()
        width[width < 1e-12] = 1.0  # a number that never moves
        return Normaliser(shift.float(), width.float())
