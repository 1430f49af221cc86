"""The one training loop. A task says what a batch is and what its loss is; this file says everything else.

Each optimizer step draws its batches by number, runs in the chosen precision on accelerate, refuses a loss or
gradient that is not finite, and every ``checkpointing_steps`` writes an atomic checkpoint. Evaluations choose the best
step and may end the run early. A run killed at any moment and resumed ends with the same bits as one that was not; k
processes end as one with batches k times as large.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from smidgen.errors import ConfigError, TrainingError
from smidgen.training import optimizers, snapshots
from smidgen.training.checkpoints import Checkpoint, CheckpointStore, read_checkpoint, resolve
from smidgen.training.evaluation import Criterion, Evaluation, criterion, measured
from smidgen.training.interrupts import Interrupts
from smidgen.training.processes import from_main, make_accelerator, prepare
from smidgen.training.randomness import derive
from smidgen.training.step import NotFinite, Stepper

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a task must offer the loop.

    A batch is any mapping. ``names`` in it says which files it came from; ``weight`` is how many items its loss is the
    mean over (without it all batches weigh alike), and batches of one step count in that proportion.

    A task that can be evaluated also has ``metric: str``, ``greater_is_better: bool`` and
    ``evaluate(model) -> dict[str, float]`` that holds at least ``metric``; the model is then in eval mode and under
    no_grad.
    """

    def batch(self, index: int) -> Mapping[str, Any]:
        """Batch number ``index`` on the CPU; it must follow from ``index`` and the task's seed alone."""

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The scalar loss of ``batch``, whose tensors lie on the model's device."""

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Draw or measure something for a person to look at; called before the first step and every ``preview_steps``, under no_grad."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and how safely to train. Steps are optimizer steps."""

    max_train_steps: int = 250  # optimizer steps
    optimizer: optimizers.Name = "adamw"  # adamw8bit (bitsandbytes) and adafactor remember less
    lr_scheduler: Literal["constant", "cosine", "linear"] = "cosine"
    lr_warmup_steps: int = 10
    max_grad_norm: float = 1.0  # longer gradients are cut to this
    gradient_accumulation_steps: int = 1  # batches to a step
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    checkpointing_steps: int = 100  # steps between checkpoints
    checkpoints_total_limit: int = 2  # older ones are removed
    preview_steps: int = 0  # steps between previews, the first before any step; 0: never
    eval_steps: int = 0  # steps between evaluations, the first before any step; 0: never
    early_stopping_patience: int = 0  # end after so many evaluations without a better one; 0: never
    load_best: bool = True  # end with the trained numbers of the best evaluation
    ema_decay: float = 0.0  # end with a moving average of the trained numbers, this much of it kept at a step; 0: never
    report_to: Literal["none", "jsonl", "tensorboard", "trackio", "wandb", "comet_ml"] = "none"  # jsonl: progress.jsonl
    seed: int = 0  # decides every random number of the run

    def __post_init__(self) -> None:
        least = {"max_train_steps": 1, "gradient_accumulation_steps": 1, "checkpointing_steps": 1}
        least |= {"lr_warmup_steps": 0, "checkpoints_total_limit": 1, "preview_steps": 0}
        least |= {"eval_steps": 0, "early_stopping_patience": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, not {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm must be above 0, not {self.max_grad_norm}; a large number switches it off."
            )
        if not 0 <= self.ema_decay < 1 or (self.ema_decay and self.eval_steps):
            raise ConfigError(
                f"ema_decay {self.ema_decay} must be below 1, and 0 with evaluations: they measure the numbers themselves."
            )
        if self.early_stopping_patience and not self.eval_steps:
            raise ConfigError(
                f"early_stopping_patience {self.early_stopping_patience} needs evaluations: set eval_steps."
            )


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: mean loss of each step, seconds of all its parts, and where it was taken up.

    ``steps`` were trained (fewer than asked for after an early stop); ``evaluations`` are ``{"step": n, **metrics}``.
    The model holds the numbers of ``best_step`` with ``load_best``, the moving average with ``ema_decay``, those of
    ``steps`` otherwise.
    """

    steps: int
    losses: list[float] = field(repr=False)
    seconds: float
    resumed_from: int | None = None
    evaluations: list[Evaluation] = field(default_factory=list, repr=False)
    best_step: int | None = None


def learning_rate_factor(config: LoopConfig, step: int) -> float:
    """The factor on each group's learning rate during optimizer step ``step`` (from 0); a pure function of the step.

    Example:
        >>> learning_rate_factor(LoopConfig(max_train_steps=10, lr_scheduler="constant", lr_warmup_steps=2), 0)
        0.5
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    progress = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_scheduler == "cosine" else 1 - progress


def train(
    task: Task,
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    config: LoopConfig,
    folder: str | Path,
    *,
    resume: str | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train what ``groups`` holds (optimizer groups with ``params`` and ``lr``) of ``model`` in place.

    ``identity`` holds the settings that decide the numbers; a checkpoint with another identity is refused. ``resume``
    is None, ``latest`` or a checkpoint's name. Raises TrainingError on a loss or gradient that is not finite (the
    model then holds its last good checkpoint) and TrainingInterrupted after SIGINT or SIGTERM (a checkpoint was
    written).
    """
    run = _Run(task, model, groups, config, Path(folder), dict(identity or {}))
    return run.go(resume, progress)


class _Run:
    """The state of one call of ``train``: accelerator, optimizer, trained tensors, history."""

    def __init__(self, task, model, groups, config, folder, identity):
        self.task, self.config, self.folder = task, config, folder
        self.judge = criterion(task) if config.eval_steps else None
        parts = config.gradient_accumulation_steps
        self.accelerator = make_accelerator(folder, config.mixed_precision, parts, config.report_to)
        self.identity = identity | {"num_processes": self.accelerator.num_processes}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        snapshots.check_groups(self.trained, groups)
        self.model = prepare(self.accelerator, model, list(self.trained.values()))
        self.optimizer = self.accelerator.prepare(
            optimizers.make_optimizer(config.optimizer, groups, self.accelerator.device)
        )
        self.stepper = Stepper(self.accelerator, task, self.model, self.optimizer, self.trained)
        self.store = CheckpointStore(folder, config.checkpoints_total_limit)
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.good: Checkpoint = self._snapshot(0)

    def go(self, resume: str | None, progress: bool) -> TrainResult:
        config = self.config
        found = resolve(self.folder, resume, config.checkpoints_total_limit, self.identity)
        if found is not None:
            self._restore(found)
            logger.info("Resumed from step %d.", found.step)
        self.accelerator.wait_for_everyone()  # nobody writes before all have read
        self._find_best(found, resume)
        self.started = time.perf_counter()
        done = found.step if found else 0
        was_training = self.model.training
        self.model.train()
        try:
            with _own_random_state(), Interrupts() as stop, self._bar(done, progress) as bar:
                if self.judge and done == 0 and not self.evaluations:
                    self._evaluate(0, self.judge)
                    self._keep(0)
                if done == 0:
                    self._preview(0)
                while not self._finished(done):
                    loss, signum = self._step(done, stop)
                    self.losses.append(loss)
                    done += 1
                    self._after_step(done, stopping=signum > 0)
                    self._show(bar)
                    if signum and not self._finished(done):
                        raise stop.error(done, self.store.path(done), signum)
            best = self.judge.best_step(self.evaluations) if self.judge else None
            if config.load_best and best not in (None, done):
                snapshots.put(self.trained, self.store.read(best).trained)
            if config.ema_decay:
                snapshots.put(self.trained, snapshots.averages(self.trained, self.optimizer.optimizer))
        finally:
            self.stepper.reach.close()
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).train(was_training)
            for tracker in self.accelerator.trackers:
                tracker.finish()
        resumed_from = found.step if found else None
        return TrainResult(done, self.losses, self._seconds(), resumed_from, self.evaluations, best)

    def _step(self, step: int, stop: Interrupts) -> tuple[float, int]:
        """The loss of one optimizer step, and the signal that any process got (0: none)."""
        config, factor = self.config, learning_rate_factor(self.config, step)
        try:
            return self.stepper(step, factor, config.max_grad_norm, config.seed, lambda: stop.received or 0)
        except NotFinite as found:
            snapshots.put(self.trained, self.good.trained)
            where = self.store.path(self.good.step) if self.good.step else "the untrained adapter"
            raise TrainingError(
                f"The {found.what} of step {step + 1} is {found.value}. Nothing of this step was kept: the model holds "
                f"{where}. The batch came from {', '.join(found.names)}. "
                "A lower --learning-rate, or --mixed-precision no, usually helps."
            ) from None

    def _after_step(self, done: int, stopping: bool) -> None:
        config, accelerator = self.config, self.accelerator
        if config.ema_decay:
            snapshots.update_averages(self.trained, self.optimizer.optimizer, config.ema_decay, done)
        accelerator.log({"loss": self.losses[-1], "lr": self.optimizer.param_groups[0]["lr"]}, step=done)
        better = False
        if self.judge and (done % config.eval_steps == 0 or done == config.max_train_steps):
            self._evaluate(done, self.judge)
            better = self.judge.best_step(self.evaluations) == done
        if done % config.checkpointing_steps == 0 or better or stopping or self._finished(done):
            self._keep(done)
        self._preview(done)

    def _preview(self, done: int) -> None:
        every, accelerator = self.config.preview_steps, self.accelerator
        if every and done % every == 0 and accelerator.is_main_process:
            with torch.no_grad():
                self.task.preview(accelerator.unwrap_model(self.model), done, self.folder)

    def _evaluate(self, step: int, judge: Criterion) -> None:
        """Every process evaluates, which takes no longer than waiting; the main process's figures count."""
        torch.manual_seed(derive(self.config.seed, "evaluate"))  # the same draws each time
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                found = self.task.evaluate(self.accelerator.unwrap_model(self.model))
        finally:
            self.model.train()
        metrics = from_main(self.accelerator, {name: float(value) for name, value in found.items()})
        try:
            self.evaluations.append(measured(metrics, judge, step))
        except TrainingError:
            snapshots.put(self.trained, self.good.trained)
            raise
        self.accelerator.log({f"eval/{name}": value for name, value in metrics.items()}, step=step)

    def _finished(self, done: int) -> bool:
        patience = self.config.early_stopping_patience
        exhausted = self.judge is not None and self.judge.exhausted(self.evaluations, patience)
        return done >= self.config.max_train_steps or exhausted

    def _keep(self, step: int) -> None:
        """Write a checkpoint, and keep from rotation what going on from any of those left would need."""
        self.good = self._snapshot(step)
        if self.accelerator.is_main_process:
            left = sorted({*self.store.steps(), step})[-self.store.keep :]
            self.store.write(self.good, self.judge.needed(self.evaluations, left) if self.judge else ())
        self.accelerator.wait_for_everyone()

    def _snapshot(self, step: int) -> Checkpoint:
        state = snapshots.numbers(self.trained), snapshots.moments(self.trained, self.optimizer.optimizer)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        seconds = self._seconds() if step else 0.0
        return Checkpoint(step, *state, self.identity, list(self.losses), seconds, scaler, list(self.evaluations))

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step > self.config.max_train_steps:
            raise ConfigError(
                f"The checkpoint is at step {checkpoint.step}, past --max-train-steps {self.config.max_train_steps}."
            )
        snapshots.put(self.trained, checkpoint.trained)
        snapshots.put_moments(self.trained, self.optimizer.optimizer, checkpoint.optimizer)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.losses, self.evaluations = list(checkpoint.losses), list(checkpoint.evaluations)
        self.seconds_before, self.good = checkpoint.seconds, checkpoint

    def _find_best(self, found: Checkpoint | None, resume: str | None) -> None:
        """What ends the run must be there when it begins; a checkpoint of another folder brings its best one along."""
        best = self.judge.best_step(self.evaluations) if self.judge else None
        if best is None or found is None or resume is None or best == found.step or not self.config.load_best:
            return
        elsewhere = Path(resume).resolve().parent
        if Path(resume).is_dir() and elsewhere != self.folder.resolve():
            brought = read_checkpoint(elsewhere / f"checkpoint-{best}")
            if self.accelerator.is_main_process:
                self.store.write(brought, {best})
        else:
            self.store.read(best)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _bar(self, start: int, progress: bool):
        from tqdm.auto import tqdm

        hidden = not (progress and self.accelerator.is_main_process)
        total = self.config.max_train_steps
        often = 0.3 if sys.stderr.isatty() else 10.0  # seconds; a log file needs no animation
        options = {"desc": "train", "unit": "step", "dynamic_ncols": True, "mininterval": often}
        return tqdm(total=total, initial=start, disable=hidden, **options)

    def _show(self, bar) -> None:
        recent = self.losses[-20:]
        shown = {"loss": f"{sum(recent) / len(recent):.4f}"}
        if self.judge and self.evaluations:
            shown[self.judge.metric] = f"{self.evaluations[-1][self.judge.metric]:.4f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(1)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The loop seeds torch's global generators each step; the caller finds them as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
