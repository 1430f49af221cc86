"""The task of personalisation: teach a text-to-image UNet one subject from a handful of pictures.

Pictures and prompts are encoded once and held in memory. A batch draws pictures, noise and timesteps by its number
alone; the loss is the mean squared error of what the base's scheduler asks the UNet to predict. With prior
preservation each batch also holds pictures that the base itself drew of the subject's class, so that the class keeps
looking as it did.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.bases.stable_diffusion import Base, Prompts, alphas_cumprod, draw_latents, encode_pictures, encode_prompts
from smidgen.bases.stable_diffusion import prediction_type as base_prediction_type
from smidgen.bases.stable_diffusion import time_ids as sdxl_time_ids
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import Picture, load_picture, to_tensor
from smidgen.training.checkpoints import replace_file
from smidgen.training.randomness import derive, examples, stream


@dataclass(frozen=True)
class Encoded:
    """Encoded examples. ``mean``, ``std`` [n, channel, height, width] of the latents; ``time_ids`` [n, 6] for SDXL."""

    mean: Tensor
    std: Tensor
    prompts: Prompts
    time_ids: Tensor | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.mean)

    def rows(self, picks: Sequence[int], noise: torch.Generator) -> dict[str, Any]:
        """A batch of the examples ``picks``; the latents are drawn from the VAE's distribution with ``noise``."""
        mean, std = self.mean[list(picks)], self.std[list(picks)]
        batch: dict[str, Any] = {"latents": mean + std * torch.randn(mean.shape, generator=noise)}
        batch["embeds"] = self.prompts.embeds[list(picks)]
        if self.prompts.pooled is not None and self.time_ids is not None:
            batch |= {"pooled": self.prompts.pooled[list(picks)], "time_ids": self.time_ids[list(picks)]}
        batch["names"] = [self.names[pick] for pick in picks]
        return batch


def encode_examples(base: Base, pictures: Sequence[Picture], captions: Sequence[str], resolution: int) -> Encoded:
    """Encode pictures and their captions with the base's VAE and text encoders."""
    parts = [  # decoded a few at a time: a thousand large pictures would not fit in memory as numbers
        encode_pictures(base, to_tensor(load_picture(picture.path, resolution) for picture in pictures[at : at + 32]))
        for at in range(0, len(pictures), 32)
    ]
    mean, std = (torch.cat(found) for found in zip(*parts, strict=True))
    ids = torch.stack([sdxl_time_ids(picture.size, resolution) for picture in pictures])
    names = tuple(picture.path.name for picture in pictures)
    return Encoded(mean, std, encode_prompts(base, captions), ids if base.family == "sdxl" else None, names)


def encode_prior(
    base: Base,
    prompts: Sequence[str],
    resolution: int,
    cache: Path,
    *,
    steps: int,
    guidance: float,
    seed: int,
    key: str,
) -> Encoded:
    """Let the base draw one picture of its class for each prompt; their latents need no VAE.

    They are drawn once: ``cache`` keeps the latents, and is used again as long as ``key`` (what identifies the base)
    and the other arguments are the same.
    """
    encoded, nothing = encode_prompts(base, prompts), encode_prompts(base, [""])
    seeds = [derive(seed, "prior", number) for number in range(len(prompts))]
    asked = hashlib.sha256(repr((list(prompts), resolution, steps, guidance, seed, key)).encode()).hexdigest()
    latents = _cached(cache, asked)
    if latents is None:
        options: dict[str, Any] = {"negative": nothing, "steps": steps, "guidance": guidance, "size": resolution}
        latents = draw_latents(base, encoded, seeds, **options)
        replace_file(cache, save({"latents": latents.contiguous()}, metadata={"asked": asked}))
    ids = torch.stack([sdxl_time_ids((resolution, resolution), resolution)] * len(prompts))
    names = tuple(f"class picture {number}" for number in range(len(prompts)))
    return Encoded(latents, torch.zeros_like(latents), encoded, ids if base.family == "sdxl" else None, names)


def _cached(path: Path, asked: str) -> Tensor | None:
    """The latents at ``path`` if they are whole and answer what is ``asked``."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("asked") == asked else None
    except (OSError, SafetensorError):
        return None


@dataclass
class PersonalizeTask:
    """Batches and loss over encoded examples; satisfies ``smidgen.training.loop.Task``.

    ``alphas`` [timestep] is the base's noise schedule, ``prior`` the class examples (``prior_batch_size`` to a batch,
    their mean loss weighted by ``prior_weight``), ``snr_gamma`` the clamp of min-SNR weighting (None: off).
    """

    subject: Encoded
    alphas: Tensor
    prediction_type: str
    batch_size: int
    seed: int = 0
    prior: Encoded | None = None
    prior_batch_size: int = 0
    prior_weight: float = 1.0
    snr_gamma: float | None = None
    previewer: Callable[[nn.Module, int, Path], None] | None = None

    def batch(self, index: int) -> dict[str, Any]:
        noise = stream(self.seed, "noise", index)
        parts = [self.subject.rows(self._picks(index, len(self.subject), self.batch_size), noise)]
        weights = [torch.full((self.batch_size,), 1 / self.batch_size)]
        if self.prior is not None:
            parts.append(self.prior.rows(self._picks(index, len(self.prior), self.prior_batch_size), noise))
            weights.append(torch.full((self.prior_batch_size,), self.prior_weight / self.prior_batch_size))
        batch = {key: _join([part[key] for part in parts]) for key in parts[0]}
        batch["noise"] = torch.randn(batch["latents"].shape, generator=noise)
        batch["timesteps"] = torch.cat([self._timesteps(len(weight), noise) for weight in weights])
        return batch | {"weights": torch.cat(weights)}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.errors(model, batch).sum()

    def errors(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each row of the batch adds to the loss [rows]."""
        alpha = self.alphas.to(torch.float32).to(batch["latents"].device)[batch["timesteps"]]
        noisy, target = diffuse(batch["latents"], batch["noise"], alpha, self.prediction_type)
        conditions = {"encoder_hidden_states": batch["embeds"]}
        if "pooled" in batch:
            conditions["added_cond_kwargs"] = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        predicted = model(noisy, batch["timesteps"], **conditions, return_dict=False)[0]
        errors = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if self.snr_gamma is not None:
            errors = errors * snr_weights(alpha, self.snr_gamma, self.prediction_type)
        return errors * batch["weights"]

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        if self.previewer is not None:
            self.previewer(model, step, folder)

    def _picks(self, index: int, total: int, size: int) -> list[int]:
        return examples(self.seed, index, size, total)

    def _timesteps(self, count: int, noise: torch.Generator) -> Tensor:
        """Timesteps spread evenly from one random start: uniform each, with less variance between batches."""
        places = (torch.rand(1, generator=noise) + torch.arange(count) / count) % 1.0
        return (places * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)


def make_task(base: Base, subject: Encoded, **options: Any) -> PersonalizeTask:
    """A task whose schedule and kind of prediction are the base's own."""
    return PersonalizeTask(subject, alphas_cumprod(base), base_prediction_type(base), **options)


def diffuse(latents: Tensor, noise: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Noised latents and the target of the UNet, at signal power ``alpha`` [batch]; both like ``latents``."""
    signal, spread = (power.sqrt().reshape(-1, 1, 1, 1) for power in (alpha, 1 - alpha))
    noisy = signal * latents + spread * noise
    if kind == "epsilon":
        return noisy, noise
    if kind == "v_prediction":
        return noisy, signal * noise - spread * latents
    if kind == "sample":
        return noisy, latents
    raise ConfigError(f"Unknown prediction type {kind!r}; known are epsilon, v_prediction and sample.")


def snr_weights(alpha: Tensor, gamma: float, kind: str) -> Tensor:
    """Min-SNR weights [batch] (Hang et al. 2023), finite where the signal is gone (alpha = 0) and where it is whole.

    With snr = alpha / (1 - alpha): epsilon min(snr, gamma)/snr, v min(snr, gamma)/(snr + 1), sample min(snr, gamma).
    """
    clipped = torch.minimum(alpha, gamma * (1 - alpha))  # min(snr, gamma) (1 - alpha)
    if kind == "epsilon":
        return torch.where(alpha > 0, clipped / alpha.clamp(min=1e-12), torch.ones_like(alpha))
    if kind == "v_prediction":
        return clipped  # divided by (snr + 1)(1 - alpha) = 1
    return clipped / (1 - alpha).clamp(min=1e-12)


def _join(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [name for part in values for name in part]
