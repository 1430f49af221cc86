"""Tiny models that the tests of the engine share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q_proj(x)) * self.v_proj(x)


class Net(nn.Module):
    """Layers with q_proj and v_proj, then a head: 2 layers of width 16 unless told otherwise."""

    def __init__(self, layers: int = 2, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Block(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def inputs(width: int = 16, rows: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def trained(method: str = "svfit", name: str = "default", seed: int = 1, net: nn.Module | None = None, **options):  # type: ignore[no-untyped-def]
    """A net with a perturbed adapter on q_proj and v_proj."""
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    return testing.perturb(smidgen.adapt(net or Net(), method, name, **options), seed, adapter_name=name)


def unet() -> nn.Module:
    """A UNet of diffusers with attention in two places."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
