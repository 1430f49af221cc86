"""The diffusion transformer on an adapter's latents, with adaLN-Zero (Peebles and Xie 2022, arXiv 2212.09748).

Latents are cut into tokens; timestep and condition are added to them and enter every block as scale, shift and gate of its
two halves. Gates start at zero. The noisy latents enter faintly and the condition leaves as latents of variance one: an
untrained transformer already tells people apart, so that what decodes its latents can learn from the first step on. (With the
usual zero at the end the end-to-end stage had learnt nothing of the photo after 600 steps.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DiffusionTransformer(nn.Module):
    """(noisy latents [n, latents], timesteps [n], condition [n, width]) -> answer [n, latents].

    Args:
        latents: numbers of one adapter's latent; padded to whole tokens inside.
        tokens: pieces it is cut into.
    """

    def __init__(self, latents: int, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.latents, self.tokens = latents, tokens
        self.piece = -(-latents // tokens)
        self.entry = nn.Linear(self.piece, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.exit = nn.Parameter(torch.randn(tokens, width, self.piece) * width**-0.5)  # each place has its own matrix
        nn.init.normal_(self.entry.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        padded = nn.functional.pad(noisy, (0, self.tokens * self.piece - self.latents))
        told = nn.functional.silu(self.time(_waves(times, self.places.shape[-1]).to(noisy)) + condition)
        x = self.entry(padded.unflatten(-1, (self.tokens, self.piece))) + self.places + told[:, None]
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.modulation(told)[:, None].chunk(2, -1)
        answer = torch.einsum("ntw,twp->ntp", self.norm(x) * (1 + scale) + shift, self.exit)
        return answer.flatten(1)[:, : self.latents]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(told)[:, None].chunk(6, -1)
        y = self.first(x) * (1 + scale) + shift
        x = x + gate * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.second(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


def _waves(times: Tensor, width: int) -> Tensor:
    """Sinusoids of timesteps [n] -> [n, width]."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=times.device) / (width // 2))
    angles = times.float()[:, None] * rates
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))
