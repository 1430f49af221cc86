"""Metrics by name. Each takes predictions and targets, [example] or [example, class] of 0 and 1, and is better when greater."""

from collections.abc import Callable

import numpy as np

from smidgen.errors import ConfigError, MissingExtraError, did_you_mean

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """Share of right answers."""
    return float((predicted == target).mean())


def f1(predicted: np.ndarray, target: np.ndarray) -> float:
    """F1 of class 1, the second label, of two (as GLUE has it)."""
    return float(_sklearn().f1_score(target, predicted, pos_label=1, average="binary", zero_division=0))


def f1_macro(predicted: np.ndarray, target: np.ndarray) -> float:
    """Mean F1 over the classes, each counting alike."""
    return float(_sklearn().f1_score(target, predicted, average="macro", zero_division=0))


def matthews(predicted: np.ndarray, target: np.ndarray) -> float:
    """Matthews' correlation, -1 to 1; 0 for a constant answer."""
    return float(_sklearn().matthews_corrcoef(target, predicted))


def pearson(predicted: np.ndarray, target: np.ndarray) -> float:
    """Pearson's correlation of numbers, -1 to 1; 0 for a constant answer."""
    return _correlation("pearsonr", predicted, target)


def spearman(predicted: np.ndarray, target: np.ndarray) -> float:
    """Spearman's rank correlation of numbers, -1 to 1; 0 for a constant answer."""
    return _correlation("spearmanr", predicted, target)


def f1_micro(predicted: np.ndarray, target: np.ndarray) -> float:
    """F1 over all decisions, each counting alike."""
    return float(_sklearn().f1_score(target, predicted, average="micro", zero_division=0))


def subset_accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """Share of examples all of whose classes [example, class] are right."""
    return float((predicted == target).all(-1).mean())


REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)  # transformers' terms
CLASSES: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "f1_macro": f1_macro, "matthews": matthews}
NUMBERS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}
SETS: dict[str, Metric] = {"f1_micro": f1_micro, "f1_macro": f1_macro, "subset_accuracy": subset_accuracy}
_KNOWN = {REGRESSION: ("numbers", NUMBERS), SINGLE: ("classes", CLASSES), MULTI: ("sets of classes", SETS)}
DEFAULTS = {REGRESSION: "pearson", SINGLE: "accuracy", MULTI: "f1_micro"}


def metric(name: str, problem: str, classes: int = 0) -> Metric:
    """The metric called ``name`` for a problem (REGRESSION, SINGLE or MULTI).

    Raises:
        ConfigError: no such metric, or one that means nothing for these labels.
    """
    kind, known = _KNOWN[problem]
    if name not in known:
        of = next((kind for kind, metrics in _KNOWN.values() if name in metrics), None)
        why = f"Metric {name!r} is for {of}, these labels are {kind}."
        text = why if of else f"There is no metric {name!r}.{did_you_mean(name, known)}"
        raise ConfigError(f"{text} For {kind} there are: {', '.join(known)}.")
    if name == "f1" and classes > 2:
        raise ConfigError(f"Metric 'f1' is for two classes, the data has {classes}; use f1_macro.")
    return known[name]


def _correlation(name: str, predicted: np.ndarray, target: np.ndarray) -> float:
    if len(target) < 2 or np.ptp(predicted) == 0 or np.ptp(target) == 0:
        return 0.0
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("This metric needs scipy: pip install 'smidgen[tasks]'") from error
    return float(getattr(stats, name)(predicted, target).statistic)


def _sklearn():
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError("This metric needs scikit-learn: pip install 'smidgen[tasks]'") from error
    return metrics
