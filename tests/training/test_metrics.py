"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from smidgen.errors import ConfigError
from smidgen.tasks.finetune.measuring import label_scores
from smidgen.training.metrics import CLASSES, NUMBERS, metric

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
    assert metric(name, False, 2)(PREDICTED, TARGET) == pytest.approx(BY_HAND[name])
    assert metric(name, False, 2)(TARGET, TARGET) == 1.0


def test_the_positive_class_is_the_second_label():
    assert metric("f1", False, 2)(np.zeros(4, int), np.array([0, 0, 0, 1])) == 0.0
    assert metric("f1", False, 2)(np.ones(4, int), np.array([0, 0, 0, 1])) == pytest.approx(0.4)


def test_numbers():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 10.0])
    by_hand = (1.5 * 3 + 0.5 * 2 + 0.5 * -1 + 1.5 * 6) / math.sqrt(5 * (9 + 4 + 1 + 36))
    assert metric("pearson", True)(x, y) == pytest.approx(by_hand)
    assert metric("spearman", True)(x, y) == pytest.approx(1.0)
    for name in NUMBERS:
        assert metric(name, True)(np.ones(4), y) == 0.0  # a constant answer tells nothing


@pytest.mark.parametrize("name, regression, classes, message", [
    ("acuracy", False, 2, "Did you mean 'accuracy'"),
    ("pearson", False, 2, "'pearson' is for numbers, these labels are classes"),
    ("f1", True, 0, "'f1' is for classes, these labels are numbers"),
    ("f1", False, 3, "for two classes, the data has 3; use f1_macro"),
])  # fmt: skip
def test_metrics_without_meaning(name, regression, classes, message):
    with pytest.raises(ConfigError, match=message):
        metric(name, regression, classes)


def test_scores_of_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = label_scores("matthews", logits, torch.tensor([0, 1, 1]), False)
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    values = label_scores("pearson", torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0]), True)
    assert values["loss"] == pytest.approx(1 / 3) and 0.9 < values["pearson"] < 1 and "accuracy" not in values
