"""Run an experiment: search, trainings, measurements, report. Every stage can be stopped and taken up again."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from smidgen.adapters.atomic import replace_file
from smidgen.errors import TrainingError
from smidgen.lab.compare.cells import Cell, Cells
from smidgen.lab.compare.experiment import Experiment
from smidgen.lab.compare.fresh import one_thread, start_fresh
from smidgen.lab.compare.search import choose, method_cells, search_cells
from smidgen.lab.compare.table import cost_cells, gather, run_cells
from smidgen.training.settings import dump_yaml

logger = logging.getLogger(__name__)

Work = Callable[[Cell], dict]
_PLANS = {"search": search_cells, "run": run_cells, "cost": cost_cells}
STAGES = ("search", "run", "cost")


def compare(
    experiment: Experiment,
    folder: Path,
    *,
    stage: Literal["search", "run", "report"] | None = None,
    workers: int = 1,
    command: str = "",
    report: Path | None = None,
    work: Work | None = None,
) -> Path | None:
    """Do what is not done yet of ``experiment`` in ``folder``; returns the report's page, None after a search alone.

    Args:
        experiment: what to run.
        folder: where the cells are; several calls may share it.
        stage: ``search`` or ``run`` alone, ``report`` from what is there; None does all.
        workers: processes, one thread each.
        command: what the page names as the way to do it again.
        report: where the page goes (default: ``folder``).
        work: what does a cell, in this process (default: a ``Trainer``, here or in each worker).

    Raises:
        TrainingError: a worker died; what it had finished is kept. Or no method could be trained at any rate.
    """
    if stage != "report":
        replace_file(folder / "experiment.yaml", dump_yaml(experiment))
    if work is None and workers <= 1:
        from smidgen.lab.compare.trainer import Trainer

        work = Trainer(experiment)  # one for all stages and rounds: data, probe and states below are made once
    if stage in (None, "search"):
        _finish("search", experiment, folder, workers, work)
        _check_searched(experiment, Cells(folder))
    if stage == "search":
        return None
    if stage in (None, "run"):
        for part in ("run", "cost"):
            _finish(part, experiment, folder, workers, work)
    from smidgen.lab.compare.report import write_report

    return write_report(gather(experiment, Cells(folder)), report or folder, folder / "peft", command)


def _check_searched(experiment: Experiment, cells: Cells) -> None:
    """Names the methods that failed at every rate, with the first reason of each."""
    lost: dict[str, list[str]] = {}
    for method in experiment.methods:
        choice = choose(experiment, method, cells)
        if choice is not None and choice.failed:
            records = [record for cell in method_cells(experiment, method, cells) if (record := cells.read(cell))]
            lost.setdefault(records[0]["error"]["reason"], []).append(method.name)
    told = " ".join(f"{', '.join(names)}: {reason}" for reason, names in lost.items())
    if sum(map(len, lost.values())) == len(experiment.methods):
        raise TrainingError(f"No method could be trained at any rate. {told}")
    if lost:
        logger.warning("Could not be trained at any rate: %s", told)


def _finish(stage: str, experiment: Experiment, folder: Path, workers: int, work: Work | None) -> None:
    """Do the cells of a stage until its plan calls for no more: a search grows by what it finds."""
    cells = Cells(folder)
    while missing := cells.missing(_PLANS[stage](experiment, cells)):
        logger.info("%s: %d cells to do.", stage, len(missing))
        before = len(missing)
        if work is not None:
            with _single_thread():
                work_on(stage, experiment, cells, work)
        else:
            _in_processes(stage, experiment, folder, workers)
        after = cells.missing(missing)
        if len(after) == before:
            raise TrainingError(f"{after[0].label} is being done by another process; run the same command again later.")


def work_on(stage: str, experiment: Experiment, cells: Cells, work: Work) -> None:
    """Do what nobody else is doing of one stage, in this process."""
    plan = _PLANS[stage](experiment, cells)
    total = len(plan)

    def told(cell: Cell) -> dict:
        logger.info("%s (%d of %d done)", cell.label, total - len(cells.missing(plan)), total)
        found = work(cell)
        logger.info("%.0f CPU seconds.", found.get("cpu_seconds", 0.0))
        return found

    cells.work(plan, told)


def _in_processes(stage: str, experiment: Experiment, folder: Path, workers: int) -> None:
    """The stage's cells by several processes, which share them by locks."""
    words = [stage, str(folder)]
    running = [start_fresh("smidgen.lab.compare.worker", experiment, words) for _ in range(workers)]
    try:
        failed = [status for status in [process.wait() for process in running] if status != 0]
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    if failed:
        raise TrainingError(
            f"{len(failed)} of {workers} workers ended with status {failed[0]}; every finished cell is kept, run the "
            "same command again to go on."
        )


@contextmanager
def _single_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)
