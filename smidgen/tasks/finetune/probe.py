"""A head that starts where a regression on the frozen base's features ends, in place of random numbers.

A fresh head takes most of a short training to be found, and what an adapter adds is hidden behind that. On frozen features the best head is a
convex problem with one answer: logistic regression (of several labels one each, of numbers a ridge regression), its strength
chosen by the loss on validation. That head alone is what any adapter has to beat.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.errors import MissingExtraError
from smidgen.training.frozen import Matmuls, frozen_matmuls
from smidgen.training.metrics import MULTI, REGRESSION

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, on features of mean 0 and deviation 1
MAX_ITERATIONS = 2000
FAR = 1e-3  # relative: how far the last layer's own product may lie from what the model answers
CONSTANT = 6.0  # the logit of a class that train always or never has


@dataclass(frozen=True)
class Probe:
    """A converged head: ``weight`` [class, feature] and ``bias`` [class] of the layer called ``layer``, and what the frozen base
    ``scores`` with it, by split. ``strength`` is the C it was fitted with."""

    layer: str
    weight: Tensor
    bias: Tensor
    strength: float
    scores: Mapping[str, Mapping[str, float]]

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Start the head of ``model``, which has no adapter yet, from this probe."""
        layer: Any = model.get_submodule(self.layer)
        layer.weight.copy_(self.weight)
        layer.bias.copy_(self.bias)


def fit_probe(
    model: nn.Module,
    task: Any,
    heads: Sequence[str],
    scored: Sequence[str] = ("validation",),
    matmuls: Matmuls = "base",
) -> Probe | None:
    """The best head for ``task``, whose last layer lies in one of ``heads``, on the features that ``model`` gives as it is,
    multiplied as ``matmuls`` says; ``scored`` are the splits it is scored on.

    None where there is no head with a bias, or where its last layer's product is not what the model answers.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    name = _last_layer(model, heads)
    if name is None:
        return None
    with _frozen_but(model, heads), frozen_matmuls(model, matmuls), _features(model, name) as features:
        train, held_out = (task.predict(features, split) for split in ("train", "validation"))
        others = {split: held_out if split == "validation" else task.predict(features, split) for split in scored}
    layer: Any = model.get_submodule(name)
    with _frozen_but(model, heads), frozen_matmuls(model, matmuls):
        agrees = _agrees(model, task, layer, held_out)
    if not agrees:
        return None
    weight, bias, strength = _fitted(train, task.labels("train"), held_out, layer.out_features, task)
    scores = {split: task.scores(found @ weight.T + bias, split) for split, found in others.items()}
    return Probe(name, weight, bias, strength, scores)


def _last_layer(model: nn.Module, heads: Sequence[str]) -> str | None:
    """The linear layer that gives the logits: the last one in the heads, with a bias."""
    inside = tuple(f"{name}." for name in heads)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is not None and (name in heads or name.startswith(inside))
    ]
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    fitting = [name for name in linear if model.get_submodule(name).out_features == classes]
    return fitting[-1] if fitting else None


@contextmanager
def _frozen_but(model: nn.Module, heads: Sequence[str]) -> Iterator[None]:
    """Within, only ``heads`` are trained."""
    inside = tuple(f"{name}." for name in heads)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(inside))
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


@contextmanager
def _features(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Within, ``model`` answers what its last layer reads, in place of logits."""
    parent, _, leaf = name.rpartition(".")
    around = model.get_submodule(parent)
    layer = getattr(around, leaf)
    setattr(around, leaf, nn.Identity())
    try:
        yield model
    finally:
        setattr(around, leaf, layer)


@torch.no_grad()
def _agrees(model: nn.Module, task: Any, layer: nn.Linear, features: Tensor) -> bool:
    if features.ndim != 2 or features.shape[1] != layer.in_features:
        return False
    answered = task.predict(model, "validation")
    own = features @ layer.weight.float().cpu().T + layer.bias.float().cpu()
    return own.shape == answered.shape and float((own - answered).norm()) <= FAR * float(answered.norm() + 1e-6)


def _fitted(train: Tensor, labels: Tensor, held_out: Tensor, classes: int, task: Any) -> tuple[Tensor, Tensor, float]:
    """(weight [class, feature], bias [class], C) with the lowest loss on validation."""
    mean, std = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    x, y = ((train.double() - mean) / std).numpy(), labels.numpy()
    best: tuple[float, Tensor, Tensor, float] | None = None
    for strength in STRENGTHS:
        weight, bias = (torch.from_numpy(value) for value in _regression(x, y, classes, strength, task))
        weight = weight / std
        own = weight.float(), (bias - weight @ mean).float()
        loss = float(task.scores(held_out @ own[0].T + own[1], "validation")["loss"])
        if best is None or loss < best[0]:
            best = (loss, *own, strength)
    assert best is not None
    return best[1:]


def _regression(
    x: np.ndarray, y: np.ndarray, classes: int, strength: float, task: Any
) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.linear_model import Ridge
    except ImportError as error:
        raise MissingExtraError("A head from a probe needs scikit-learn: pip install 'smidgen[tasks]'") from error
    if task.problem == REGRESSION:
        found = Ridge(alpha=1 / strength).fit(x, y)
        return found.coef_.reshape(1, -1).astype(float), np.atleast_1d(np.asarray(found.intercept_, dtype=float))
    weights = None if task.weights is None else task.weights.double().numpy()
    if task.problem == MULTI:
        columns = [
            _logistic(x, y[:, at], 2, strength, None if weights is None else np.array([1.0, weights[at]]))
            for at in range(y.shape[1])
        ]
        return np.stack([w[1] - w[0] for w, _ in columns]), np.array([b[1] - b[0] for _, b in columns])
    return _logistic(x, y, classes, strength, weights)


def _logistic(
    x: np.ndarray, y: np.ndarray, classes: int, strength: float, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(weight [class, feature], bias [class]) of a logistic regression; a class without an example is never answered."""
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -CONSTANT)
    there = np.unique(y).astype(int)
    if len(there) == 1:
        bias[there] = CONSTANT
        return weight, bias
    of_class = None if weights is None else {int(at): float(weights[at]) for at in there}
    found = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, class_weight=of_class).fit(x, y)
    if len(there) == 2:  # one row for both
        weight[there[1]], bias[there] = found.coef_[0], (0.0, found.intercept_[0])
    else:
        weight[there], bias[there] = found.coef_, found.intercept_
    return weight, bias
