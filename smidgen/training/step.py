"""One optimizer step: micro-batches and processes combined in the proportion of their weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import TrainingError
from smidgen.training.processes import gathered, sum_gradients
from smidgen.training.randomness import derive
from smidgen.training.reach import Reach

Batch = Mapping[str, Any]


class NotFinite(Exception):
    """A loss or gradient norm that is NaN or infinite; ``names`` are the files of the batches that gave it."""

    def __init__(self, what: str, value: float, names: Sequence[str]):
        super().__init__(f"{what} is {value}")
        self.what, self.value, self.names = what, value, names


class Stepper:
    """Takes the optimizer steps of one run, for a model and an optimizer that ``accelerator`` prepared."""

    def __init__(
        self, accelerator: Any, task: Any, model: nn.Module, optimizer: Any, trained: Mapping[str, nn.Parameter]
    ):
        self.accelerator, self.task, self.model, self.optimizer = accelerator, task, model, optimizer
        self.trained = list(trained.values())
        self.reach = Reach(accelerator, model, trained)
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]

    def __call__(
        self, step: int, factor: float, max_grad_norm: float, seed: int, received: Callable[[], int]
    ) -> tuple[float, int]:
        """Train step number ``step`` with learning rates times ``factor``.

        Returns the loss, the mean over all batches by weight, and the signal that any process has ``received`` (0:
        none): both are the same on every process. Raises NotFinite on every process before anything is changed, and
        TrainingError when the loss does not reach a trained layer.
        """
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        indices = self._indices(step)
        batches = [self._draw(index, seed) for index in indices]
        shares = self._shares(batches, step)
        mean, bad = 0.0, []
        for index, batch, share in zip(indices, batches, shares, strict=True):
            self._seed(derive(seed, "model", index))  # dropout and the like
            value = self._backward(batch, share)
            mean += value * share
            bad += [] if math.isfinite(value) else _names(batch)
        rows = gathered(self.accelerator, [mean, received()])
        mean = sum(row[0] for row in rows)
        if not math.isfinite(mean):
            self._refuse("loss", mean, bad)
        sum_gradients(self.accelerator, self.trained)
        self._check_reach()
        norm = self._clip(max_grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):  # fp16's scaler skips such a step by itself
            self._refuse("gradient norm", float(norm), [name for batch in batches for name in _names(batch)])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, int(max(row[1] for row in rows))

    def _indices(self, step: int) -> range:
        """Numbers of this process's batches: those of one part lie side by side over the processes."""
        parts, processes = self.accelerator.gradient_accumulation_steps, self.accelerator.num_processes
        first = step * parts * processes + self.accelerator.process_index
        return range(first, first + parts * processes, processes)

    def _draw(self, index: int, seed: int) -> Batch:
        self._seed(derive(seed, "model", index))
        return self.task.batch(index)

    def _seed(self, number: int) -> None:
        """Seeds torch's generators; on the CPU its own alone, as torch takes a slow stack trace for a GPU to come."""
        on_cpu = self.accelerator.device.type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(number)

    def _shares(self, batches: Sequence[Batch], step: int) -> list[float]:
        """The share of each of this process's batches in the step; over all processes they sum to 1."""
        weights = [float(batch.get("weight", 1.0)) for batch in batches]
        rows = gathered(self.accelerator, weights)
        total = sum(sum(row) for row in rows)
        if min(min(row) for row in rows) < 0 or not 0 < total < math.inf:
            raise TrainingError(
                f"The batches of step {step + 1} weigh {rows}. A weight is how many items a loss is the mean over: "
                "none may be negative, and there must be something to learn."
            )
        return [weight / total for weight in weights]

    def _backward(self, batch: Batch, share: float) -> float:
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                loss = self.task.loss(self.model, _to(batch, accelerator.device))
            if not loss.requires_grad:
                raise self.reach.nothing()
            accelerator.backward(loss * (share * accelerator.gradient_accumulation_steps))  # which divides by the parts
        return float(loss.detach())

    def _check_reach(self) -> None:
        try:
            self.reach.check()
        except TrainingError:
            self.optimizer.zero_grad()
            raise

    def _clip(self, most: float) -> Tensor:
        """The gradient's norm; a task that trains many adapters at once cuts each of them alone."""
        own = getattr(self.task, "clip_gradients", None)
        if own is None:
            return self.accelerator.clip_grad_norm_(self.trained, most)  # type: ignore[no-any-return]
        self.accelerator.unscale_gradients(self.optimizer)
        return own(self.trained, most)  # type: ignore[no-any-return]

    def _refuse(self, what: str, value: float, names: Sequence[str]) -> None:
        self.optimizer.zero_grad()
        raise NotFinite(what, value, names or ["another process"])


def _names(batch: Batch) -> list[str]:
    return [str(name) for name in batch.get("names", ["unnamed examples"])]


def _to(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
