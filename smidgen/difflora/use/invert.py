"""Inversion: one photo by coefficients. The latent alone is trained by the denoising loss on the photo.

weights2weights (Dravid et al. 2024, arXiv 2406.09413, section 4.3) starts from the mean adapter, with Adam at rate 0.1 for at most 400
steps on coefficients of variance one. From a prediction a few careful steps do. The result lies in the space of the generator's people,
so it can be edited and blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.generator import Generator
from smidgen.difflora.use.refine import CAPTION, PhotoTask, descend, photo_task
from smidgen.errors import ConfigError
from smidgen.training.ranges import check

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Invert:
    """How the latent is found."""

    invert_steps: int = 30  # optimizer steps; from the mean adapter about ten times as many
    invert_rate: float = 0.03  # learning rate, in the size of a number of the predicted latent
    invert_batch: int = 4  # noised copies of the photos in a step
    anchor: float = 0.0  # weight of the squared distance to where it started
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)
        if self.invert_steps < 1 or self.invert_batch < 1 or not self.invert_rate > 0 or self.anchor < 0:
            raise ConfigError(
                f"invert_steps={self.invert_steps}, invert_batch={self.invert_batch}: at least 1; "
                f"invert_rate={self.invert_rate}: above 0; anchor={self.anchor}: at least 0."
            )


def invert(
    generator: Generator,
    pipeline: AdaptedPipeline,
    photos: Sequence[Image],
    config: Invert | None = None,
    captions: Sequence[str] | None = None,
    from_prediction: bool = True,
    progress: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """The latent [size] with which the base denoises ``photos`` best, and the one from which it was sought: the prediction, or the
    latent 0, which is the mean adapter.

    Raises:
        DataError: no photo, or one without a face (``names`` are what to call them).
        TrainingError: the loss is not finite.
    """
    config = config or Invert()
    predicted = generator.latents(generator.condition(photos, names), [config.seed])[0]
    start = predicted if from_prediction else torch.zeros_like(predicted)
    pictures = photo_task(pipeline, photos, captions or [CAPTION] * len(photos), config.invert_batch, config.seed)
    with pipeline.banked(generator.layout) as bank:
        model = _Coefficients(generator, start).to(pipeline.base.device)
        task = PhotoTask(pipeline, bank, generator.layout, [pictures], config.anchor)
        size = float(predicted.square().mean().sqrt()) or 1.0  # an untrained generator predicts zeros
        descend(task, model, config.invert_rate * size, config.invert_steps, config.seed, progress)
    return (model.start + model.change).detach()[0].cpu(), start


class _Coefficients(nn.Module):
    """Rows [1, numbers] of the latent start + change [1, size]."""

    start: Tensor

    def __init__(self, generator: Generator, start: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(1, len(start)))
        self.register_buffer("start", start[None].clone())
        self._codec = generator.codec

    def forward(self) -> Tensor:
        latents = (self.start + self.change).reshape(-1, *self._codec.latent_shape)
        return self._codec.decode(latents).float()

    def distances(self) -> Tensor:
        """Squared distance from the start [1]."""
        return self.change.square().sum(1)
