"""The diffusion over latents: noising, what the transformer answers, and sampling by diffusers' schedulers.

x0 and v prediction: T = 1000 steps of linear betas 1e-4 .. 2e-2 (DDPM, arXiv 2006.11239, section 4), sampled by DDIM. ``flow``: x_s = (1 - s) x_0 + s noise, answer noise - x_0 (rectified flow), sampled by Euler steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["x0", "v", "flow"]
STEPS = 1000
BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}


class Process:
    """Latents [n, size] and timesteps [n] in 0 .. 999; at ``last`` there is practically noise alone."""

    last = STEPS - 1

    def __init__(self, prediction: Prediction = "x0") -> None:
        self.prediction = prediction
        betas = torch.linspace(BETAS["beta_start"], BETAS["beta_end"], STEPS, dtype=torch.float64)
        self.alphas = (1 - betas).cumprod(0).float()

    def _powers(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [n, 1] of the clean latent and of the noise."""
        if self.prediction == "flow":
            share = (times.float() + 1)[:, None] / STEPS
            return 1 - share, share
        alpha = self.alphas.to(times.device)[times][:, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t."""
        signal, spread = self._powers(times)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the transformer should answer."""
        if self.prediction == "x0":
            return clean
        if self.prediction == "flow":
            return noise - clean
        signal, spread = self._powers(times)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        """x_0 as the answer has it."""
        if self.prediction == "x0":
            return answer
        signal, spread = self._powers(times)
        return noisy - spread * answer if self.prediction == "flow" else signal * noisy - spread * answer

    def sample(self, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
        """Latents [n, size] from ``noise``; ``denoise(noisy, times)`` answers as trained. One step is the answer at
        ``last``."""
        x = noise
        scheduler = self._scheduler(steps)
        for time in scheduler.timesteps:
            number = (time.round() - 1 if self.prediction == "flow" else time).long().clamp(0, self.last)
            answer = denoise(x, number.to(x.device).expand(len(x)))
            x = scheduler.step(answer, time, x, return_dict=False)[0]
        return x

    def _scheduler(self, steps: int) -> Any:
        import diffusers

        if self.prediction == "flow":
            scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(STEPS)
            scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
            return scheduler
        kind = "sample" if self.prediction == "x0" else "v_prediction"
        scheduler = diffusers.DDIMScheduler(
            STEPS, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **BETAS
        )
        scheduler.set_timesteps(steps)
        return scheduler
