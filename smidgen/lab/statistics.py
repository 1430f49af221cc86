"""Means over seeds with their intervals, differences paired by seed, and the quality-per-byte front. Pure functions.

Every interval is a 95 % Student t interval over seeds. It says how far the mean would move with other seeds (data
order, start of head and adapter), not with another test set: all methods are scored on one test set.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and its 95 % t interval; without at least two seeds there is none (None)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width; 0 when there is none."""
        return self.high - self.mean if self.high is not None else 0.0


@dataclass(frozen=True)
class Point:
    """A method on the front's plane. ``choose_by`` is its validation score, ``score`` its test score by seed."""

    name: str
    bytes: int
    choose_by: float
    score: Mapping[int, float]


Verdict = Literal["ours", "peft", "undecided", "none"]


@dataclass(frozen=True)
class AtBudget:
    """The best of ours and of peft's at or under ``budget`` bytes, and ours minus peft's on the test set."""

    budget: int
    ours: Point | None
    peft: Point | None
    difference: Interval | None
    verdict: Verdict


@dataclass(frozen=True)
class ClaimResult:
    """Whether ``method`` is not worse than ``baseline`` by more than ``margin``, with enough fewer numbers."""

    method: str
    baseline: str
    score: Interval
    baseline_score: Interval
    difference: Interval | None
    numbers: int
    baseline_numbers: int
    times: float
    margin: float
    greater_is_better: bool

    @property
    def small_enough(self) -> bool:
        return self.numbers * self.times <= self.baseline_numbers

    @property
    def verdict(self) -> Literal["holds", "fails", "not decided"]:
        """By the whole interval of the difference: above -margin it holds, below it fails."""
        found = self.difference
        if not self.small_enough:
            return "fails"
        if found is None or found.low is None or found.high is None:
            return "not decided"
        worst, best = (found.low, found.high) if self.greater_is_better else (-found.high, -found.low)
        return "holds" if worst > -self.margin else "fails" if best < -self.margin else "not decided"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of one value a seed.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> round(found.mean, 3), round(found.half, 3)
        (2.0, 2.484)
    """
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None, n)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Interval | None:
    """``first`` minus ``second`` over the seeds they share; None when they share none."""
    shared = sorted(set(first) & set(second))
    return interval([first[seed] - second[seed] for seed in shared]) if shared else None


def best_under(points: Iterable[Point], budget: float, greater_is_better: bool = True) -> Point | None:
    """The point of at most ``budget`` bytes with the best validation score; the smallest of equals.

    Choosing on validation keeps the test set out of the choice: otherwise the family with more members would gain.
    """
    sign = 1 if greater_is_better else -1
    fitting = sorted((p for p in points if p.bytes <= budget), key=lambda p: p.bytes)
    return max(fitting, key=lambda p: sign * p.choose_by, default=None)


def front(points: Iterable[Point], greater_is_better: bool = True) -> list[Point]:
    """The quality-per-byte front: what ``best_under`` gives as the budget grows, smallest first."""
    points = list(points)
    found: list[Point] = []
    for size in sorted({p.bytes for p in points}):
        best = best_under(points, size, greater_is_better)
        if best is not None and (not found or best.name != found[-1].name):
            found.append(best)
    return found


def at_budget(budget: int, ours: Iterable[Point], peft: Iterable[Point], greater_is_better: bool = True) -> AtBudget:
    """Compare the two families at one budget. The verdict is ``undecided`` when the interval holds 0 or is missing, ``none`` when
    a family has nothing that small: another codec could change that, so it is nobody's win."""
    mine, theirs = best_under(ours, budget, greater_is_better), best_under(peft, budget, greater_is_better)
    if mine is None or theirs is None:
        return AtBudget(budget, mine, theirs, None, "none")
    difference = paired_difference(mine.score, theirs.score)
    return AtBudget(budget, mine, theirs, difference, _verdict(difference, greater_is_better))


def _verdict(difference: Interval | None, greater_is_better: bool) -> Verdict:
    if difference is None or difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > 0:
        return "ours" if greater_is_better else "peft"
    if difference.high < 0:
        return "peft" if greater_is_better else "ours"
    return "undecided"


def check_claim(
    method: str,
    baseline: str,
    scores: Mapping[str, Mapping[int, float]],
    numbers: Mapping[str, int],
    times: float,
    margin: float,
    greater_is_better: bool = True,
) -> ClaimResult:
    """Non-inferiority: is ``method`` at most ``margin`` worse than ``baseline``, with ``times`` fewer trained numbers?

    ``scores`` are test scores by method and seed, ``numbers`` trained numbers of the adapters without the head.
    """
    own, reference = (interval(list(scores[name].values())) for name in (method, baseline))
    difference = paired_difference(scores[method], scores[baseline])
    counts = numbers[method], numbers[baseline]
    return ClaimResult(method, baseline, own, reference, difference, *counts, times, margin, greater_is_better)
