"""The common course of the recipes: text classification, image classification, instruction tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smidgen.training.recipes.finetune_settings import Family


@dataclass(frozen=True)
class Prepared:
    """A base with its fresh head and the task it is to learn, before any adapter.

    ``heads`` are the modules trained and saved with any adapter, ``fresh`` loads the same base with the same fresh head
    again, ``counts`` are examples by split and label, ``data_digest`` says which examples these are.
    """

    model: Any
    task: Any
    heads: tuple[str, ...]
    family: Family
    fresh: Callable[[], Any] = field(repr=False)
    labels: tuple[str, ...] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    data_digest: str = ""
