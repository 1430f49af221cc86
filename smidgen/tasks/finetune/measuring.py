"""What the tasks' evaluations share: their course, a model at rest, its precision, and the scores of a classifier's outputs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.errors import ConfigError
from smidgen.training.metrics import MULTI, REGRESSION, SETS, SINGLE, Metric, accuracy, metric


class Measured(ABC):
    """A task that is measured by what it predicts on a split.

    ``lower`` is what is known of the model's lower layers (``lower.Lower``), while it is.
    """

    lower: Any = None

    def reading(
        self, split: str, picks: Sequence[int] | None, lengths: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Around a call of the model on the examples ``picks`` of ``split``; None where they are not as they lie there."""
        if self.lower is None or picks is None:
            return nullcontext()
        return self.lower.reading(split, picks, lengths)  # type: ignore[no-any-return]

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

    @abstractmethod
    def answers(self, predicted: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """Of what :meth:`predict` gave the loss of each example, the less the better, and how right it is, the more the better."""


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


def label_tensor(labels: Sequence[Any], problem: str, classes: int) -> Tensor:
    """Labels as the loss takes them: values or class numbers [example], or 0 and 1 [example, class]."""
    if problem == MULTI:
        hot = torch.zeros(len(labels), classes)
        for row, held in enumerate(labels):
            hot[row, list(held)] = 1.0
        return hot
    return torch.tensor(labels, dtype=torch.float32 if problem == REGRESSION else torch.long)


def label_loss(logits: Tensor, labels: Tensor, problem: str, weights: Tensor | None = None) -> Tensor:
    """Of logits [example, class] the mean cross-entropy, for several classes at once the mean binary one, or of values
    [example, 1] the mean squared error. ``weights`` [class] as :func:`class_weights` gives them."""
    weights = weights.to(logits.device) if weights is not None else None
    if problem == REGRESSION:
        return F.mse_loss(logits.float().squeeze(-1), labels.float())
    if problem == MULTI:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weights)
    return F.cross_entropy(logits.float(), labels.long(), weight=weights)


def class_weights(how: str, labels: Tensor, problem: str, classes: int) -> Tensor | None:
    """Weights [class] that make each class of ``labels`` count alike ("balanced"), or None ("none").

    One class an example: examples / (classes * examples of the class), as scikit-learn has it. Several: the weight of a
    class that holds, examples without it / examples with it. A class without examples weighs 1.
    """
    if how == "none":
        return None
    if problem == REGRESSION:
        raise ConfigError("class_weights 'balanced' needs classes, these labels are numbers; leave it out.")
    if problem == MULTI:
        held = labels.sum(0)
        return torch.where(held > 0, (len(labels) - held) / held.clamp(min=1), 1.0)
    counts = torch.bincount(labels, minlength=classes).float()
    return torch.where(counts > 0, len(labels) / (classes * counts.clamp(min=1)), 1.0)


def batch_weight(labels: Tensor, problem: str, weights: Tensor | None) -> float:
    """What a batch counts beside others, so that small ones add up to a large one: its examples, weighted as the loss is."""
    return float(weights[labels].sum()) if weights is not None and problem == SINGLE else float(len(labels))


def label_scores(name: str, logits: Tensor, labels: Tensor, problem: str) -> dict[str, float]:
    """The metric called ``name``, the loss, and the accuracy for classes or every metric for sets of them, of logits
    [example, class]."""
    found = {"loss": float(label_loss(logits, labels, problem))}
    return measured(name, predicted_labels(logits, problem), labels, problem, logits.shape[-1]) | found


def label_answers(logits: Tensor, labels: Tensor, problem: str) -> tuple[Tensor, Tensor]:
    """Of each example the loss, unweighted, and whether it was answered right (all classes of a set; of a value minus the
    squared error): what comparisons pair, [example] both, in fp64."""
    logits = logits.double()
    if problem == REGRESSION:
        off = (logits.squeeze(-1) - labels.double()) ** 2
        return off, -off
    right = predicted_labels(logits, problem) == labels
    if problem == MULTI:
        losses = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
        return losses.mean(-1), right.all(-1).double()
    return F.cross_entropy(logits, labels.long(), reduction="none"), right.double()


def predicted_labels(logits: Tensor, problem: str) -> Tensor:
    """Values or class numbers [example], or 0 and 1 [example, class]: a class holds when its probability is above 1/2."""
    if problem == REGRESSION:
        return logits.squeeze(-1).float()
    return (logits > 0).long() if problem == MULTI else logits.argmax(-1)


def measured(name: str, predicted: Tensor, labels: Tensor, problem: str, classes: int) -> dict[str, float]:
    """The metrics of predictions, as :func:`label_scores` names them."""
    others: dict[str, dict[str, Metric]] = {SINGLE: {"accuracy": accuracy}, MULTI: SETS}
    measures = {name: metric(name, problem, classes)} | others.get(problem, {})
    target = labels.cpu().numpy() if problem == REGRESSION else labels.cpu().long().numpy()
    return {key: measure(predicted.cpu().numpy(), target) for key, measure in measures.items()}


def majority(
    name: str, train: Tensor, test: Tensor, problem: str, labels: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """What always giving the commonest answer of ``train`` would score on ``test``, and which answer that is."""
    if problem == REGRESSION:
        return "", {}
    if problem == MULTI:
        usual = (train.mean(0) > 0.5).long()
        said = " and ".join(label for label, holds in zip(labels, usual, strict=True) if holds) or "none"
        return said, measured(name, usual.expand(len(test), -1), test, problem, len(labels))
    common = torch.bincount(train, minlength=len(labels)).argmax()
    return labels[int(common)], measured(name, common.expand(len(test)), test, problem, len(labels))


def check_length(max_length: int, tokenizer: Any, config: Any) -> None:
    """Refuse a ``max_length`` beyond what the model has positions for."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    most = min((int(limit) for limit in limits if limit and limit < 10**6), default=None)
    if max_length < 4 or (most is not None and max_length > most):
        raise ConfigError(f"max_length must be from 4 to {most or 'any'} (what the model can read), not {max_length}.")
