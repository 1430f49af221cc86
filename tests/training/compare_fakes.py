"""A small experiment, and a stand-in for training whose figures follow from the cell."""

from typing import Any

import numpy as np

from smidgen.lab.compare import answers
from smidgen.lab.compare.cells import Cell
from smidgen.lab.compare.experiment import Claim, Evaluation, Experiment, Method, Round, Search

EXAMPLES = 2_000
BYTES = {"svfit": 1_000, "LoRA": 16_000, "linear probe": 0}
BEST = {"svfit": 1e-1, "LoRA": 1e-3}
RIGHT = {"svfit": 0.84, "LoRA": 0.9, "linear probe": 0.6}  # of the test set's answers


def experiment() -> Experiment:
    """Three methods, two seeds, two rates each; LoRA's best rate lies below its grid."""
    return Experiment(
        name="fake",
        recipe="text-classification",
        settings={
            "model": "debug-text",
            "data": {"path": "debug-text"},
            "train": {"max_train_steps": 6},
        },
        methods=(
            Method("svfit", "svfit", (1e-2, 1e-1), {"r": "full"}),
            Method("LoRA", "peft.LoraConfig", (1e-2, 1e-1), {"r": 2}),
            Method("linear probe", "linear probe"),
        ),
        target_modules=("query", "value"),
        seeds=(0, 1),
        search=Search(seed=100, rounds=(Round(3, 1),), extensions=3),
        evaluation=Evaluation(8, 8),
        budgets=(500, 2_000, 20_000),
        claim=Claim(("svfit",), "LoRA", 16.0),
        cost_steps=1,
    )


class FakeTraining:
    """Figures that peak at the method's best rate, and a list of what was done."""

    def __init__(self, fails: tuple[str, ...] = (), dies_at: int | None = None):
        self.fails, self.dies_at = fails, dies_at
        self.done: list[str] = []

    def __call__(self, cell: Cell) -> dict[str, Any]:
        name = cell.method.name
        if self.dies_at is not None and len(self.done) >= self.dies_at:
            raise KeyboardInterrupt
        self.done.append(cell.label)
        if name in self.fails:
            raise RuntimeError(f"{name} does not fit in memory")
        if cell.stage == "cost":
            return {"peak_memory": 10**9, "step_ratio": 2.0, "cpu_seconds": 1.0}
        loss = 0.5 + 0.1 * abs(_log(cell.rate) - _log(BEST[name])) if name in BEST else 0.9
        found: dict[str, Any] = {
            "metric": "accuracy",
            "greater_is_better": True,
            "train_seconds": 1.0,
            "cpu_seconds": 2.0,
        }
        times = {"created_at": "2026-11-22T00:00:00+00:00", "total_seconds": 3.0}
        if cell.stage == "search":
            return found | times | {"validation": {"accuracy": 1 - loss, "loss": loss}}
        right = np.arange(EXAMPLES) % 100 < 100 * RIGHT[name] + cell.seed  # the same examples for all, as tests are
        losses = np.where(right, 0.1, 2.0) + 0.01 * np.cos(np.arange(EXAMPLES))
        formats = {"float32": 0} if name == "linear probe" else {"float16": BYTES[name], "int4": BYTES[name] // 4}
        found["formats"] = {
            each: {
                "bytes": {"file": size, "config": 0, "adapter": size},
                "validation": {"accuracy": 1 - loss, "loss": loss + (0.001 if each == "int4" else 0)},
                "test": {"accuracy": float(right.mean()), "loss": float(losses.mean())},
                "answers": {"losses": answers.to_text(losses), "scores": answers.to_text(right)},
            }
            for each, size in formats.items()
        }
        return (
            found
            | times
            | {
                "numbers": {"adapter": BYTES[name] // 4, "head": 66, "total": 10_000},
                "head_bytes": 132,
                "train_loss": 0.5,
                "train_tokens": 300,
                "forgetting": {"off": 0.1, "on": 0.2, "change": 0.1},
                "peft_config": {"peft_type": "LORA", "r": 2} if name == "LoRA" else None,
            }
        )


def _log(rate: float) -> float:
    import math

    return math.log10(rate)
