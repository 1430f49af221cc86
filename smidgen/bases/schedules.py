"""Noise and target at a time, as a base's own scheduler has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class DiscreteSchedule:
    """Variance-preserving noise in numbered steps (Ho et al. 2020): sqrt(a) x + sqrt(1 - a) noise.

    ``alphas`` [timestep] are the share of signal power left, exactly 0 at a zero-terminal-SNR end; the model predicts the
    noise (epsilon), sqrt(a) noise - sqrt(1 - a) x (v_prediction) or x (sample).
    """

    alphas: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise ConfigError(
                f"The base predicts {self.prediction_type!r}; known are {', '.join(PREDICTIONS[:-1])} and {PREDICTIONS[-1]}."
            )

    @classmethod
    def of(cls, scheduler: Any) -> DiscreteSchedule:
        """That of any of diffusers' schedulers with numbered steps."""
        from diffusers import DDPMScheduler

        alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()
        return cls(alphas, scheduler.config.get("prediction_type", "epsilon"))

    def timesteps(self, levels: Tensor) -> Tensor:
        """Noise levels [n] in 0..1 -> numbers of steps [n]."""
        return (levels * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the model's target for them [n, ...]."""
        alpha = self._alpha(timesteps).reshape(-1, *[1] * (latents.ndim - 1))
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * latents + spread * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        return noisy, signal * noise - spread * latents if self.prediction_type == "v_prediction" else latents

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights [n] (Hang et al. 2023), finite where the signal is gone (alpha = 0) and where it is whole.

        With snr = alpha / (1 - alpha): epsilon min(snr, gamma)/snr, v min(snr, gamma)/(snr + 1), sample min(snr, gamma).
        """
        alpha = self._alpha(timesteps)
        clipped = torch.minimum(alpha, gamma * (1 - alpha))  # min(snr, gamma) (1 - alpha)
        if self.prediction_type == "epsilon":
            return torch.where(alpha > 0, clipped / alpha.clamp(min=1e-12), torch.ones_like(alpha))
        if self.prediction_type == "v_prediction":
            return clipped  # divided by (snr + 1)(1 - alpha) = 1
        return clipped / (1 - alpha).clamp(min=1e-12)

    def _alpha(self, timesteps: Tensor) -> Tensor:
        return self.alphas.float().to(timesteps.device)[timesteps]
