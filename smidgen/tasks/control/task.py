"""The task of control: teach a text-to-image UNet, with its hint encoder, to draw what a control picture shows.

As personalisation (latents and prompts encoded once, one mean squared error), but each picture of a batch comes with
its control picture. Control decides the layout, and layout is decided at high noise; so noise levels are drawn denser
there, by T2I-Adapter's cubic rule t = 1 - u^3 (Mou et al. 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import DataError
from smidgen.tasks.control.hint import steering
from smidgen.tasks.diffusion.task import PersonalizeTask


@dataclass
class ControlTask(PersonalizeTask):
    """Batches and loss over encoded pictures and their ``controls`` [n, 3, height, width] (uint8)."""

    controls: Tensor | None = None
    cubic: bool = True  # denser timesteps at high noise

    def __post_init__(self) -> None:
        if self.controls is None or len(self.controls) != len(self.subject):
            count = 0 if self.controls is None else len(self.controls)
            raise DataError(f"{len(self.subject)} pictures need as many control pictures, not {count}.")

    def batch(self, index: int) -> dict[str, Any]:
        _, picks, _ = self.subject.picked(self.seed, index, self.batch_size)
        return super().batch(index) | {"control": self.controls[picks].float() / 255}  # type: ignore[index]

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with steering(model, batch["control"]):
            return super().loss(model, batch)

    def quantiles(self, count: int, noise: torch.Generator) -> Tensor:
        even = super().quantiles(count, noise)
        return 1 - even**3 if self.cubic else even
