"""A small experiment, and a stand-in for training whose figures follow from the cell."""

from typing import Any

from smidgen.lab.compare.cells import Cell
from smidgen.lab.compare.experiment import Claim, Evaluation, Experiment, Method, Search

BYTES = {"svfit": 1_000, "LoRA": 16_000, "linear probe": 0}
BEST = {"svfit": 1e-1, "LoRA": 1e-3, "linear probe": 1e-2}


def experiment() -> Experiment:
    """Three methods, two seeds, two rates each; LoRA's best rate lies below its grid."""
    return Experiment(
        name="fake",
        recipe="text-classification",
        settings={
            "model": "debug-text",
            "data": {"path": "debug-text"},
            "train": {"max_train_steps": 6, "eval_steps": 3},
        },
        methods=(
            Method("svfit", "svfit", (1e-2, 1e-1), {"r": "full"}),
            Method("LoRA", "peft.LoraConfig", (1e-2, 1e-1), {"r": 2}),
            Method("linear probe", "linear probe", (1e-3, 1e-2)),
        ),
        target_modules=("query", "value"),
        seeds=(0, 1),
        search=Search(seed=100, steps=3, extensions=2),
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
        off = abs(_log(cell.rate) - _log(BEST[name]))
        score = 0.8 - 0.1 * off + 0.01 * cell.seed / 100 + BYTES[name] * 1e-6
        found: dict[str, Any] = {
            "metric": "accuracy",
            "greater_is_better": True,
            "scores": {"validation": score, "test": score - 0.05 + 0.002 * cell.seed},
            "validation": {"accuracy": score, "loss": 1 - score},
            "evaluations": [{"step": 3, "accuracy": score - 0.1}, {"step": 6, "accuracy": score}],
            "numbers": {"adapter": BYTES[name] // 4, "head": 66, "total": 10_000},
            "bytes": {"file": BYTES[name], "config": 0, "head": 264, "adapter": BYTES[name]},
            "best_step": 6,
            "train_loss": 0.5,
            "train_tokens": 300,
            "train_seconds": 1.0,
            "cpu_seconds": 2.0,
            "forgetting": {"off": 0.1, "on": 0.2, "change": 0.1},
            "peft_config": {"peft_type": "LORA", "r": 2} if name == "LoRA" else None,
        }
        return found | {"created_at": "2026-11-22T00:00:00+00:00", "total_seconds": 3.0}


def _log(rate: float) -> float:
    import math

    return math.log10(rate)
