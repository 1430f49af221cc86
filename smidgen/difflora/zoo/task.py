"""Group training: G adapters at once on one frozen base, as one task of the one loop.

A batch is each person's own batch of ``personalize`` laid end to end, its rows go through the person's own adapter of
the bank, and the loss is the sum over people. Adam works on each number alone and gradients are cut for each adapter
alone, so the group's adapters are those of one-by-one training up to the rounding of a larger batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.tasks.diffusion.task import PersonalizeTask, join


class GroupTask:
    """Batches and loss of several people; satisfies ``smidgen.training.loop.Task``.

    Args:
        people: one task a person, all with the same batch size; equal seeds give common random numbers.

    Trained tensors have a leading axis [people] in this order. The bank's rows must be set (each person ``batch_size``
    times) around the whole training, not only around the loss: gradient checkpointing runs layers again in backward.
    """

    def __init__(self, people: Sequence[PersonalizeTask]) -> None:
        self.people = list(people)
        self.batch_size = self.people[0].batch_size
        self.history: list[Tensor] = []

    def batch(self, index: int) -> dict[str, Any]:
        parts = [task.batch(index) for task in self.people]
        return {key: join([part[key] for part in parts]) for key in parts[0]}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Sum of the adapters' losses; one that is not finite is left out, so that it spoils no other."""
        losses = self.losses(model, batch)
        self.history.append(losses.detach().cpu())
        return torch.where(torch.isfinite(losses), losses, torch.zeros_like(losses)).sum()

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each person's rows [people]."""
        return self.people[0].errors(model, batch).unflatten(0, (len(self.people), self.batch_size)).sum(1)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Cuts each adapter's gradient to ``max_norm`` and drops one that is not finite; the longest norm after that."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients]).norm(dim=0)  # [people]
        good = torch.isfinite(norms)
        all_good = bool(good.all())
        factor = torch.where(good, (max_norm / (norms + 1e-6)).clamp(max=1.0), torch.zeros_like(norms))
        for gradient in gradients:
            gradient.mul_(factor.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1)))
            if not all_good:
                gradient[~good] = 0  # what is not finite stays so when multiplied by zero
        return torch.where(good, norms, torch.zeros_like(norms)).max()

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Nothing to draw while training: the gate draws at the end."""
