"""The parts reader: a small network that finds the parts and the landmarks of a drawn portrait.

It scores control by segmentation and by landmarks: what was drawn is read, and compared with what was asked. Trained on
real drawings only, never on what a model drew, by ``python -m smidgen.lab.embedded_base.parts``; no model
is trained or steered by it. Its own accuracy on held-out people stands in its file and in `PartsReader.accuracy`.

Example:
    >>> reader = load_parts_reader()
    >>> labels, points = reader.read([portrait.picture()])
    >>> labels.shape, points.shape
    ((1, 64, 64), (1, 9, 2))
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import world
from smidgen.bases.embedded.judge import FOLDER, Images, as_tensor, load_weights
from smidgen.bases.embedded.pose import LANDMARKS, PARTS

FILE = FOLDER / "parts.safetensors"


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class PartsNetwork(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> part logits [n, 8, 64, 64] and landmarks [n, 9, 2] in pixels. 0.3 M numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.PixelUnshuffle(2), _block(12, 24), _block(24, 24))
        self.second = nn.Sequential(_block(24, 48, 2), _block(48, 48))
        self.third = nn.Sequential(_block(48, 64, 2), _block(64, 64))
        self.up_second = _block(64 + 48, 48)
        self.up_first = nn.Sequential(_block(48 + 24, 32), nn.Conv2d(32, 4 * len(PARTS), 1), nn.PixelShuffle(2))
        self.points = nn.Sequential(
            _block(64, 32, 2), nn.Flatten(), nn.Linear(32 * 16, 96), nn.ReLU(), nn.Linear(96, 2 * len(LANDMARKS))
        )

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(pictures)
        second = self.second(first)
        third = self.third(second)
        found = self.up_second(torch.cat([_twice(third), second], 1))
        points = self.points(third).unflatten(-1, (len(LANDMARKS), 2))
        return self.up_first(torch.cat([_twice(found), first], 1)), (points + 1) * world.SIZE / 2


def _twice(features: Tensor) -> Tensor:
    return nn.functional.interpolate(features, scale_factor=2, mode="nearest")


class PartsReader:
    """Reads pictures. ``accuracy`` on real drawings of held-out people: ``miou`` and ``pixels`` (share of pixels) of
    the parts, ``landmarks`` (mean distance in pixels)."""

    def __init__(self, network: PartsNetwork, accuracy: dict[str, float]):
        self.network, self.accuracy = network.eval(), accuracy

    @torch.no_grad()
    def read(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n, 64, 64] (places in `PARTS`) and landmarks [n, 9, 2] in pixels."""
        parts = [self.network(batch) for batch in as_tensor(images).split(64)]
        labels = torch.cat([logits.argmax(1) for logits, _ in parts])
        return labels.to(torch.uint8).numpy(), torch.cat([points for _, points in parts]).numpy()


@cache
def load_parts_reader(path: Path = FILE) -> PartsReader:
    """The shipped reader, in fp32 on the CPU; loaded once."""
    network = PartsNetwork()
    accuracy = load_weights(path, network, ".parts")
    return PartsReader(network, {name: float(value) for name, value in accuracy.items()})
