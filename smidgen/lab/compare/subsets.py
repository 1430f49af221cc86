"""Smaller splits of a task, the same for every cell."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from smidgen.training.randomness import examples

T = TypeVar("T")


def shortened(task: T, **most: int | None) -> T:
    """``task`` with at most that many examples in the named splits; which ones does not depend on the run's seed.

    Example:
        >>> len(shortened(task, test=100).splits["test"])
        100
    """
    splits = {name: _some(split, most.get(name)) for name, split in task.splits.items()}  # type: ignore[attr-defined]
    return replace(task, splits=splits)  # type: ignore[type-var]


def _some(split: Any, most: int | None) -> Any:
    if most is None or len(split) <= most:
        return split
    picks = sorted(examples(0, 0, most, len(split)))
    if is_dataclass(split) and not isinstance(split, type):  # a table of columns
        return replace(split, **{f.name: _taken(getattr(split, f.name), picks) for f in fields(split)})
    return _taken(split, picks)


def _taken(column: Tensor | Sequence[Any], picks: list[int]) -> Any:
    return column[picks] if isinstance(column, Tensor) else [column[pick] for pick in picks]
