"""What evaluations decide: which one is the best, and when to stop. Pure functions of the history.

An evaluation is ``{"step": n, **metrics}``, a history a list of them by ascending step. Ties go to the earlier one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.errors import ConfigError, TrainingError, did_you_mean

Evaluation = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """The metric that evaluations are judged by.

    Example:
        >>> history = [{"step": 0, "loss": 3.0}, {"step": 5, "loss": 2.0}, {"step": 10, "loss": 2.0}]
        >>> Criterion("loss", greater_is_better=False).best_step(history)
        5
    """

    metric: str
    greater_is_better: bool

    def best_step(self, history: Sequence[Evaluation]) -> int | None:
        """The step of the best evaluation; None for an empty history."""
        sign = 1 if self.greater_is_better else -1
        found = max(history, key=lambda evaluation: sign * evaluation[self.metric], default=None)
        return None if found is None else int(found["step"])

    def exhausted(self, history: Sequence[Evaluation], patience: int) -> bool:
        """Have ``patience`` evaluations passed since the best one? Never with patience 0."""
        best = self.best_step(history)
        return 0 < patience <= sum(evaluation["step"] > best for evaluation in history) if history else False

    def needed(self, history: Sequence[Evaluation], steps: Iterable[int]) -> set[int]:
        """The best steps as they were known at each of ``steps``: what must be kept to go on from any of them."""
        known = (self.best_step([entry for entry in history if entry["step"] <= step]) for step in steps)
        return {step for step in known if step is not None}


def criterion(task: Any) -> Criterion:
    """What ``task`` is judged by. ConfigError when it cannot be evaluated."""
    missing = [name for name in ("metric", "greater_is_better", "evaluate") if not hasattr(task, name)]
    if missing:
        raise ConfigError(
            f"eval_steps is set, but {type(task).__name__} cannot be evaluated: it has no {', no '.join(missing)}. "
            "Set eval_steps to 0 or give the task what is missing."
        )
    return Criterion(task.metric, bool(task.greater_is_better))


def measured(metrics: Mapping[str, float], judge: Criterion, step: int) -> Evaluation:
    """The evaluation of ``step`` from what a task measured.

    ConfigError when the judged metric is missing, TrainingError when it is not finite.
    """
    if judge.metric not in metrics:
        raise ConfigError(
            f"The evaluation of step {step} holds no {judge.metric!r}, only {', '.join(map(repr, metrics)) or 'nothing'}."
            + did_you_mean(judge.metric, metrics)
        )
    if "step" in metrics:
        raise ConfigError("A metric cannot be called 'step': that is what the history calls the step itself.")
    if not math.isfinite(metrics[judge.metric]):
        raise TrainingError(
            f"The evaluation of step {step} measured {judge.metric} = {metrics[judge.metric]}; the best step cannot be "
            "told by that. A lower learning rate, or mixed_precision no, usually helps."
        )
    return {"step": step, **metrics}
