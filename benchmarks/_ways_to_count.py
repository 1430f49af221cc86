"""Ways to count that ``counts.py`` compares: this library, peft, a stated formula, the size of a base, a ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import peft
from torch import nn

from smidgen.bases.architectures import architecture, build_architecture
from smidgen.bases.counting import count


@dataclass(frozen=True)
class Count:
    """A number and how it is obtained: by ``smidgen``, by ``peft``, or by a stated ``formula``."""

    by: str
    model: str
    run: Callable[[], float]


@cache
def ours(model: str, method: str, **options: Any) -> Count:
    """Counted by this library's member formulas."""
    return Count("smidgen", model, cache(lambda: count(model, method, **_lists(options))))


@cache
def by_peft(model: str, kind: str, plus: int = 0, **options: Any) -> Count:
    """Counted by injecting peft's own method; ``plus`` numbers that peft does not train are added by hand."""
    make = getattr(peft, f"{kind}Config")
    return Count("peft", model, cache(lambda: plus + count(model, make(**_lists(options)))))


def _lists(options: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def lora(model: str, r: int, **options: Any) -> Count:
    """peft's LoRA of rank r."""
    return by_peft(model, "Lora", r=r, **options)


def formula(model: str, text: str, of_linear: Callable[[int, int], int]) -> Count:
    """Sum over the default targets of a formula in (out, in), where peft's convention is not the paper's."""

    def run() -> float:
        built = build_architecture(model)
        ends = tuple(architecture(model).targets_in(built))
        linears = [m for n, m in built.named_modules() if n.endswith(ends) and isinstance(m, nn.Linear)]
        return sum(of_linear(m.out_features, m.in_features) for m in linears)

    return Count(f"formula {text}", model, cache(run))


def base_size(model: str) -> Count:
    """Numbers in the base model, its pooler left out."""

    def run() -> float:
        named = build_architecture(model).named_parameters()
        return sum(p.numel() for n, p in named if not n.startswith("pooler."))

    return Count("size of the base", model, cache(run))


def ratio(top: Count, bottom: Count, times: float = 1.0) -> Count:
    """``times * top / bottom``."""
    return Count(f"ratio of counts by {top.by}, {bottom.by}", top.model, lambda: times * top.run() / bottom.run())


def percent_of_base(top: Count) -> Count:
    """A count in per cent of its base model."""
    return ratio(top, base_size(top.model), 100)
