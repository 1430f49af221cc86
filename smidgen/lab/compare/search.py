"""The search for learning rates by successive halving: which cells it has, and which rate each method takes from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smidgen.errors import ConfigError
from smidgen.lab.compare.cells import Cell, Cells, Record, make_cell
from smidgen.lab.compare.experiment import Experiment, Method, Round

Score = Callable[
    [float, int], float | None
]  # (rate, round) -> larger is better, minus infinity: failed, None: not done
Training = tuple[float, int]  # rate and round


@dataclass(frozen=True)
class Choice:
    """The rate a method takes: the best of the last round. ``grid`` are all rates tried; ``at_edge`` says that it ends there all
    the same, ``failed`` that every rate failed."""

    rate: float
    loss: float
    grid: tuple[float, ...]
    at_edge: bool
    failed: bool = False


def halving(
    rates: Sequence[float], rounds: Sequence[Round], extensions: int, score: Score
) -> tuple[list[Training], Choice | None]:
    """The trainings of a search as far as they are known, and the choice when all of them are done.

    Every rate is tried in the first round, the best ``keep`` of a round in the next. Whenever the best of a round is the
    smallest or the largest rate of that round, the next rate beyond it joins, be it one that an earlier, shorter round dropped; not
    one that failed there.
    """
    grid, left, wanted = sorted(rates), extensions, []
    kept, lost = list(grid), set[float]()  # rates that failed with fewer steps fail with more
    best, beyond = math.nan, None
    for number, each in enumerate(rounds):
        while True:
            wanted += [(rate, number) for rate in kept if (rate, number) not in wanted]
            scores = {rate: score(rate, number) for rate in sorted(kept)}
            known = {rate: value for rate, value in scores.items() if value is not None}
            if len(known) < len(scores):
                return wanted, None
            best = max(known, key=lambda rate: known[rate])
            if known[best] == -math.inf:
                return wanted, Choice(best, math.inf, tuple(grid), False, failed=True)
            beyond = _beyond(sorted(kept), grid, best)
            if beyond is None or beyond in lost or (beyond not in grid and not left):
                break
            if beyond not in grid:
                grid, left = sorted([*grid, beyond]), left - 1
            kept.append(beyond)
        lost |= {rate for rate in known if known[rate] == -math.inf}
        kept = sorted(known, key=lambda rate: -known[rate])[: each.keep]
        kept = [rate for rate in kept if known[rate] > -math.inf]
    return wanted, Choice(best, -known[best], tuple(grid), beyond is not None and beyond not in lost)


def _beyond(tried: Sequence[float], grid: Sequence[float], rate: float) -> float | None:
    """The next rate beyond the edge of the ascending ``tried`` that ``rate`` lies at: the grid's, or beyond it in the grid's proportion;
    None where it lies inside, or alone."""
    if len(tried) < 2 or rate not in (tried[0], tried[-1]):
        return None
    place = grid.index(rate) + (1 if rate == tried[-1] else -1)
    if 0 <= place < len(grid):
        return grid[place]
    factor = grid[0] / grid[1] if place < 0 else grid[-1] / grid[-2]
    return float(f"{rate * factor:.3g}")


def search_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """Every cell of the search as far as it is known, by rounds, so that early results cover all methods."""
    plans = [method_cells(experiment, method, cells) for method in experiment.methods]
    return [plan[n] for n in range(max(map(len, plans), default=0)) for plan in plans if n < len(plan)]


def method_cells(experiment: Experiment, method: Method, cells: Cells) -> list[Cell]:
    """The part of the search that is one method's."""
    trainings, _ = _searched(experiment, method, cells)
    return [_cell(experiment, method, *training) for training in trainings]


def choose(experiment: Experiment, method: Method, cells: Cells) -> Choice | None:
    """The rate of ``method``; None for one that has none to choose.

    Raises:
        ConfigError: its search is not complete.
    """
    if not method.rates:
        return None
    choice = _searched(experiment, method, cells)[1]
    if choice is None:
        raise ConfigError(f"The search of {method.name!r} is not complete; do it first with --stage search.")
    return choice


def _searched(experiment: Experiment, method: Method, cells: Cells) -> tuple[list[Training], Choice | None]:
    if not method.rates:
        return [], None
    search = experiment.search
    return halving(
        method.rates,
        search.rounds,
        search.extensions,
        lambda rate, number: _score(cells.read(_cell(experiment, method, rate, number))),
    )


def _cell(experiment: Experiment, method: Method, rate: float, number: int) -> Cell:
    search = experiment.search
    return make_cell(experiment, "search", method, rate, search.seed, search.rounds[number].steps)


def _score(record: Record | None) -> float | None:
    if record is None:
        return None
    if record["status"] != "done":
        return -math.inf
    found = record["validation"]
    loss = found["loss"] if "loss" in found else found[record["metric"]] * (-1 if record["greater_is_better"] else 1)
    return -float(loss)
