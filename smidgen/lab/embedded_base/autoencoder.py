"""Stages `autoencoder`, `latents` and `decoder`: pictures <-> an 8x8 grid of latents.

In the wide world the shipped autoencoder is trained on, its latents held near those of before, so that a denoiser of them can learn on.

The loss is L1 on pixels plus L1 on their differences to the right and downwards (edges stay crisp), counted more where
eyes and mouth are drawn, plus a small KL term. After the encoder is frozen the decoder trains on alone.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from smidgen.adapters.atomic import new_file, replace_file
from smidgen.bases.embedded import WIDE_FLOW, embedded_base
from smidgen.bases.embedded.layers import in_int8, tensors_of
from smidgen.lab.embedded_base import draw
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.run import PARTS, Run
from smidgen.training.quick import mixed

log = logging.getLogger(__name__)
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 1.0
LATENT_NOISE = 0.1
HOLD = 0.05
WIDE = WIDE_FLOW / "vae" / "diffusion_pytorch_model.safetensors"
WHITENING = 0.33
FACE = (slice(20, 46), slice(20, 44))
FACE_WEIGHT = 1.5


def build(config: Config) -> AutoencoderKL:
    """SD 1.5's autoencoder class, small: 64x64x3 -> 8x8xlatent_channels."""
    levels = len(config.autoencoder_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.autoencoder_widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,  # see `standardise`
    )


def untrained(config: Config) -> AutoencoderKL:
    """What training starts from: nothing, or in the wide world the shipped one."""
    return shipped() if config.world == "wide" else build(config)


def shipped() -> AutoencoderKL:
    """The autoencoder of the shipped base."""
    return AutoencoderKL.from_pretrained(embedded_base() / "vae")


def of_world(config: Config, folder: Path) -> AutoencoderKL:
    """What flow bases draw by: the shipped one; in the wide world that of `folder` where stage `autoencoder` has run there, else that
    world's."""
    checkpoint = folder / "autoencoder.safetensors"
    if config.world != "wide":
        return shipped()
    if checkpoint.exists():
        return averaged(config, checkpoint)
    model = shipped()
    model.load_state_dict(tensors_of(WIDE))
    return model.eval()


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [n, 64, 64, 3] -> float [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def picture_loss(drawn: Tensor, target: Tensor) -> Tensor:
    """Weighted L1 of pixels and of their differences; [n, 3, 64, 64] each."""
    weight = torch.ones(1, 1, *target.shape[2:])
    weight[:, :, *FACE] = FACE_WEIGHT
    error = (drawn - target) * (weight / weight.mean())
    right, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + EDGE_WEIGHT * 0.5 * (right.abs().mean() + down.abs().mean())


def autoencode(config: Config, folder: Path, out: Path | None = None) -> None:
    """Train encoder and decoder together; the averaged weights end in ``autoencoder.safetensors``, those of the wide world in int8
    in ``out`` too."""
    torch.manual_seed(config.seed)
    pictures, _ = draw.load(folder, "train")
    model, budget = untrained(config), config.autoencoder_budget
    run = Run(folder / "autoencoder.safetensors", model, budget)
    held = shipped() if config.world == "wide" else None

    def loss(generator: torch.Generator) -> Tensor:
        target = _batch(pictures, budget.batch // PARTS, generator)
        if held:
            return _held_loss(model, held, target, generator)
        with mixed():
            posterior = model.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            drawn = model.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return picture_loss(drawn.float(), target) + KL_WEIGHT * kl

    run.train(loss, config.seed + 1, lambda: f"{psnr(run.average, folder, 128):.2f} dB on held-out pictures")
    log.info("autoencoder: %.2f dB on held-out pictures", psnr(run.average, folder))
    if held and out:
        replace_file(
            out / WIDE.relative_to(WIDE_FLOW.parent),
            save(in_int8({n: t.half() for n, t in run.average.state_dict().items()}), {"format": "pt"}),
        )


def _held_loss(model: AutoencoderKL, held: AutoencoderKL, target: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures from noisy latents, and how far these are from what ``held`` makes of the same pictures."""
    with mixed():
        latent = model.encode(target).latent_dist.mean
        with torch.no_grad():
            before = held.encode(target).latent_dist.mean
        level = LATENT_NOISE * torch.rand(len(target), 1, 1, 1, generator=generator)
        drawn = model.decode(latent + level * torch.randn(latent.shape, generator=generator)).sample
    return picture_loss(drawn.float(), target) + HOLD * (latent.float() - before.float()).square().mean()


def _batch(pictures: np.ndarray, n: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(pictures), (n,), generator=generator).sort().values
    return to_tensor(pictures[index.numpy()])


@torch.no_grad()
def standardise(model: AutoencoderKL, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """Fold a partial whitening of the latents into the two 1x1 convolutions around them; returns (matrix, mean) of it.

    An autoencoder's channels are strongly correlated, and a denoiser's loss hardly sees the small directions. New
    latents are `matrix @ (old - mean)`, uncorrelated over `pictures`, a direction of variance e keeping e ** WHITENING,
    mean variance 1; `scaling_factor` is 1. Drawings are unchanged. The posterior's variance becomes a constant.
    """
    latents = encode(model, pictures)
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    mean, (values, vectors) = flat.mean(0), torch.linalg.eigh(torch.cov(flat.T))
    scales = values.pow((WHITENING - 1) / 2) / values.pow(WHITENING).mean().sqrt()
    matrix, inverse = scales[:, None] * vectors.T, vectors / scales
    channels = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    variance = matrix.square() @ model.encode(to_tensor(pictures[:64])).latent_dist.var.mean((0, 2, 3))
    quant.weight[:channels] = torch.einsum("ij,jkab->ikab", matrix, quant.weight[:channels])
    quant.bias[:channels] = matrix @ (quant.bias[:channels] - mean)
    quant.weight[channels:] = 0
    quant.bias[channels:] = variance.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight.copy_(torch.einsum("ijab,jk->ikab", post.weight, inverse))
    return matrix, mean


def encode(model: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Posterior means [n, latent_channels, 8, 8]."""

    def part(start: int) -> Tensor:
        with torch.no_grad(), mixed():
            return model.encode(to_tensor(pictures[start : start + 32])).latent_dist.mode().float()

    with ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat(list(pool.map(part, range(0, len(pictures), 32))))


def averaged(config: Config, checkpoint: Path) -> AutoencoderKL:
    """The averaged autoencoder of a checkpoint."""
    model = untrained(config)
    tensors = load_file(checkpoint)
    model.load_state_dict({n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")})
    return model.eval()


def freeze(config: Config, folder: Path) -> AutoencoderKL:
    """Stage `latents`: standardise the averaged autoencoder into ``frozen.safetensors``, encode every picture once."""
    path, latent_path = folder / "frozen.safetensors", folder / "latents.npy"
    model = build(config).eval()
    if path.exists() and latent_path.exists():
        model.load_state_dict(load_file(path))
        return model
    model = averaged(config, folder / "autoencoder.safetensors")
    pictures, _ = draw.load(folder, "train")
    standardise(model, pictures[:2000])
    with new_file(path) as beside:
        save_file(model.state_dict(), beside)
        draw.save_array(latent_path, encode(model, pictures).half().numpy())
    return model


def fine_tune_decoder(config: Config, folder: Path) -> None:
    """Stage `decoder`: the decoder alone, from latents with a little noise, as a denoiser's latents are never
    exact."""
    model = freeze(config, folder)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    pictures, _ = draw.load(folder, "train")
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    run = Run(folder / "decoder.safetensors", model, config.decoder)

    def loss(generator: torch.Generator) -> Tensor:
        index = (
            torch.randint(len(pictures), (config.decoder.batch // PARTS,), generator=generator).sort().values.numpy()
        )
        latent = torch.from_numpy(np.array(latents[index])).float()
        level = LATENT_NOISE * torch.rand(len(index), 1, 1, 1, generator=generator)
        latent = latent + level * torch.randn(latent.shape, generator=generator)
        with mixed():
            drawn = model.decode(latent).sample
        return picture_loss(drawn.float(), to_tensor(pictures[index]))

    run.train(loss, config.seed + 2, lambda: f"{psnr(run.average, folder, 128):.2f} dB on held-out pictures")
    log.info("decoder: %.2f dB on held-out pictures", psnr(run.average, folder))


@torch.no_grad()
def psnr(model: Any, folder: Path, n: int = 512) -> float:
    """Mean PSNR per picture (dB, peak 255) of encode-decode over `n` held-out pictures, drawn values clipped."""
    pictures, _ = draw.load(folder, "test")
    values = []
    for start in range(0, min(n, len(pictures)), 64):
        target = to_tensor(pictures[start : start + 64])
        drawn = model.decode(model.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((drawn - target) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()
