"""Mixed image features: what two frozen encoders see of a person's photos, fused by a gate into one condition.

DiffLoRA (arXiv 2408.06740, figure 5): f' = MLP_f(face), g' = MLP_g(image), (a, b) = Gate([face; image]),
mixed = a f' + b g', with a softmax over the two, which the paper leaves open. Several photos: the mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Gate = Literal["softmax", "sigmoid"]


class MixedImageFeatures(nn.Module):
    """Features of photos -> condition [n, width].

    Args:
        face, image: widths of the encoders' features.
        width: of the condition.
        gate: ``softmax`` shares that sum to one, ``sigmoid`` each by itself.
    """

    face_mean: Tensor
    face_width: Tensor
    image_mean: Tensor
    image_width: Tensor

    def __init__(self, face: int, image: int, width: int, gate: Gate = "softmax") -> None:
        super().__init__()
        for name, size in (("face", face), ("image", image)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_width", torch.ones(size))
        self.face, self.image = _expert(face, width), _expert(image, width)
        self.gate = nn.Linear(face + image, 2)
        self.kind = gate

    @torch.no_grad()
    def standardise(self, face: Tensor, image: Tensor) -> None:
        """Keeps mean and deviation of the training photos' features [n, size]."""
        for name, values in (("face", face), ("image", image)):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_width").copy_(values.std(0).clamp(min=1e-4))

    def forward(self, face: Tensor, image: Tensor) -> Tensor:
        """``face`` [n, photos, size] and ``image`` [n, photos, size] -> [n, width]."""
        face = (face - self.face_mean) / self.face_width
        image = (image - self.image_mean) / self.image_width
        shares = self.shares(face, image)
        mixed = shares[..., :1] * self.face(face) + shares[..., 1:] * self.image(image)
        return mixed.mean(1)

    def shares(self, face: Tensor, image: Tensor) -> Tensor:
        """(a, b) [..., 2] of standardised features."""
        scores = self.gate(torch.cat([face, image], -1))
        return scores.softmax(-1) if self.kind == "softmax" else scores.sigmoid()


def _expert(size: int, width: int) -> nn.Sequential:
    """Its answer has deviation one, so that photos are heard beside the noise from the first step on."""
    return nn.Sequential(nn.Linear(size, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.LayerNorm(width))
