"""Random numbers by counter: each draw follows from (seed, what, step) alone, never from what was drawn before.

So a resumed run needs no generator state, and two methods trained with one seed see the same noise, the same
timesteps and the same order of examples (common random numbers).
"""

import hashlib
import json
from collections.abc import Callable

import torch

GROUPED = 50  # batches that share out their examples by length, as in transformers' trainer


def derive(seed: int, *counters: int | str) -> int:
    """A 32-bit seed for the stream named by ``counters``.

    Example:
        >>> derive(0, "noise", 3) == derive(0, "noise", 3)
        True
    """
    name = json.dumps([seed, *counters]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")


def stream(seed: int, *counters: int | str) -> torch.Generator:
    """A CPU generator that starts at ``derive(seed, *counters)``; the CPU's numbers are the same for every device."""
    return torch.Generator().manual_seed(derive(seed, *counters))


def examples(seed: int, batch: int, size: int, total: int, length: Callable[[int], int] | None = None) -> list[int]:
    """Indices of batch number ``batch`` (``size`` examples) when ``total`` examples are shuffled anew each epoch.

    With ``length`` of an example every ``GROUPED`` batches share out their examples by length, so that little of a batch is padding,
    and come in an order drawn anew. Which examples those batches hold together is as without.
    """
    if length is not None:
        group, at = divmod(batch, GROUPED)
        drawn = _drawn(seed, group * GROUPED * size, GROUPED * size, total)
        drawn.sort(key=length)  # stable: as they were drawn among those of one length
        at = int(torch.randperm(GROUPED, generator=stream(seed, "grouped", group))[at])
        return drawn[at * size : (at + 1) * size]
    return _drawn(seed, batch * size, size, total)


def _drawn(seed: int, start: int, count: int, total: int) -> list[int]:
    positions = range(start, start + count)
    orders = {epoch: _order(seed, epoch, total) for epoch in {position // total for position in positions}}
    return [orders[position // total][position % total] for position in positions]


def _order(seed: int, epoch: int, total: int) -> list[int]:
    return torch.randperm(total, generator=stream(seed, "order", epoch)).tolist()
