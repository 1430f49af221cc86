"""One cell of work: train an adapter from the probe's head to its last step, store it in each format, and measure what comes back."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.bases.pipelines import default_device
from smidgen.lab.compare import answers, codec
from smidgen.lab.compare.cells import Cell, Record
from smidgen.lab.compare.cost import measure_apart
from smidgen.lab.compare.experiment import FULL, PROBE, Experiment, Method
from smidgen.lab.compare.forgetting import make_forgetting
from smidgen.lab.compare.recipes import prepare
from smidgen.lab.compare.setups import make_rates, make_setup
from smidgen.lab.compare.subsets import shortened
from smidgen.tasks.finetune.lower import States, known_below
from smidgen.tasks.finetune.probe import Probe, fit_probe
from smidgen.training import engine
from smidgen.training.fitting import Fitted, fit
from smidgen.training.frozen import frozen_matmuls
from smidgen.training.randomness import derive

WHOLE = "float32"  # the format of what no adapter holds: a whole model, and nothing at all
HEAD_BYTES = 2  # of a number of the head, in fp16 with every method and format
AHEAD = 10**9  # reads: states below are computed ahead in any case, as later cells take them too


class Trainer:
    """Does the cells of one experiment in one process. Data, probe and states of lower layers are kept between cells."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self._seed: int | None = None
        self._prepared: Any = None
        self._task: Any = None
        self._forgetting: Any = None
        self._probe: Probe | None = None
        self._probed = False
        self._states: States = {}
        self._known: dict[str, set[str]] = {}  # by method: tensors whose start follows from the base

    def __call__(self, cell: Cell) -> Record:
        """The figures of ``cell``. Raises whatever its training raises."""
        started, cpu = time.perf_counter(), time.process_time()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        if cell.stage == "cost":
            found = measure_apart(self.experiment, cell.method, cell.rate, cell.seed)
        else:
            self._prepare(cell.seed)
            with ExitStack() as kept:
                found = self._alone(cell, kept) if cell.method.kind == PROBE else self._trained(cell, kept)
            found["cpu_seconds"] = time.process_time() - cpu
        return found | {"created_at": created, "total_seconds": time.perf_counter() - started}

    def _prepare(self, seed: int) -> None:
        if self._seed == seed:
            return
        self._prepared = prepare(self.experiment.recipe, self.experiment.config(seed))
        wanted = self.experiment.evaluation
        most = {"validation": wanted.validation_examples, "test": wanted.test_examples}
        self._task, self._seed = shortened(self._prepared.task, **most), seed

    def _fresh(self, config: Any) -> Any:
        """The base with the head that every method starts from."""
        model = self._prepared.fresh()
        if not self._probed:
            heads, matmuls = self._prepared.heads, config.frozen_matmuls
            self._probe, self._probed = fit_probe(model, self._task, heads, matmuls=matmuls), True
        if self._probe is not None:
            self._probe.put(model)
        return model

    def _alone(self, cell: Cell, kept: ExitStack) -> Record:
        """The head alone, which is trained no further."""
        config = self.experiment.config(cell.seed)
        model = engine.adapt(self._fresh(config), engine.LinearProbe(), self._prepared.heads)
        self._enter(kept, model, config, 0)
        nothing: Record = {"losses": [], "numbers": 0, "seconds": 0.0}
        return self._record(cell, model, None, nothing, {WHOLE: ({}, 0)}, 0)

    def _trained(self, cell: Cell, kept: ExitStack) -> Record:
        experiment, prepared, task = self.experiment, self._prepared, self._task
        config = experiment.config(cell.seed, cell.steps)
        model = self._fresh(config)
        setup = self._setup(cell.method, cell.seed, model)
        overhead = codec.config_bytes(setup)
        rates = make_rates(cell.rate, config.adapter.head_learning_rate)
        loop = replace(config.train, checkpointing_steps=cell.steps, checkpoints_total_limit=1)
        start: dict[str, Tensor] = {}

        @contextmanager
        def during() -> Iterator[None]:
            self._enter(kept, model, config, AHEAD)
            start.update(codec.numbers(model, prepared.heads))
            yield

        with tempfile.TemporaryDirectory(prefix="smidgen-compare-") as name:
            cpu = time.process_time()
            options: dict[str, Any] = {"heads": prepared.heads, "weight_decay": config.adapter.weight_decay}
            options |= {"during": during(), "progress": False}
            fitted: Fitted = fit(cell.method.name, model, task, setup, rates, loop, Path(name), **options)
            found = {"losses": fitted.losses, "numbers": fitted.trained_numbers, "seconds": time.process_time() - cpu}
        if cell.stage == "search":
            measured = task.evaluate(model)
            return _scores(task) | {"validation": measured, "train_seconds": found["seconds"]}
        now = codec.numbers(model, prepared.heads)
        if cell.method.kind == FULL:
            formats = {WHOLE: (now, sum(4 * value.numel() for value in now.values()))}
        else:
            known = self._starts(cell.method, config, start)
            change = {name: value - start[name] if name in known else value for name, value in now.items()}
            formats = {}
            for each in experiment.formats:
                back, size = codec.stored(change, each)
                formats[each] = {n: v + start[n] if n in known else v for n, v in back.items()}, size
        return self._record(cell, model, setup, found, formats, overhead)

    def _setup(self, method: Method, seed: int, model: Any) -> Any:
        setup = make_setup(self.experiment, method, seed, model, self._task, self._prepared.heads)
        if isinstance(setup, SmidgenConfig):
            setup.store_dtype = "float32"  # the codec rounds, as it does for all
        return setup

    def _enter(self, kept: ExitStack, model: Any, config: Any, reads: int) -> None:
        kept.enter_context(frozen_matmuls(model.to(default_device()), config.frozen_matmuls))
        kept.enter_context(known_below(self._task, model, config.cache_mb, reads, self._states))

    def _starts(self, method: Method, config: Any, start: dict[str, Tensor]) -> set[str]:
        """Which of a method's tensors start alike whatever the seed."""
        if method.name not in self._known:
            other = self._fresh(config)
            setup, seed = self._setup(method, config.train.seed + 1, other), derive(config.train.seed, "another start")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                engine.adapt(other, setup, self._prepared.heads)
            self._known[method.name] = codec.starts_known(start, codec.numbers(other, self._prepared.heads))
        return self._known[method.name]

    @torch.no_grad()
    def _record(
        self,
        cell: Cell,
        model: Any,
        setup: Any,
        found: Record,
        formats: dict[str, tuple[dict[str, Tensor], int]],
        overhead: int,
    ) -> Record:
        """What a training that is compared is measured for, in each format as it comes back from it."""
        task, heads = self._task, self._prepared.heads
        head = engine.head_parameters(model, heads)
        for parameter in head:
            parameter.copy_(parameter.half().float())
        numbers = codec.trained(model, heads)
        recorded: Record = {}
        for each, (back, size) in formats.items():
            for name, value in back.items():
                numbers[name].copy_(value)
            predicted = task.predict(model, "test")
            losses, scores = (values.numpy() for values in task.answers(predicted, "test"))
            recorded[each] = {
                "bytes": {"file": size, "config": overhead if size else 0, "adapter": size + (overhead if size else 0)},
                "validation": task.evaluate(model),
                "test": task.scores(predicted, "test"),
                "answers": {"losses": answers.to_text(losses), "scores": answers.to_text(scores)},
            }
        counted = sum(parameter.numel() for parameter in head)
        total = sum(parameter.numel() for parameter in model.parameters())
        losses = found["losses"]
        if self._forgetting is None:
            self._forgetting = make_forgetting(self.experiment, self._prepared)
        return _scores(task) | {
            "formats": recorded,
            "train_loss": fmean(losses[-max(1, len(losses) // 10) :]) if losses else None,
            "numbers": {"adapter": found["numbers"], "head": counted, "total": total},
            "head_bytes": HEAD_BYTES * counted,
            "train_seconds": found["seconds"],
            "forgetting": self._forgetting(model) if self._forgetting is not None else None,
            "train_tokens": sum(_tokens(task.batch(index)) for index in range(cell.steps)),
            "peft_config": _plain(setup.to_dict()) if hasattr(setup, "to_dict") else None,
        }


def _scores(task: Any) -> Record:
    return {"metric": task.metric, "greater_is_better": task.greater_is_better}


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
