"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from smidgen.errors import ConfigError
from smidgen.tasks.finetune.measuring import batch_weight, class_weights, label_loss, label_scores, majority
from smidgen.training.metrics import CLASSES, MULTI, NUMBERS, REGRESSION, SINGLE, metric

PREDICTED = np.array([1, 1, 0, 0, 1, 0])
TARGET = np.array([1, 0, 0, 1, 1, 0])  # 2 true and 1 false positives, 2 true and 1 false negatives
BY_HAND = {
    "accuracy": 4 / 6,
    "f1": 2 * 2 / (2 * 2 + 1 + 1),
    "f1_macro": (2 / 3 + 2 / 3) / 2,
    "matthews": (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    assert metric(name, SINGLE, 2)(PREDICTED, TARGET) == pytest.approx(BY_HAND[name])
    assert metric(name, SINGLE, 2)(TARGET, TARGET) == 1.0


def test_the_positive_class_is_the_second_label():
    assert metric("f1", SINGLE, 2)(np.zeros(4, int), np.array([0, 0, 0, 1])) == 0.0
    assert metric("f1", SINGLE, 2)(np.ones(4, int), np.array([0, 0, 0, 1])) == pytest.approx(0.4)


def test_numbers():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 10.0])
    by_hand = (1.5 * 3 + 0.5 * 2 + 0.5 * -1 + 1.5 * 6) / math.sqrt(5 * (9 + 4 + 1 + 36))
    assert metric("pearson", REGRESSION)(x, y) == pytest.approx(by_hand)
    assert metric("spearman", REGRESSION)(x, y) == pytest.approx(1.0)
    for name in NUMBERS:
        assert metric(name, REGRESSION)(np.ones(4), y) == 0.0  # a constant answer tells nothing


@pytest.mark.parametrize("name, problem, classes, message", [
    ("acuracy", SINGLE, 2, "Did you mean 'accuracy'"),
    ("pearson", SINGLE, 2, "'pearson' is for numbers, these labels are classes"),
    ("f1", REGRESSION, 0, "'f1' is for classes, these labels are numbers"),
    ("f1", SINGLE, 3, "for two classes, the data has 3; use f1_macro"),
    ("accuracy", MULTI, 3, "'accuracy' is for classes, these labels are sets of classes. .*f1_micro, f1_macro, subset_accuracy"),
])  # fmt: skip
def test_metrics_without_meaning(name, problem, classes, message):
    with pytest.raises(ConfigError, match=message):
        metric(name, problem, classes)


def test_scores_of_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = label_scores("matthews", logits, torch.tensor([0, 1, 1]), SINGLE)
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    values = label_scores("pearson", torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0]), REGRESSION)
    assert values["loss"] == pytest.approx(1 / 3) and 0.9 < values["pearson"] < 1 and "accuracy" not in values


def test_scores_of_sets_of_classes():
    logits = torch.tensor([[2.0, -1.0, 3.0], [-1.0, -2.0, -0.5], [1.0, 1.0, -1.0]])
    target = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0]]).float()
    found = label_scores("f1_micro", logits, target, MULTI)
    # 4 decisions say yes, 3 of them rightly, and 1 yes is missed; by class F1 is 2/3, 1 and 2/3
    assert found["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1)) and found["subset_accuracy"] == pytest.approx(
        1 / 3
    )
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3) and "accuracy" not in found
    wrong = torch.where(target > 0, logits, -logits).flatten().tolist()
    assert found["loss"] == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in wrong) / 9, rel=1e-5)


def test_balanced_classes_count_alike():
    """The loss of 3 examples of one class and 1 of another is that of the mean of the two classes' means."""
    labels, logits = torch.tensor([0, 0, 0, 1]), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    weights = class_weights("balanced", labels, SINGLE, 2)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])
    assert float(label_loss(logits, labels, SINGLE, weights)) == pytest.approx(float((each[:3].mean() + each[3]) / 2))
    halves = [
        (label_loss(logits[part], labels[part], SINGLE, weights), batch_weight(labels[part], SINGLE, weights))
        for part in (slice(0, 2), slice(2, 4))
    ]
    together = sum(float(loss) * weight for loss, weight in halves) / sum(weight for _, weight in halves)
    assert together == pytest.approx(
        float(label_loss(logits, labels, SINGLE, weights))
    )  # two small batches are a large one
    assert class_weights("none", labels, SINGLE, 2) is None
    held = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert class_weights("balanced", held[:, [1, 0]], MULTI, 2).tolist() == pytest.approx([1 / 3, 1.0])
    with pytest.raises(ConfigError, match="needs classes, these labels are numbers"):
        class_weights("balanced", labels.float(), REGRESSION, 0)


def test_what_the_commonest_answer_scores():
    said, scores = majority("accuracy", torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1, 1]), SINGLE, ("bad", "good"))
    assert said == "good" and scores == {"accuracy": 0.75}
    train, test = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    said, scores = majority("f1_micro", train, test, MULTI, ("x", "y"))
    assert said == "x" and scores["subset_accuracy"] == 0.5 and scores["f1_micro"] == pytest.approx(2 / 4)
