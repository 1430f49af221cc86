"""The results of an experiment as rows, gathered from its cells: one row a method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from smidgen.errors import ConfigError
from smidgen.lab.compare.cells import Cell, Cells, Record, make_cell
from smidgen.lab.compare.experiment import Experiment, Method
from smidgen.lab.compare.search import Choice, choose, method_cells, search_cells
from smidgen.lab.statistics import Interval, Point, interval


@dataclass(frozen=True)
class Row:
    """One method's results. Scores and forgetting are by seed; sizes are those of the adapter without the head."""

    method: Method
    choice: Choice | None  # the learning rate and how it was found; None: every rate failed
    test: dict[int, float]
    validation: dict[int, float]
    forgetting: dict[int, float]
    numbers: int = 0
    head_numbers: int = 0
    bytes: int = 0  # adapter_model.safetensors and adapter_config.json
    file_bytes: int = 0  # adapter_model.safetensors alone
    head_bytes: int = 0
    seconds: float = 0.0  # CPU seconds of training, mean over seeds
    peak_memory: int | None = None  # bytes
    step_ratio: float | None = None  # its training step against the head-only step on the frozen base
    failures: tuple[str, ...] = ()

    @property
    def score(self) -> Interval | None:
        return interval(list(self.test.values())) if self.test else None

    @property
    def point(self) -> Point:
        """On the front's plane. Only rows with a score have one."""
        return Point(self.method.name, self.bytes, fmean(self.validation.values()), self.test)


@dataclass(frozen=True)
class Results:
    """All rows, smallest adapter first, and what is still missing."""

    experiment: Experiment
    rows: tuple[Row, ...]
    metric: str
    greater_is_better: bool
    missing: tuple[str, ...]
    cpu_seconds: float  # of every cell together
    records: tuple[Record, ...] = field(repr=False, default=())  # the run cells that went well

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.method.name == name), None)

    def family(self, *names: str) -> list[Row]:
        """Rows with a score of these families."""
        return [row for row in self.rows if row.method.family in names and row.test]


def run_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """The trainings that are compared, seed outermost so that early results cover all methods; methods whose every
    rate failed have none."""
    steps = experiment.config().train.max_train_steps
    rates = {m.name: choice.rate for m in experiment.methods if (choice := chosen(experiment, m, cells)) is not None}
    pairs = [(seed, method) for seed in experiment.seeds for method in experiment.methods if method.name in rates]
    return [make_cell(experiment, "run", method, rates[method.name], seed, steps) for seed, method in pairs]


def cost_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """One measurement of memory and step time for each method."""
    if experiment.cost_steps == 0:
        return []
    rates = {m.name: choice.rate for m in experiment.methods if (choice := chosen(experiment, m, cells)) is not None}
    known = [method for method in experiment.methods if method.name in rates]
    seed, steps = experiment.seeds[0], experiment.cost_steps
    return [make_cell(experiment, "cost", method, rates[method.name], seed, steps) for method in known]


def chosen(experiment: Experiment, method: Method, cells: Cells) -> Choice | None:
    """The method's rate; None when every rate failed. ConfigError when its search is not complete."""
    records = [cells.read(cell) for cell in method_cells(experiment, method, cells)]
    if records and all(record is not None and record["status"] == "failed" for record in records):
        return None
    return choose(experiment, method, cells)


def gather(experiment: Experiment, cells: Cells) -> Results:
    """The results as far as they are there. ConfigError when there is no finished training at all."""
    searched = search_cells(experiment, cells)
    missing = [cell.label for cell in cells.missing(searched)]
    complete = [m for m in experiment.methods if not cells.missing(c for c in searched if c.method == m)]
    if not complete:
        raise ConfigError(f"There is nothing to report on in {cells.folder} yet; run the experiment first.")
    known = experiment.only([method.name for method in complete])
    runs, costs = run_cells(known, cells), cost_cells(known, cells)
    missing += [cell.label for cell in cells.missing([*runs, *costs])]
    rows = [_row(known, method, runs, costs, searched, cells) for method in complete]
    good = [record for cell in runs if (record := cells.good(cell)) is not None]
    if not good:
        raise ConfigError(f"No training of this experiment is finished in {cells.folder}; run it first.")
    every = [record for cell in (*searched, *runs, *costs) if (record := cells.good(cell)) is not None]
    seconds = sum(record.get("cpu_seconds", 0.0) for record in every)
    rows.sort(key=lambda row: (row.bytes, row.method.name))
    first = good[0]
    details = first["metric"], first["greater_is_better"], tuple(missing), seconds, tuple(good)
    return Results(experiment, tuple(rows), *details)


def _row(
    experiment: Experiment,
    method: Method,
    runs: Sequence[Cell],
    costs: Sequence[Cell],
    searched: Sequence[Cell],
    cells: Cells,
) -> Row:
    found = {c.seed: r for c in runs if c.method == method and (r := cells.good(c)) is not None}
    cost = next((r for c in costs if c.method == method and (r := cells.good(c)) is not None), {})
    own = [cell for cell in (*searched, *runs, *costs) if cell.method == method]
    values: dict[str, Any] = {
        "test": {seed: r["scores"]["test"] for seed, r in found.items()},
        "validation": {seed: r["scores"]["validation"] for seed, r in found.items()},
        "forgetting": {s: r["forgetting"]["change"] for s, r in found.items() if r["forgetting"] is not None},
        "failures": tuple(_failures(own, cells)),
        "choice": chosen(experiment, method, cells),
    }
    if found:
        one = next(iter(found.values()))  # sizes do not depend on the seed, but for digits in a JSON file
        values |= {"numbers": one["numbers"]["adapter"], "head_numbers": one["numbers"]["head"]}
        values |= {"bytes": one["bytes"]["adapter"], "file_bytes": one["bytes"]["file"]}
        values |= {"head_bytes": one["bytes"]["head"], "seconds": fmean(r["train_seconds"] for r in found.values())}
        values |= {"peak_memory": cost.get("peak_memory"), "step_ratio": cost.get("step_ratio")}
    return Row(method, **values)


def _failures(cells_of_method: Sequence[Cell], cells: Cells) -> list[str]:
    """A sentence for each failed cell."""
    found = []
    for cell in cells_of_method:
        record = cells.read(cell)
        if record is not None and record["status"] == "failed":
            found.append(f"{cell.label}: {record['error']['type']}: {record['error']['reason']}")
    return found
