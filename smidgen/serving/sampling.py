"""The next token of each row, as each asks for it; what is drawn follows from the row's own seed and not from the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 64  # rows whose probabilities are fp64 at a time


class Choice(NamedTuple):
    """How a row takes its tokens: the likeliest at temperature 0, else drawn with ``generator`` from the likeliest tokens that
    have the share ``top_p`` together."""

    temperature: float
    top_p: float
    generator: torch.Generator


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """A token for each row of logits [rows, tokens]."""
    found = logits.argmax(-1).tolist()
    drawn = [row for row, choice in enumerate(choices) if choice.temperature > 0]
    for at in range(0, len(drawn), AT_ONCE):
        rows = drawn[at : at + AT_ONCE]
        for row, token in zip(rows, _drawn(logits[rows], [choices[row] for row in rows]), strict=True):
            found[row] = token
    return found


def _drawn(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    heat = torch.tensor([choice.temperature for choice in choices], dtype=torch.float64)[:, None]
    shares = (logits.cpu().double() / heat).softmax(-1)
    some = [row for row, choice in enumerate(choices) if choice.top_p < 1]
    if some:
        most = torch.tensor([choices[row].top_p for row in some], dtype=torch.float64)[:, None]
        shares[some] = nucleus(shares[some], most)
    sums = shares.cumsum(
        -1
    )  # in the order of the vocabulary: sorted, a rounding could swap two tokens that are as likely
    chance = torch.stack([torch.rand((), generator=c.generator, dtype=torch.float64) for c in choices])[:, None]
    places = torch.searchsorted(sums, chance * sums[:, -1:], right=True)
    return places.clamp(max=sums.shape[-1] - 1).squeeze(-1).tolist()  # type: ignore[no-any-return]


def nucleus(shares: Tensor, top_p: Tensor) -> Tensor:
    """Shares [rows, tokens] with zeros but for the likeliest tokens that have ``top_p`` [rows, 1] together, at least one.

    Example:
        >>> nucleus(torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([[0.7]]))
        tensor([[0.0000, 0.6000, 0.3000]])
    """
    ordered, order = shares.sort(descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    kept[:, 0] = True
    return shares * torch.zeros_like(kept).scatter(-1, order, kept)
