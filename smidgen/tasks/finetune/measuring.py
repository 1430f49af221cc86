"""What the tasks' evaluations share: their course, a model at rest, its precision, and the scores of a classifier's outputs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.errors import ConfigError
from smidgen.training.metrics import accuracy, metric


class Measured(ABC):
    """A task that is measured by what it predicts on a split."""

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:  # noqa: B027 - rightly empty
        """Nothing to look at: evaluations say it in numbers."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The scores on the validation split."""
        return self.evaluate_split(model, "validation")

    def evaluate_split(self, model: nn.Module, split: str) -> dict[str, float]:
        """The same on any split."""
        return self.scores(self.predict(model, split), split)

    @abstractmethod
    def predict(self, model: nn.Module, split: str) -> Tensor:
        """What the model says of a split, on the CPU."""

    @abstractmethod
    def scores(self, predicted: Tensor, split: str) -> dict[str, float]:
        """The scores of what :meth:`predict` gave."""


@contextmanager
def at_rest(model: nn.Module) -> Iterator[torch.device]:
    """Within: eval mode and no gradients; yields the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


@contextmanager
def mixed(model: nn.Module) -> Iterator[None]:
    """Autocast when the base is stored in 16 bits and what is trained in 32: the two must meet in one product."""
    first = next(model.parameters())
    if first.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(first.device.type, dtype=first.dtype):
            yield
    else:
        yield


def label_loss(logits: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Mean cross-entropy of logits [example, class], or mean squared error of values [example, 1]."""
    if regression:
        return F.mse_loss(logits.float().squeeze(-1), labels.float())
    return F.cross_entropy(logits.float(), labels.long())


def label_scores(name: str, logits: Tensor, labels: Tensor, regression: bool) -> dict[str, float]:
    """The metric called ``name``, the loss, and for classes the accuracy, of logits [example, class]."""
    found = {"loss": float(label_loss(logits, labels, regression))}
    measure = metric(name, regression, classes=logits.shape[-1])
    target = labels.cpu().numpy()
    predicted = (logits.squeeze(-1) if regression else logits.argmax(-1)).float().cpu().numpy()
    if not regression:
        predicted, target = predicted.astype(int), target.astype(int)
        found["accuracy"] = accuracy(predicted, target)
    return {name: measure(predicted, target)} | found


def check_length(max_length: int, tokenizer: Any, config: Any) -> None:
    """Refuse a ``max_length`` beyond what the model has positions for."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    most = min((int(limit) for limit in limits if limit and limit < 10**6), default=None)
    if max_length < 4 or (most is not None and max_length > most):
        raise ConfigError(f"max_length must be from 4 to {most or 'any'} (what the model can read), not {max_length}.")
