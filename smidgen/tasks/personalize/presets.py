"""Settings by memory: what fits a card of 8, 12, 16, 24 or 48 GB, for each published base, as data.

``memory.json`` is written by ``python -m benchmarks.plan --tables`` from counts on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from smidgen.errors import ConfigError, did_you_mean
from smidgen.tasks.personalize.settings import PersonalizeConfig

FILE = Path(__file__).parent / "memory.json"
SIZES = (8, 12, 16, 24, 48)  # GB


@cache
def by_memory() -> dict[str, Any]:
    """Base -> GB -> settings, None where nothing fits."""
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def for_memory(config: PersonalizeConfig, base: str, gigabytes: float) -> PersonalizeConfig:
    """``config`` with the settings of the largest preset of the published ``base`` that ``gigabytes`` hold.

    Raises:
        ConfigError: there are no presets for the base, or nothing of it fits.

    Example:
        >>> for_memory(PersonalizeConfig(), "flux2-klein-4b", 24).gradient_checkpointing
        True
    """
    known = by_memory()
    if base not in known:
        raise ConfigError(f"There are no presets for {base!r}.{did_you_mean(base, known)} Known: {', '.join(known)}.")
    fit = {int(size): found for size, found in known[base].items() if int(size) <= gigabytes and found}
    if not fit:
        raise ConfigError(
            f"Nothing of {base!r} fits {gigabytes:g} GB; its presets are for {', '.join(known[base])} GB."
        )
    found = fit[max(fit)]
    data = replace(config.data, train_batch_size=found["train_batch_size"], resolution=found["resolution"])
    train = replace(config.train, mixed_precision=found["mixed_precision"])
    return replace(
        config,
        data=data,
        train=train,
        quantize=found["quantize"],
        gradient_checkpointing=found["gradient_checkpointing"],
    )
