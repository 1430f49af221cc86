"""The generator's network: photos' features -> condition -> latents of an adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.difflora.generator.diffusion import Process
from smidgen.difflora.generator.mixing import MixedImageFeatures
from smidgen.difflora.generator.settings import Model
from smidgen.difflora.generator.transformer import DiffusionTransformer


class Network(nn.Module):
    """Mixed image features and the diffusion transformer that they steer.

    Args:
        face, image: widths of the encoders' features.
        latents: numbers of an adapter's latent.
        model: sizes.
    """

    def __init__(self, face: int, image: int, latents: int, model: Model) -> None:
        super().__init__()
        self.latents, self.process = latents, Process(model.prediction)
        self.mixing = MixedImageFeatures(face, image, model.width, model.gate)
        self.transformer = DiffusionTransformer(latents, model.tokens, model.width, model.depth, model.heads)
        self.nobody = nn.Parameter(torch.zeros(model.width))  # the condition without a photo

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The answer [n, latents]; see :class:`Process`."""
        return self.transformer(noisy, times, condition)  # type: ignore[no-any-return]

    def clean(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The clean latents [n, latents] that the answer means."""
        return self.process.clean(noisy, self(noisy, times, condition), times)

    def sample(self, noise: Tensor, condition: Tensor | None, steps: int, guidance: float = 1.0) -> Tensor:
        """Latents [n, latents] from ``noise`` under ``condition`` [n, width]; None: nobody in particular.

        Guidance g answers u + g (c - u) with the answers u for nobody and c under the condition.
        """
        nobody = self.nobody.expand(len(noise), -1)

        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            if condition is None or guidance == 0:
                return self(noisy, times, nobody)  # type: ignore[no-any-return]
            answer = self(noisy, times, condition)
            if guidance == 1:
                return answer  # type: ignore[no-any-return]
            free = self(noisy, times, nobody)
            return free + guidance * (answer - free)  # type: ignore[no-any-return]

        return self.process.sample(denoise, noise, steps)
