"""The results of an experiment as rows, gathered from its cells: one row a method and format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from smidgen.errors import ConfigError
from smidgen.lab.compare import answers
from smidgen.lab.compare.cells import Cell, Cells, Record, make_cell
from smidgen.lab.compare.experiment import PROBE, Experiment, Method
from smidgen.lab.compare.search import Choice, choose, method_cells, search_cells
from smidgen.lab.statistics import Point


@dataclass(frozen=True)
class Row:
    """One method in one format. Answers are by seed, [example]; sizes are those of the adapter without the head."""

    method: Method
    format: str
    choice: Choice | None  # the learning rate and how it was found; None: it has none
    losses: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False)
    scores: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False)  # the larger the better
    test: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    validation: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    forgetting: Mapping[int, float] = field(default_factory=dict)
    numbers: int = 0
    head_numbers: int = 0
    bytes: int = 0  # of the file and the config
    file_bytes: int = 0
    head_bytes: int = 0
    seconds: float = 0.0  # CPU seconds of training, mean over seeds
    peak_memory: int | None = None  # bytes
    step_ratio: float | None = None  # its training step against the head-only step on the frozen base
    failures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.method.name if self.format == "float32" else f"{self.method.name}, {SHORT[self.format]}"

    @property
    def loss(self) -> float:
        return float(np.mean(list(self.losses.values())))

    @property
    def point(self) -> Point:
        """On the front's plane. Only rows with answers have one."""
        chosen_by = fmean(_loss(found) for found in self.validation.values())
        return Point(self.name, self.bytes, chosen_by, self.losses, self.scores)


SHORT = {"float16": "fp16", "int8": "int8", "int4": "int4", "float32": ""}


@dataclass(frozen=True)
class Results:
    """All rows, smallest adapter first, and what is still missing."""

    experiment: Experiment
    rows: tuple[Row, ...]
    metric: str
    greater_is_better: bool
    missing: tuple[str, ...]
    cpu_seconds: Mapping[str, float]  # by stage, of every cell together
    cells_done: int
    records: tuple[Record, ...] = field(repr=False, default=())  # the run cells that went well

    def family(self, *names: str) -> list[Row]:
        """Rows with answers of these families."""
        return [row for row in self.rows if row.method.family in names and row.losses]

    def of(self, method: str) -> Row | None:
        """The row of a method in the first of its formats, if it has answers."""
        return next(
            (row for row in self.rows if row.method.name == method and row.losses and row.format in self.first), None
        )

    @property
    def first(self) -> tuple[str, str]:
        return self.experiment.formats[0], "float32"

    @property
    def probe(self) -> Row | None:
        """The head alone."""
        return next((row for row in self.rows if row.method.kind == PROBE and row.losses), None)


def run_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """The trainings that are compared, seed outermost so that early results cover all methods; methods whose every
    rate failed have none."""
    steps = experiment.config().train.max_train_steps
    found = []
    for seed in experiment.seeds:
        for method in experiment.methods:
            choice = choose(experiment, method, cells)
            if choice is None:
                found.append(make_cell(experiment, "run", method, 0.0, seed, 0))
            elif not choice.failed:
                found.append(make_cell(experiment, "run", method, choice.rate, seed, steps))
    return found


def cost_cells(experiment: Experiment, cells: Cells) -> list[Cell]:
    """One measurement of memory and step time for each method that is trained."""
    if experiment.cost_steps == 0:
        return []
    seed, steps = experiment.seeds[0], experiment.cost_steps
    choices = [(method, choose(experiment, method, cells)) for method in experiment.methods]
    known = [(method, choice.rate) for method, choice in choices if choice is not None and not choice.failed]
    return [make_cell(experiment, "cost", method, rate, seed, steps) for method, rate in known]


def gather(experiment: Experiment, cells: Cells) -> Results:
    """The results as far as they are there. ConfigError when there is no finished training at all."""
    searched = search_cells(experiment, cells)
    missing = [cell.label for cell in cells.missing(searched)]
    complete = [m for m in experiment.methods if not cells.missing(method_cells(experiment, m, cells))]
    known = experiment.only([method.name for method in complete]) if complete else None
    runs, costs = (run_cells(known, cells), cost_cells(known, cells)) if known else ([], [])
    missing += [cell.label for cell in cells.missing([*runs, *costs])]
    good = [record for cell in runs if (record := cells.good(cell)) is not None]
    if known is None or not good:
        raise ConfigError(f"There is nothing to report on in {cells.folder} yet; run the experiment first.")
    rows = [row for method in complete for row in _rows(known, method, runs, costs, searched, cells)]
    rows.sort(key=lambda row: (row.bytes, row.name))
    every = [(cell.stage, r) for cell in (*searched, *runs, *costs) if (r := cells.good(cell)) is not None]
    seconds = {
        stage: sum(r.get("cpu_seconds", 0.0) for s, r in every if s == stage) for stage in ("search", "run", "cost")
    }
    first = good[0]
    details = first["metric"], first["greater_is_better"], tuple(missing), seconds, len(every), tuple(good)
    return Results(experiment, tuple(rows), *details)


def _rows(
    experiment: Experiment,
    method: Method,
    runs: Sequence[Cell],
    costs: Sequence[Cell],
    searched: Sequence[Cell],
    cells: Cells,
) -> list[Row]:
    found = {c.seed: r for c in runs if c.method == method and (r := cells.good(c)) is not None}
    cost = next((r for c in costs if c.method == method and (r := cells.good(c)) is not None), {})
    own = [cell for cell in (*searched, *runs, *costs) if cell.method == method]
    shared: dict[str, Any] = {
        "forgetting": {s: r["forgetting"]["change"] for s, r in found.items() if r["forgetting"] is not None},
        "failures": tuple(_failures(own, cells)),
    }
    choice = choose(experiment, method, cells)
    if not found:
        return [Row(method, experiment.formats[0], choice, **shared)]
    one = next(iter(found.values()))  # sizes do not depend on the seed, but for where a budget is spent
    shared |= {"numbers": one["numbers"]["adapter"], "head_numbers": one["numbers"]["head"]}
    shared |= {"head_bytes": one["head_bytes"], "seconds": fmean(r["train_seconds"] for r in found.values())}
    shared |= {"peak_memory": cost.get("peak_memory"), "step_ratio": cost.get("step_ratio")}
    rows = []
    for each in one["formats"]:
        parts = {seed: record["formats"][each] for seed, record in found.items()}
        values = {
            "losses": {seed: answers.from_text(part["answers"]["losses"]) for seed, part in parts.items()},
            "scores": {seed: answers.from_text(part["answers"]["scores"]) for seed, part in parts.items()},
            "test": {seed: part["test"] for seed, part in parts.items()},
            "validation": {seed: part["validation"] for seed, part in parts.items()},
            "bytes": max(part["bytes"]["adapter"] for part in parts.values()),
            "file_bytes": max(part["bytes"]["file"] for part in parts.values()),
        }
        rows.append(Row(method, each, choice, **shared, **values))
    return rows


def _loss(found: Mapping[str, float]) -> float:
    return found["loss"] if "loss" in found else found["nll"]


def _failures(cells_of_method: Sequence[Cell], cells: Cells) -> list[str]:
    """A sentence for each failed cell."""
    found = []
    for cell in cells_of_method:
        record = cells.read(cell)
        if record is not None and record["status"] == "failed":
            found.append(f"{cell.label}: {record['error']['type']}: {record['error']['reason']}")
    return found
