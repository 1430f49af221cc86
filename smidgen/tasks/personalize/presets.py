"""Settings by memory: what fits a card of 8, 12, 16, 24 or 48 GB, for each published base, as data.

``memory.json`` is written by ``python -m benchmarks.plan --tables`` from counts on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from smidgen.tasks.personalize.settings import PersonalizeConfig

FILE = Path(__file__).parent / "memory.json"
SIZES = (8, 12, 16, 24, 48)  # GB


@cache
def by_memory() -> dict[str, Any]:
    """Base -> GB -> settings, None where nothing fits."""
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def for_memory(config: PersonalizeConfig, gigabytes: float) -> tuple[int, PersonalizeConfig] | None:
    """The largest preset of the config's base that ``gigabytes`` hold: for how many GB it is, and ``config`` with its settings.
    None where the base has none, or none so small.

    Example:
        >>> size, found = for_memory(PersonalizeConfig(base="flux2-klein-4b"), 26)
        >>> size, found.gradient_checkpointing
        (24, True)
    """
    known = by_memory().get(config.base, {})
    fit = {int(size): found for size, found in known.items() if int(size) <= gigabytes and found}
    if not fit:
        return None
    found = fit[max(fit)]
    data = replace(config.data, train_batch_size=found["train_batch_size"], resolution=found["resolution"])
    train = replace(config.train, mixed_precision=found["mixed_precision"])
    less, quantize = found["gradient_checkpointing"], found["quantize"]
    return max(fit), replace(config, data=data, train=train, quantize=quantize, gradient_checkpointing=less)
