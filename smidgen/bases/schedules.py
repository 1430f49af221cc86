"""Noise and target at a time, as a base's own scheduler has them: numbered steps, flow matching, or EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEMES = ("logit_normal", "uniform", "none", "mode", "sigma_sqrt", "cosmap")  # of flow matching; none is uniform
MODE_SCALE = 1.29  # as in diffusers' training scripts


def schedule_of(scheduler: Any, steps: float = 1.0) -> DiscreteSchedule | FlowSchedule | EDMSchedule:
    """What a pipeline's own ``scheduler`` says of how its base was taught; flow matching's timesteps run from 0 to ``steps``.

    Raises ConfigError where that is nothing known here.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return FlowSchedule.of(scheduler, steps)
    if name.startswith("EDM"):
        return EDMSchedule.of(scheduler)
    return DiscreteSchedule.of(scheduler)


def reweighted(schedule: Any, scheme: str | None, shift: float | None) -> Any:
    """``schedule`` with another density and weights (one of ``SCHEMES``) and another shift; None leaves it what it is.

    Raises ConfigError for one that is not flow matching.
    """
    given = {"weighting_scheme": scheme, "shift": shift}
    wanted = {name: value for name, value in given.items() if value is not None}
    if wanted and not isinstance(schedule, FlowSchedule):
        raise ConfigError(
            f"{' and '.join(wanted)} {'are' if len(wanted) > 1 else 'is'} for bases that were taught by flow matching; this one was "
            "not. Leave it out."
        )
    if not wanted:
        return schedule
    return replace(schedule, scheme=scheme or schedule.scheme, shift=schedule.shift if shift is None else shift)


def _over(values: Tensor, latents: Tensor) -> Tensor:
    """``values`` [n] to be multiplied with ``latents`` [n, ...]."""
    return values.reshape(-1, *[1] * (latents.ndim - 1))


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

    def levels(self, quantiles: Tensor) -> Tensor:
        """Uniform over the steps, as they were taught."""
        return quantiles

    def timesteps(self, levels: Tensor) -> Tensor:
        """Noise levels [n] in 0..1 -> numbers of steps [n]."""
        return (levels * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the model's target for them [n, ...]."""
        alpha = _over(self._alpha(timesteps), latents)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * latents + spread * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        return noisy, signal * noise - spread * latents if self.prediction_type == "v_prediction" else latents

    def weights(self, timesteps: Tensor) -> None:
        """All the same."""

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


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching (Lipman et al. 2023): x_s = (1 - s) x + s noise; the velocity noise - x is predicted.

    A timestep is s times ``steps``. Training draws s by the density of ``scheme``, moved towards noise by ``shift`` (Esser et al.
    2024, equation 23): s -> shift s / (1 + (shift - 1) s). Schemes (their section 3.1) are named and counted as diffusers'
    training scripts do: logit_normal, mode, and uniform (none); sigma_sqrt and cosmap are uniform and weigh the error.
    """

    steps: float = 1.0
    shift: float = 1.0
    scheme: str = "logit_normal"

    @classmethod
    def of(cls, scheduler: Any, steps: float = 1.0) -> FlowSchedule:
        """That of a scheduler of diffusers'. A shift that depends on an image's size belongs to drawing alone, as it does in
        diffusers' training scripts."""
        config = scheduler.config
        static = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))
        return cls(steps, float(static))

    def levels(self, quantiles: Tensor) -> Tensor:
        """Quantiles [n] in 0..1 -> noise levels [n] of which so many are lower."""
        s = quantiles.double()
        if self.scheme == "logit_normal":
            s = torch.special.ndtri(s.clamp(1e-6, 1 - 1e-6)).sigmoid()
        elif self.scheme == "mode":
            s = s + MODE_SCALE * ((s * math.pi / 2).cos() ** 2 - 1 + s)
        return (self.shift * s / (1 + (self.shift - 1) * s)).to(quantiles.dtype)

    def timesteps(self, levels: Tensor) -> Tensor:
        """Noise levels [n] in 0..1 -> timesteps [n]."""
        return levels * self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the velocity [n, ...]."""
        s = _over(timesteps / self.steps, latents)
        return (1 - s) * latents + s * noise, noise - latents

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """What ``scheme`` multiplies the squared errors with [n], None for 1."""
        s = timesteps / self.steps
        if self.scheme == "sigma_sqrt":
            return s.clamp(min=1e-3) ** -2  # the least of diffusers' sigmas
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2)) if self.scheme == "cosmap" else None

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """No weights: raises ConfigError, as the velocity is weighted by the density of s."""
        raise ConfigError(
            "snr_gamma is for bases that predict noise in numbered steps; this one was taught by flow matching."
        )


@dataclass(frozen=True)
class EDMSchedule:
    """EDM (Karras et al. 2022, table 1): noise of standard deviation sigma is added, and the model sees and says scaled values.

    The input is (x + sigma noise) c_in, the timestep c_noise = ln(sigma) / 4, and the target (x - c_skip (x + sigma noise)) / c_out,
    whose squared error is their loss with lambda = 1 / c_out^2 (equation 8).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    sign: float = 1.0

    @classmethod
    def of(cls, scheduler: Any) -> EDMSchedule:
        """That of an EDM scheduler of diffusers', whose "v_prediction" is the same with the other sign."""
        config = scheduler.config
        signs = {"epsilon": 1.0, "v_prediction": -1.0}
        if config.prediction_type not in signs:
            raise ConfigError(
                f"The base predicts {config.prediction_type!r} in EDM's noise; known are {', '.join(signs)}."
            )
        return cls(
            config.sigma_min, config.sigma_max, config.sigma_data, config.get("rho", 7.0), signs[config.prediction_type]
        )

    def levels(self, quantiles: Tensor) -> Tensor:
        """Uniform over the sampler's own steps, as in diffusers' training script."""
        return quantiles

    def timesteps(self, levels: Tensor) -> Tensor:
        """Noise levels [n] in 0..1 along the sampler's steps (equation 5) -> c_noise [n]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((low + levels * (high - low)) ** self.rho).log() / 4

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the model sees, and what it should say of it [n, ...]."""
        sigma = _over((4 * timesteps).exp(), latents)
        noisy, total = latents + sigma * noise, sigma**2 + self.sigma_data**2
        c_out = self.sign * sigma * self.sigma_data / total.sqrt()
        return noisy / total.sqrt(), (latents - noisy * self.sigma_data**2 / total) / c_out

    def weights(self, timesteps: Tensor) -> None:
        """All the same."""

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """No weights: raises ConfigError, as EDM's loss has its own."""
        raise ConfigError("snr_gamma is for bases that predict noise in numbered steps; this one was taught by EDM.")
