"""The one training loop. A task says what a batch is and what its loss is; this file says everything else.

Each optimizer step draws its batches by number, runs in the chosen precision on accelerate, refuses a loss or
gradient that is not finite, and every ``checkpointing_steps`` writes an atomic checkpoint. A run killed at any moment
and resumed ends with the same bits as one that was not.
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

from smidgen.errors import ConfigError, MissingExtraError, TrainingError
from smidgen.training.checkpoints import Checkpoint, CheckpointStore, resolve
from smidgen.training.interrupts import Interrupts
from smidgen.training.randomness import derive

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a task must offer the loop. A batch is any mapping; ``names`` in it says which files it came from."""

    def batch(self, index: int) -> Mapping[str, Any]:
        """Batch number ``index`` on the CPU; it must follow from ``index`` and the task's seed alone."""

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The scalar loss of ``batch``, whose tensors lie on the model's device."""

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Draw or measure something for a person to look at; called every ``preview_steps`` under no_grad."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and how safely to train. Steps are optimizer steps."""

    max_train_steps: int = 250  # optimizer steps
    lr_scheduler: Literal["constant", "cosine", "linear"] = "cosine"
    lr_warmup_steps: int = 10
    max_grad_norm: float = 1.0  # longer gradients are cut to this
    gradient_accumulation_steps: int = 1  # batches to a step
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    checkpointing_steps: int = 100  # steps between checkpoints
    checkpoints_total_limit: int = 2  # older ones are removed
    preview_steps: int = 0  # steps between previews; 0: never
    report_to: Literal["none", "tensorboard", "wandb", "comet_ml"] = "none"
    seed: int = 0  # decides every random number of the run

    def __post_init__(self) -> None:
        least = {"max_train_steps": 1, "gradient_accumulation_steps": 1, "checkpointing_steps": 1}
        least |= {"lr_warmup_steps": 0, "checkpoints_total_limit": 1, "preview_steps": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, not {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ConfigError(
                f"max_grad_norm must be above 0, not {self.max_grad_norm}; a large number switches it off."
            )


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: mean loss of each step, seconds of all its parts, and where it was taken up."""

    steps: int
    losses: list[float] = field(repr=False)
    seconds: float
    resumed_from: int | None = None


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
        self.task, self.config, self.folder, self.identity = task, config, folder, identity
        self.accelerator = _accelerator(config, folder)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._check_groups(groups)
        self.base_rates = [float(group["lr"]) for group in groups]
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW([dict(g) for g in groups]))
        self.store = CheckpointStore(folder, config.checkpoints_total_limit)
        self.losses: list[float] = []
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.good: Checkpoint = self._snapshot(0)

    def go(self, resume: str | None, progress: bool) -> TrainResult:
        config = self.config
        found = resolve(self.folder, resume, config.checkpoints_total_limit, self.identity)
        if found is not None:
            self._restore(found)
            logger.info("Resumed from step %d.", found.step)
        self.started = time.perf_counter()
        start = found.step if found else 0
        was_training = self.model.training
        self.model.train()
        try:
            with _own_random_state(), Interrupts() as stop, self._bar(start, progress) as bar:
                for step in range(start, config.max_train_steps):
                    self.losses.append(self._step(step))
                    self._show(bar, step)
                    self._after_step(step + 1, stop.received is not None)
                    if stop.received is not None and step + 1 < config.max_train_steps:
                        raise stop.error(step + 1, self.store.path(step + 1))
        finally:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).train(was_training)
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return TrainResult(config.max_train_steps, self.losses, self._seconds(), found.step if found else None)

    def _step(self, step: int) -> float:
        """One optimizer step; returns the mean loss over its micro-batches."""
        accelerator, parts = self.accelerator, self.config.gradient_accumulation_steps
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * learning_rate_factor(self.config, step)
        total = 0.0
        for part in range(parts):
            index = (step * parts + part) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(derive(self.config.seed, "model", index))  # dropout and the like
            batch = self.task.batch(index)
            with accelerator.accumulate(self.model):  # gradients cross processes in the last part only
                with accelerator.autocast():
                    loss = self.task.loss(self.model, _to(batch, accelerator.device))
                value = float(loss.detach())
                self._check_finite(value, "loss", step, batch)
                accelerator.backward(loss)
            total += value / parts
        norm = self._clip()
        if accelerator.scaler is None:  # fp16's scaler skips such a step by itself and lowers its scale
            self._check_finite(float(norm), "gradient norm", step, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _clip(self) -> Tensor:
        """The gradient's norm after cutting; a task that trains many adapters at once cuts each of them alone."""
        trained, most = list(self.trained.values()), self.config.max_grad_norm
        own = getattr(self.task, "clip_gradients", None)
        if own is None:
            return self.accelerator.clip_grad_norm_(trained, most)
        self.accelerator.unscale_gradients(self.optimizer)
        return own(trained, most)

    def _after_step(self, done: int, stopping: bool) -> None:
        config, accelerator = self.config, self.accelerator
        accelerator.log({"loss": self.losses[-1], "lr": self.optimizer.param_groups[0]["lr"]}, step=done)
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps or stopping:
            self.good = self._snapshot(done)
            if accelerator.is_main_process:
                self.store.write(self.good)
        if config.preview_steps and done % config.preview_steps == 0 and accelerator.is_main_process:
            with torch.no_grad():
                self.task.preview(accelerator.unwrap_model(self.model), done, self.folder)

    def _check_finite(self, value: float, what: str, step: int, batch: Mapping[str, Any]) -> None:
        if math.isfinite(value):
            return
        good = self.good
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(good.trained[name])
        where = self.store.path(good.step) if good.step else "the untrained adapter"
        raise TrainingError(
            f"The {what} of step {step + 1} is {value}. Nothing of this step was kept: the model holds {where}. The "
            f"batch came from {', '.join(map(str, batch.get('names', ['unnamed examples'])))}. "
            "A lower --learning-rate, or --mixed-precision no, usually helps."
        )

    def _snapshot(self, step: int) -> Checkpoint:
        names = {id(parameter): name for name, parameter in self.trained.items()}
        moments = {
            f"{names[id(parameter)]}::{key}": value.detach().cpu().clone()
            for parameter, state in self.optimizer.optimizer.state.items()
            for key, value in state.items()
        }
        trained = {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        seconds = self._seconds() if step else 0.0
        return Checkpoint(step, trained, moments, self.identity, list(self.losses), seconds, scaler)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step > self.config.max_train_steps:
            raise ConfigError(
                f"The checkpoint is at step {checkpoint.step}, past --max-train-steps {self.config.max_train_steps}."
            )
        missing = set(self.trained) ^ set(checkpoint.trained)
        if missing:
            raise ConfigError(f"The checkpoint trains other parameters than this run, for example {min(missing)!r}.")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(checkpoint.trained[name])
        for key, value in checkpoint.optimizer.items():
            name, _, slot = key.rpartition("::")
            parameter = self.trained[name]
            # Adam keeps its step counter on the CPU, its moments beside the parameter
            self.optimizer.optimizer.state[parameter][slot] = value if value.ndim == 0 else value.to(parameter.device)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.losses, self.seconds_before, self.good = list(checkpoint.losses), checkpoint.seconds, checkpoint

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        known = {id(p) for p in self.trained.values()}
        grouped = [id(p) for group in groups for p in group["params"]]
        if not grouped:
            raise ConfigError("There is nothing to train: no parameter of the model requires a gradient.")
        if set(grouped) != known or len(set(grouped)) != len(grouped):
            raise ConfigError("The optimizer groups must hold every parameter that requires a gradient exactly once.")

    def _bar(self, start: int, progress: bool):
        from tqdm.auto import tqdm

        hidden = not (progress and self.accelerator.is_main_process)
        total = self.config.max_train_steps
        often = 0.3 if sys.stderr.isatty() else 10.0  # seconds; a log file needs no animation
        options = {"desc": "train", "unit": "step", "dynamic_ncols": True, "mininterval": often}
        return tqdm(total=total, initial=start, disable=hidden, **options)

    def _show(self, bar, step: int) -> None:
        recent = self.losses[-20:]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        bar.update(1)


def _accelerator(config: LoopConfig, folder: Path):
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtraError("Training needs accelerate: pip install 'smidgen[diffusion]'") from error
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    trackers = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers,
            project_dir=str(folder),
        )
        if trackers:
            accelerator.init_trackers("smidgen")
        if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("fp16 has no arithmetic on a CPU")
    except (ImportError, ValueError) as error:
        if trackers:
            raise MissingExtraError(f"--report-to {trackers} needs it: pip install {trackers} ({error})") from error
        raise ConfigError(f"--mixed-precision {config.mixed_precision} cannot be used here: {error}") from error
    return accelerator


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The loop seeds torch's global generators each step; the caller finds them as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
