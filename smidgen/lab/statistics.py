"""Means over seeds, differences paired by seed and example with their intervals, and what is decided by them. Pure functions.

A method's answers are a table [seed, example] of values that mean something on average (log losses, right or wrong). Two
methods that saw the same seeds and the same examples are compared by the difference of their tables, whose mean is uncertain
for two reasons: other seeds, and other examples. The bootstrap here draws both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DRAWS = 4_000
Answers = np.ndarray  # [seed, example]
BySeed = Mapping[int, np.ndarray]  # seed -> [example]


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and its 95 % interval; without at least two seeds there is none (None)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width; 0 when there is none."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student t interval of one value a seed: how far the mean would move with other seeds, on the same examples.

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


@dataclass(frozen=True)
class Difference:
    """One method's mean minus another's, over ``seeds`` and ``examples`` that both saw: 95 % interval and two-sided p value.

    With one seed the interval is None and p is 1: nothing is decided.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    seeds: int
    examples: int

    @property
    def half(self) -> float:
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


def paired_difference(first: Answers, second: Answers, draws: int = DRAWS, seed: int = 0) -> Difference:
    """``first`` minus ``second``, tables [seed, example] of the same seeds and examples, by a bootstrap over both.

    Seeds and examples are drawn with replacement, each apart (Owen 2007, the pigeonhole bootstrap); an example that is drawn twice counts twice
    in every seed. Few seeds say too little about how far seeds scatter, so what they add is widened to what Student's t
    over them would give (Hesterberg 2015, section 4.5.3).

    Raises:
        ValueError: tables of different shapes, or without an example.
    """
    from scipy.stats import norm, t

    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(
            f"Answers of shapes {first.shape} and {second.shape} cannot be paired: [seed, example] of both."
        )
    table = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    seeds, examples = table.shape
    mean = float(table.mean())
    if seeds < 2:
        return Difference(mean, None, None, 1.0, seeds, examples)
    wide = math.sqrt(seeds / (seeds - 1)) * float(t.ppf(0.975, seeds - 1) / norm.ppf(0.975))
    random = np.random.default_rng(seed)
    found = []
    for size in _chunks(draws, max(1, 2_000_000 // examples)):
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        of_examples = random.integers(examples, size=(size, examples), dtype=np.int32)
        widened = 1 / seeds + wide * (of_seeds - 1 / seeds)
        found.append(np.take_along_axis(widened @ table, of_examples, 1).mean(1))
    drawn = np.concatenate(found)
    low, high = (float(value) for value in np.quantile(drawn, [0.025, 0.975]))
    sides = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(mean, low, high, min(1.0, 2 * sides / (draws + 1)), seeds, examples)


def paired(first: BySeed, second: BySeed, draws: int = DRAWS) -> Difference | None:
    """:func:`paired_difference` over the seeds that both have; None when they share none."""
    shared = sorted(set(first) & set(second))
    if not shared:
        return None
    return paired_difference(np.stack([first[n] for n in shared]), np.stack([second[n] for n in shared]), draws)


def _chunks(total: int, size: int) -> Iterable[int]:
    return (min(size, total - start) for start in range(0, total, size))


def holm(values: Sequence[float]) -> list[float]:
    """p values after Holm's correction for as many tests, in the order given (Holm 1979).

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order, found, so_far = sorted(range(len(values)), key=values.__getitem__), [1.0] * len(values), 0.0
    for rank, at in enumerate(order):
        so_far = max(so_far, min(1.0, (len(values) - rank) * values[at]))
        found[at] = so_far
    return found


@dataclass(frozen=True)
class Point:
    """A method in one number format on the front's plane. ``choose_by`` is its validation loss, ``losses`` and ``scores`` are
    its answers on the test set."""

    name: str
    bytes: int
    choose_by: float
    losses: BySeed
    scores: BySeed


BudgetVerdict = Literal["ours", "peft", "undecided", "none"]


@dataclass(frozen=True)
class AtBudget:
    """The best of ours and of peft's at or under ``budget`` bytes, and ours minus peft's on the test set: log loss, then score.

    ``p`` is that of the log loss after Holm's correction over the budgets.
    """

    budget: int
    ours: Point | None
    peft: Point | None
    loss: Difference | None
    score: Difference | None
    p: float
    verdict: BudgetVerdict


def best_under(points: Iterable[Point], budget: float) -> Point | None:
    """The point of at most ``budget`` bytes with the lowest validation loss; the smallest of equals.

    Choosing on validation keeps the test set out of the choice: otherwise the family with more members would gain.
    """
    fitting = sorted((p for p in points if p.bytes <= budget), key=lambda p: p.bytes)
    return min(fitting, key=lambda p: p.choose_by, default=None)


def front(points: Iterable[Point]) -> list[Point]:
    """The quality-per-byte front: what ``best_under`` gives as the budget grows, smallest first."""
    points = list(points)
    found: list[Point] = []
    for size in sorted({p.bytes for p in points}):
        best = best_under(points, size)
        if best is not None and (not found or best is not found[-1]):
            found.append(best)
    return found


def at_budgets(budgets: Sequence[int], ours: Iterable[Point], peft: Iterable[Point]) -> list[AtBudget]:
    """Compare the two families at each budget: by log loss, the lower the better, at .05 after Holm's correction over those budgets
    where both have something.

    The verdict is ``none`` where a family has nothing that small: another format could change that, so it is nobody's win.
    """
    ours, peft = list(ours), list(peft)
    pairs = [(budget, best_under(ours, budget), best_under(peft, budget)) for budget in budgets]
    losses = [paired(mine.losses, theirs.losses) if mine and theirs else None for _, mine, theirs in pairs]
    corrected = iter(holm([loss.p for loss in losses if loss is not None]))
    found = []
    for (budget, mine, theirs), loss in zip(pairs, losses, strict=True):
        if mine is None or theirs is None or loss is None:
            found.append(AtBudget(budget, mine, theirs, None, None, 1.0, "none"))
            continue
        p = next(corrected)
        verdict: BudgetVerdict = "undecided" if p >= 0.05 else "ours" if loss.mean < 0 else "peft"
        found.append(AtBudget(budget, mine, theirs, loss, paired(mine.scores, theirs.scores), p, verdict))
    return found


ClaimVerdict = Literal["holds", "fails", "undecided", "cannot tell"]


@dataclass(frozen=True)
class ClaimResult:
    """Whether ``method`` is not worse than ``baseline`` by more than ``margin``, with ``times`` fewer numbers.

    ``difference`` is of scores, the larger the better. By its whole interval: above -margin the claim holds, below it fails.
    """

    method: str
    baseline: str
    difference: Difference
    numbers: int
    baseline_numbers: int
    times: float
    margin: float
    told_apart: bool = True  # False: the probe, which has no adapter, meets the claim too

    @property
    def small_enough(self) -> bool:
        return self.numbers * self.times <= self.baseline_numbers

    @property
    def verdict(self) -> ClaimVerdict:
        low, high = self.difference.low, self.difference.high
        if not self.small_enough or (high is not None and high < -self.margin):
            return "fails"
        if low is None or low <= -self.margin:
            return "undecided"
        return "holds" if self.told_apart else "cannot tell"
