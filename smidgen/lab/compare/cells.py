"""Cells: one training each, one JSON file each, written in one step. Several processes may share a folder.

A cell's name ends in a hash of what decides its numbers, so a changed setting is another cell and a renamed method is
the same one. A process that works on a cell holds a file lock, which the system lets go of when the process dies
however it dies: a killed cell is simply not there, and whoever comes next does it.
"""

import hashlib
import json
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from smidgen.adapters.atomic import replace_file
from smidgen.errors import CheckpointError, SmidgenError
from smidgen.lab.compare.experiment import Experiment, Method
from smidgen.training.interrupts import TrainingInterrupted
from smidgen.training.settings import flat, to_dict

logger = logging.getLogger(__name__)

Stage = Literal["search", "run", "cost"]
FORMAT = 2
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training: a method at a learning rate on a seed for a number of steps; ``cost`` cells measure, not train."""

    stage: Stage
    method: Method
    rate: float
    seed: int
    steps: int
    decides: str  # JSON of all that decides the numbers

    @property
    def key(self) -> str:
        return hashlib.sha256(self.decides.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        rate = f", rate {self.rate:g}" if self.rate else ""
        return f"{self.stage} {self.method.name}{rate}, {self.steps} steps, seed {self.seed}"

    @property
    def file(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.method.name.lower()).strip("-")
        return f"{slug}-lr{self.rate:g}-{self.steps}steps-seed{self.seed}-{self.key}.json"


def make_cell(experiment: Experiment, stage: Stage, method: Method, rate: float, seed: int, steps: int) -> Cell:
    """The cell of ``experiment`` with these coordinates."""
    decides: Record = {
        "format": FORMAT,
        "version": _version(),
        "stage": stage,
        "recipe": experiment.recipe,
        "rate": rate,
    }
    decides |= {
        "settings": _given(experiment.config(seed, steps or None)),
        "kind": method.kind,
        "options": method.options,
    }
    decides |= {"targets": experiment.targets(method), "evaluation": to_dict(experiment.evaluation)}
    if stage == "run":
        decides["formats"] = list(experiment.formats)
        decides["forgetting"] = to_dict(experiment.forgetting) if experiment.forgetting else None
    return Cell(stage, method, rate, seed, steps, json.dumps(decides, sort_keys=True, default=str))


@cache
def _version() -> str:
    return version("smidgen")


def _given(config: Any) -> Record:
    """The settings that are not the recipe's defaults: a setting that a later version adds makes no other cell."""
    usual = flat(type(config)())
    return {name: value for name, value in flat(config).items() if value != usual[name]}


class Cells:
    """The cells of one folder: ``<stage>/<name>-<key>.json``.

    Example:
        >>> cells = Cells(tmp_path)
        >>> cells.work([cell], lambda cell: {"scores": {"test": 0.5}})
        1
        >>> cells.read(cell)["scores"]
        {'test': 0.5}
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, cell: Cell) -> Path:
        """Where the cell is, or will be."""
        found = sorted((self.folder / cell.stage).glob(f"*-{cell.key}.json"))
        return found[0] if found else self.folder / cell.stage / cell.file

    def read(self, cell: Cell) -> Record | None:
        """What the cell recorded, a failure included; None when it is not done."""
        path = self.path(cell)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it and run the same command again.") from error

    def good(self, cell: Cell) -> Record | None:
        """What the cell recorded, if it is done and did not fail."""
        record = self.read(cell)
        return record if record is not None and record["status"] == "done" else None

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if not self.path(cell).exists()]

    def work(self, cells: Iterable[Cell], run: Callable[[Cell], Record]) -> int:
        """Do those of ``cells`` that are not done and that nobody else is doing; returns how many were done here.

        An error of a cell is recorded in its place and the others go on; interrupts and a full disk end the work.
        """
        done = 0
        for cell in cells:
            if self.path(cell).exists():
                continue
            with self._claim(cell) as mine:
                if not mine or self.path(cell).exists():
                    continue
                replace_file(self.path(cell), json.dumps(_recorded(cell, run), indent=1, allow_nan=False) + "\n")
                done += 1
        return done

    @contextmanager
    def _claim(self, cell: Cell) -> Iterator[bool]:
        from filelock import FileLock, Timeout

        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / f"{cell.key}.lock", timeout=0):
                yield True
        except Timeout:
            yield False


def _recorded(cell: Cell, run: Callable[[Cell], Record]) -> Record:
    """The cell's record: what it is, then what ``run`` found or why it failed."""
    what: Record = {"method": cell.method.name, "stage": cell.stage, "rate": cell.rate, "seed": cell.seed}
    what |= {"steps": cell.steps, "decides": json.loads(cell.decides)}
    try:
        found = run(cell)
    except TrainingInterrupted:
        raise
    except Exception as error:  # whatever a method's library raises is a fact about the method
        reason = str(error) or type(error).__name__
        logger.warning("%s failed: %s", cell.label, reason)
        trace = None if isinstance(error, SmidgenError) else traceback.format_exc()
        return what | {"status": "failed", "error": {"type": type(error).__name__, "reason": reason, "trace": trace}}
    return what | {"status": "done"} | found
