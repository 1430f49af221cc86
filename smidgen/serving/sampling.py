"""The next token of each row, as each asks for it; what is drawn follows from the row's own seed and not from the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

AT_ONCE = 64  # rows whose numbers are on the CPU at a time
COLDEST = 1e-6  # temperature: below it fp32 tells no more


class Choice(NamedTuple):
    """How a row takes its tokens: the likeliest at temperature 0, else drawn with ``generator`` from the likeliest tokens that
    have the share ``top_p`` together."""

    temperature: float
    top_p: float
    generator: numpy.random.Generator


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
    """Each token has noise of its own, and the sum of it and the logit decides (the Gumbel-max trick). Batches round logits otherwise,
    which then counts only where two sums are that near; a place among summed shares moves with all that come before it."""
    heat = torch.tensor([max(choice.temperature, COLDEST) for choice in choices])[:, None]
    scores = logits.cpu().float()
    scores = (scores - scores.amax(-1, keepdim=True)) / heat
    some = [row for row, choice in enumerate(choices) if choice.top_p < 1]
    if some:
        most = torch.tensor([choices[row].top_p for row in some], dtype=torch.float64)[:, None]
        out = nucleus(scores[some].double().softmax(-1), most) == 0
        scores[some] = scores[some].masked_fill(out, -torch.inf)
    for row, choice in zip(scores, choices, strict=True):
        # in fp64, whose smallest is no multiple of something that 50,000 draws would find twice
        row -= torch.from_numpy(choice.generator.standard_exponential(len(row))).float().log()
    return scores.argmax(-1).tolist()


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
