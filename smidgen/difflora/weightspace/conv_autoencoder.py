"""The paper's LoRA-weight autoencoder (LAE): a row as a signal of one channel through strided 1-D convolutions.

DiffLoRA (arXiv 2408.06740): "1-D convolutions ... reconstruction loss and weight-preserve loss". Sizes are not
published; the form follows the authors' prototype: Conv1d stages with
InstanceNorm and LeakyReLU, a tanh latent with noise, clamped to [-1, 1].

    size -> padded to length x stride^stages -> latent [latent_channels, length]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.learned import Autoencoder, LearnedCodec
from smidgen.difflora.weightspace.normalise import Mode
from smidgen.errors import ConfigError


class ConvAutoencoder(LearnedCodec):
    """Args: ``channels`` of the stages, ``stride`` of each, ``latent_channels``."""

    name = "conv_autoencoder"

    def __init__(
        self,
        layout: Layout,
        normalise: Mode = "tensor",
        channels: tuple[int, ...] = (16, 32, 64),
        stride: int = 4,
        latent_channels: int = 4,
        fit: Any = None,
    ) -> None:
        if not channels or min(channels) < 1 or stride < 2 or latent_channels < 1:
            raise ConfigError(
                f"channels={channels}, stride={stride}, latent_channels={latent_channels}: at least one stage, stride 2 "
                "or more and one latent channel are needed."
            )
        self.channels, self.stride, self.latent_channels = tuple(channels), stride, latent_channels
        super().__init__(layout, normalise, fit)

    def settings(self) -> dict[str, Any]:
        own = {"channels": list(self.channels), "stride": self.stride, "latent_channels": self.latent_channels}
        return own | {"fit": dict(vars(self.training))}

    def _network(self) -> Autoencoder:
        return _Network(self.layout.size, self.channels, self.stride, self.latent_channels)


class _Network(Autoencoder):
    def __init__(self, size: int, channels: tuple[int, ...], stride: int, latent_channels: int) -> None:
        super().__init__()
        self.size = size
        step = stride ** len(channels)
        self.length = -(-size // step)  # of the latent
        self.padding = self.length * step - size
        if self.length < 2:
            raise ConfigError(
                f"{len(channels)} stages of stride {stride} leave {self.length} position of {size} numbers, and "
                "InstanceNorm needs two; use fewer stages or a smaller stride."
            )
        kernel, margin = 2 * stride, stride // 2
        extra = stride % 2  # an odd stride leaves one sample over in the transposed convolution
        down: list[nn.Module] = []
        up: list[nn.Module] = [nn.Conv1d(latent_channels, channels[-1], 3, padding=1)]
        for inputs, outputs in zip((1, *channels[:-1]), channels, strict=True):
            down += [nn.Conv1d(inputs, outputs, kernel, stride, margin + extra), _norm(outputs), nn.LeakyReLU(0.2)]
        for inputs, outputs in zip(channels[::-1], (*channels[-2::-1], 1), strict=True):
            up += [_norm(inputs), nn.LeakyReLU(0.2)]
            up += [nn.ConvTranspose1d(inputs, outputs, kernel, stride, margin + extra, output_padding=extra)]
        self.down = nn.Sequential(*down, nn.Conv1d(channels[-1], latent_channels, 3, padding=1), nn.Tanh())
        self.up = nn.Sequential(*up)

    def encode(self, rows: Tensor) -> Tensor:
        return self.down(F.pad(rows, (0, self.padding))[:, None])  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return self.up(latents)[:, 0, : self.size]  # type: ignore[no-any-return]

    def noised(self, latents: Tensor, noise: Tensor | float) -> Tensor:
        return (latents + noise * torch.randn_like(latents)).clamp(-1, 1)


def _norm(channels: int) -> nn.Module:
    """InstanceNorm over positions, as in the prototype."""
    return nn.InstanceNorm1d(channels, affine=True)
