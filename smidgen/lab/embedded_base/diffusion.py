"""Stage `diffusion`: UNet and text encoder together, on latents encoded once.

v-prediction (Salimans & Ho 2022) with zero terminal SNR (Lin et al. 2023), time steps stratified over a batch,
high-SNR steps weighed down (min-SNR, Hang et al. 2023, in the form min(snr + 1, 6) / (snr + 1) so that the terminal
step still counts), and the latents around eyes and mouth counted twice.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from smidgen.bases.schedules import DiscreteSchedule
from smidgen.lab.embedded_base import draw, text
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.run import PARTS, Run

log = logging.getLogger(__name__)
FACE_CELLS = slice(2, 6)
FACE_WEIGHT = 2.0


def scheduler() -> DDIMScheduler:
    """SD's noise schedule rescaled to end in pure noise, sampled from its very end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def unet(config: Config) -> UNet2DConditionModel:
    """SD 1.5's denoiser class and module names with two resolutions (8x8, 4x4), cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.unet_widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.unet_widths),
        cross_attention_dim=config.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """What is trained here: the UNet and the text encoder."""

    def __init__(self, config: Config, words: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = unet(config)
        self.text_encoder = text.text_encoder(config, words)

    def forward(self, noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """Predicted v [n, c, 8, 8] from noisy latents, steps [n] and token numbers [n, TOKENS]."""
        return self.unet(noisy, times, self.text_encoder(ids).last_hidden_state).sample


def _weights(snr: Tensor, size: int) -> Tensor:
    """Loss weights [n, 1, size, size], mean about one over the cells."""
    cells = torch.ones(size, size)
    cells[FACE_CELLS, FACE_CELLS] = FACE_WEIGHT
    return (torch.clamp(snr + 1, max=6) / (snr + 1))[:, None, None, None] * (cells / cells.mean())


def train(config: Config, folder: Path) -> Run:
    """Train on the frozen encoder's latents; resumes from ``diffusion.safetensors``.

    A ``diffusion_start.safetensors`` of the same shapes, where there is one, gives the first weights.
    """
    torch.manual_seed(config.seed + 20)
    words = text.tokenizer(folder / "tokenizer", config.drawn())
    model = Denoiser(config, words)
    start = folder / "diffusion_start.safetensors"
    if start.exists():
        model.load_state_dict(load_file(start))
    run = Run(folder / "diffusion.safetensors", model, config.diffusion)
    codes = draw.load(folder, "train")[1]
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    schedule = DiscreteSchedule.of(scheduler())
    batch = config.diffusion.batch // PARTS

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(codes), (batch,), generator=generator).numpy()
        rng = np.random.default_rng(generator.initial_seed())
        ids = text.token_ids(words, [text.training_caption(codes[i], rng, drawn=config.drawn()) for i in index])
        clean = torch.from_numpy(np.array(latents[index])).float()
        noise = torch.randn(clean.shape, generator=generator)
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        times = schedule.timesteps(strata)
        noisy, target = schedule.add_noise(clean, noise, times)
        alpha = schedule.alphas.float()[times]
        error = (model(noisy, times, ids) - target).square()
        return (error * _weights(alpha / (1 - alpha), clean.shape[-1])).mean()

    run.train(loss, config.seed + 21)
    return run
