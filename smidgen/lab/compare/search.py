"""The learning-rate search: which cells it has, and which rate each method takes from it."""

import math
from dataclasses import dataclass

from smidgen.errors import ConfigError
from smidgen.lab.compare.cells import Cell, Cells, Record, make_cell
from smidgen.lab.compare.experiment import Experiment, Method


@dataclass(frozen=True)
class Choice:
    """The rate a method takes: the best on validation. ``at_edge`` says that the grid ends there all the same."""

    rate: float
    score: float
    grid: tuple[float, ...]
    at_edge: bool


def search_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """Every cell of the search as far as it is known: the grids, and the extensions that what is done calls for.

    The first rate of every method comes first, so early results cover all methods.
    """
    grids = {method.name: _grid(experiment, method, cells) for method in experiment.methods}
    rounds = range(max(map(len, grids.values())))
    pairs = [(method, grids[method.name][n : n + 1]) for n in rounds for method in experiment.methods]
    return [_cell(experiment, method, rate) for method, rates in pairs for rate in rates]


def method_cells(experiment: Experiment, method: Method, cells: Cells) -> list[Cell]:
    """The part of the search that is one method's."""
    return [_cell(experiment, method, rate) for rate in _grid(experiment, method, cells)]


def choose(experiment: Experiment, method: Method, cells: Cells) -> Choice:
    """The best rate of ``method``; the lowest of equals.

    Raises:
        ConfigError: its search is not complete, or every rate of it failed.
    """
    scores = _scores(experiment, method, _grid(experiment, method, cells), cells)
    if None in scores.values():
        raise ConfigError(f"The search of {method.name!r} is not complete; do it first with --stage search.")
    known = {rate: score for rate, score in sorted(scores.items()) if score is not None}
    grid, best = tuple(known), max(known, key=lambda rate: known[rate])
    if known[best] == -math.inf:
        raise ConfigError(f"Every learning rate of {method.name!r} failed: {', '.join(f'{rate:g}' for rate in grid)}.")
    return Choice(best, known[best], grid, len(grid) > 1 and best in (grid[0], grid[-1]))


def _grid(experiment: Experiment, method: Method, cells: Cells) -> list[float]:
    """The method's rates, then its extensions in the order in which they are called for."""
    rates = list(method.rates)
    for _ in range(experiment.search.extensions if len(rates) > 1 else 0):
        scores = _scores(experiment, method, rates, cells)
        known = {rate: score for rate, score in sorted(scores.items()) if score is not None}
        best = max(known, key=lambda rate: known[rate], default=0.0)
        if len(known) < len(rates) or known[best] == -math.inf:
            break
        ordered = list(known)
        if best == ordered[0]:
            rates.append(float(f"{best * ordered[0] / ordered[1]:.3g}"))
        elif best == ordered[-1]:
            rates.append(float(f"{best * ordered[-1] / ordered[-2]:.3g}"))
        else:
            break
    return rates


def _scores(experiment: Experiment, method: Method, rates: list[float], cells: Cells) -> dict[float, float | None]:
    """Validation score of each rate, larger is better; minus infinity where it failed, None where it is not done."""
    return {rate: _score(experiment, cells.read(_cell(experiment, method, rate))) for rate in rates}


def _cell(experiment: Experiment, method: Method, rate: float) -> Cell:
    return make_cell(experiment, "search", method, rate, experiment.search.seed, experiment.search.steps)


def _score(experiment: Experiment, record: Record | None) -> float | None:
    if record is None:
        return None
    if record["status"] != "done":
        return -math.inf
    found = record["validation"]
    if experiment.search.by == "loss" and "loss" in found:
        return -float(found["loss"])
    return float(found[record["metric"]]) * (1 if record["greater_is_better"] else -1)
