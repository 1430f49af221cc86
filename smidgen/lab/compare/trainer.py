"""One cell of work: train an adapter, choose its best checkpoint on validation, and measure it."""

import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.lab.compare.cells import Cell, Record
from smidgen.lab.compare.cost import measure_apart
from smidgen.lab.compare.experiment import Experiment
from smidgen.lab.compare.forgetting import make_forgetting
from smidgen.lab.compare.recipes import prepare
from smidgen.lab.compare.setups import make_rates, make_setup
from smidgen.lab.compare.sizes import disk_bytes
from smidgen.lab.compare.subsets import shortened
from smidgen.training import engine
from smidgen.training.fitting import fit


class Trainer:
    """Does the cells of one experiment in one process; data and base are read once a seed."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self._seed: int | None = None
        self._prepared: Any = None
        self._task: Any = None
        self._forgetting: Any = None

    def __call__(self, cell: Cell) -> Record:
        """The figures of ``cell``. Raises whatever its training raises."""
        started, cpu = time.perf_counter(), time.process_time()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        if cell.stage == "cost":
            found = measure_apart(self.experiment, cell.method, cell.rate, cell.seed)
        else:
            self._prepare(cell.seed)
            found = self._train(cell)
            found["cpu_seconds"] = time.process_time() - cpu
        return found | {"created_at": created, "total_seconds": time.perf_counter() - started}

    def _prepare(self, seed: int) -> None:
        if self._seed == seed:
            return
        self._prepared = prepare(self.experiment.recipe, self.experiment.config(seed))
        wanted = self.experiment.evaluation
        most = {"validation": wanted.validation_examples, "test": wanted.test_examples}
        self._task, self._seed = shortened(self._prepared.task, **most), seed

    def _train(self, cell: Cell) -> Record:
        experiment, prepared, task = self.experiment, self._prepared, self._task
        config = experiment.config(cell.seed, None if cell.stage == "run" else cell.steps)
        model = prepared.fresh()
        setup = make_setup(experiment, cell.method, cell.seed, model, task, prepared.heads)
        rates = make_rates(cell.method, cell.rate, config.adapter.head_learning_rate)
        loop = replace(config.train, checkpointing_steps=cell.steps, checkpoints_total_limit=1)
        total = sum(parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryDirectory(prefix="smidgen-compare-") as name:
            folder, cpu = Path(name), time.process_time()
            options: dict[str, Any] = {"heads": prepared.heads, "weight_decay": config.adapter.weight_decay}
            fitted = fit(cell.method.name, model, task, setup, rates, loop, folder, progress=False, **options)
            seconds = time.process_time() - cpu
            size = disk_bytes(folder, prepared.heads)
            if isinstance(
                setup, SmidgenConfig
            ):  # scored as they come back from their file, whose numbers may be halves
                model = prepared.fresh()
                engine.load(model, folder)
                model.eval()
        best = _best(fitted.evaluations, task) if fitted.evaluations else task.evaluate(model)
        found: Record = {
            "metric": task.metric,
            "greater_is_better": task.greater_is_better,
            "scores": {"validation": best[task.metric]},
            "validation": {name: value for name, value in best.items() if name != "step"},
            "evaluations": fitted.evaluations,
            "best_step": fitted.best_step,
            "train_loss": fmean(fitted.losses[-max(1, len(fitted.losses) // 10) :]),
            "numbers": {"adapter": fitted.trained_numbers, "head": fitted.head_numbers, "total": total},
            "bytes": size,
            "train_seconds": seconds,
        }
        return found if cell.stage == "search" else found | self._test(cell, model, setup, found["scores"])

    def _test(self, cell: Cell, model: Any, setup: Any, scores: dict[str, float]) -> Record:
        """What only the compared trainings are measured for."""
        measured = self._task.evaluate_split(model, "test")
        if self._forgetting is None:
            self._forgetting = make_forgetting(self.experiment, self._prepared)
        return {
            "scores": scores | {"test": measured[self._task.metric]},
            "test": measured,
            "forgetting": self._forgetting(model) if self._forgetting is not None else None,
            "train_tokens": sum(_tokens(self._task.batch(index)) for index in range(cell.steps)),
            "peft_config": _plain(setup.to_dict()) if hasattr(setup, "to_dict") else None,
        }


def _best(evaluations: list[Record], task: Any) -> Record:
    """The evaluation whose checkpoint the model now holds: the first of the best."""
    sign = 1 if task.greater_is_better else -1
    return max(evaluations, key=lambda entry: sign * entry[task.metric])


def _tokens(batch: Any) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0


def _plain(value: Any) -> Any:
    """A config as JSON has it: sets as sorted lists, names of enums as their values."""
    if isinstance(value, dict):
        return {str(getattr(name, "value", name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
