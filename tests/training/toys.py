"""A toy task for the loop: fit a line through the origin, with a batch that follows from its number."""

import torch
from torch import nn

from smidgen.training.randomness import stream


class Line:
    """Learn w in y = 3x; ``poison`` names batches that hold NaN."""

    def __init__(self, seed: int = 0, poison: frozenset[int] = frozenset(), on_batch=None):
        self.seed, self.poison, self.on_batch, self.seen = seed, poison, on_batch, []
        self.previews: list[int] = []

    def batch(self, index):
        self.seen.append(index)
        if self.on_batch:
            self.on_batch(index)
        x = torch.randn(8, 2, generator=stream(self.seed, "x", index))
        if index in self.poison:
            x[0, 0] = float("nan")
        return {"x": x, "y": 3 * x, "names": [f"row {index}"]}

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    def preview(self, model, step, folder):
        self.previews.append(step)


class Judged(Line):
    """A line that is judged by another one, y = 1.5x: training passes it and leaves it behind."""

    metric, greater_is_better = "error", False

    def evaluate(self, model):
        assert not model.training and not torch.is_grad_enabled()
        x = torch.randn(32, 2, generator=stream(self.seed, "held out"))
        return {"error": (model(x) - 1.5 * x).square().mean(), "size": 32}


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(2, 4), nn.Dropout(dropout), nn.Linear(4, 2))


def groups(module: nn.Module, lr: float = 0.02):
    return [{"params": list(module.parameters()), "lr": lr, "weight_decay": 0.01}]


def bits(module: nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())
