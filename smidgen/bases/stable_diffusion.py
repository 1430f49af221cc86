"""Text-to-image bases of the Stable Diffusion family: load one, encode pictures and prompts with it, draw with it.

One code path serves the embedded base, SD 1.x/2.x and SDXL: they are diffusers' ``StableDiffusionPipeline`` and
``StableDiffusionXLPipeline``, and only the second has a second text encoder, pooled embeddings and time ids.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen.bases.embedded import embedded_base
from smidgen.errors import ConfigError, MissingExtraError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

FAMILIES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
EMBEDDED = "embedded"
ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: ``embeds`` [prompt, token, channel]; for SDXL also ``pooled`` [prompt, channel]."""

    embeds: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: Any) -> "Prompts":
        return Prompts(self.embeds[rows], None if self.pooled is None else self.pooled[rows])

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass
class Base:
    """A loaded base: the name it was asked for by, ``sd`` or ``sdxl``, and the diffusers pipeline."""

    name: str
    family: str
    pipe: Any

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def resolution(self) -> int:
        """Pixels on a side that the base was made for."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def release_encoders(self, keep_vae: bool = False) -> None:
        """Free the text encoders, and the VAE unless pictures will still be drawn; encoded prompts go on working."""
        for name in (*ENCODERS, *(() if keep_vae else ("vae",))):
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)


def load_base(name: str | Path, mixed_precision: str = "no", device: torch.device | str = "cpu") -> Base:
    """Load ``embedded``, a pipeline folder, or a hub name. The frozen UNet takes the run's precision, the VAE stays
    fp32.

    Raises ConfigError when there is no such base or it is not of the Stable Diffusion family.
    """
    diffusers = _diffusers()
    folder = _locate(name)
    cls = _pipeline_class(folder, str(name))
    if mixed_precision == "fp16" and torch.device(device).type == "cpu":
        raise ConfigError("fp16 has no arithmetic on a CPU; use --mixed-precision bf16 or no.")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    extras = {} if "XL" in cls else {"safety_checker": None, "requires_safety_checker": False}
    word = "dtype" if hasattr(diffusers.utils.deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"
    try:
        with _quiet():
            pipe = getattr(diffusers, cls).from_pretrained(folder, use_safetensors=True, **{word: dtype}, **extras)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {str(name)!r} could not be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if dtype != torch.float32:
        with _quiet():
            pipe.vae.to(torch.float32)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    return Base(str(name), FAMILIES[cls], pipe.to(device))


def encode_prompts(base: Base, prompts: Sequence[str], batch: int = 16) -> Prompts:
    """Encode prompts as the pipeline itself would; prompts cut at the tokenizer's length are warned about."""
    warn_of_cut_prompts(base, prompts)
    options = {"device": base.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    embeds, pooled = [], []
    with torch.no_grad(), _quiet():
        for start in range(0, len(prompts), batch):
            found = base.pipe.encode_prompt(prompt=list(prompts[start : start + batch]), **options)
            embeds.append(found[0].cpu())
            if base.family == "sdxl":
                pooled.append(found[2].cpu())
    return Prompts(torch.cat(embeds), torch.cat(pooled) if pooled else None)


def warn_of_cut_prompts(base: Base, prompts: Sequence[str]) -> None:
    tokenizer = base.pipe.tokenizer
    with _quiet():
        lengths = {prompt: len(tokenizer(prompt).input_ids) for prompt in dict.fromkeys(prompts)}
    cut = [prompt for prompt, length in lengths.items() if length > tokenizer.model_max_length]
    if cut:
        limit = tokenizer.model_max_length
        logger.warning("%d prompt(s) longer than %d tokens are cut, e.g. %r.", len(cut), limit, cut[0][:80])


def encode_pictures(base: Base, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, height, width] in -1..1 -> mean and std [n, channel, h, w] of their scaled latents (CPU)."""
    vae = base.pipe.vae
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    means, stds = [], []
    with torch.no_grad():
        for part in pixels.split(_at_once(batch, pixels.shape[-1])):
            encoded = vae.encode(part.to(base.device, torch.float32))
            if hasattr(encoded, "latent_dist"):
                mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
            else:
                mean, std = encoded.latents, torch.zeros_like(encoded.latents)
            means.append(((mean - shift) * scale).cpu())
            stds.append((std * scale).cpu())
    return torch.cat(means), torch.cat(stds)


def draw(base: Base, prompts: Prompts, seeds: Sequence[int], **options: Any) -> "list[Image]":
    """One picture for each prompt and seed; options as for ``draw_latents``."""
    return decode(base, draw_latents(base, prompts, seeds, **options))


def draw_latents(
    base: Base,
    prompts: Prompts,
    seeds: Sequence[int],
    *,
    negative: Prompts,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 8,
) -> Tensor:
    """Scaled latents [n, channel, h, w] on the CPU, one for each prompt and seed.

    ``negative`` holds one encoded prompt, ``size`` is in pixels (the base's own by default). A seed alone fixes a
    picture's noise, so that pictures with and without an adapter can be compared.
    """
    found, size = [], size or base.resolution
    common = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    for start in range(0, len(prompts), batch):
        rows = slice(start, min(start + batch, len(prompts)))
        embeds = _embeds(base, prompts[rows], "") | _embeds(base, negative[[0] * (rows.stop - rows.start)], "negative_")
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[rows]]
        found.append(base.pipe(generator=generators, output_type="latent", **common, **embeds).images.float().cpu())
    return torch.cat(found)


def decode(base: Base, latents: Tensor, batch: int = 4) -> "list[Image]":
    """Pictures of scaled latents [n, channel, h, w], decoded in fp32."""
    vae = base.pipe.vae
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    images: list[Image] = []
    with torch.no_grad():
        for part in latents.split(_at_once(batch, latents.shape[-1] * base.pipe.vae_scale_factor)):
            pixels = vae.decode(part.to(base.device, torch.float32) / scale + shift, return_dict=False)[0]
            images += base.pipe.image_processor.postprocess(pixels, output_type="pil")
    return images


def _at_once(batch: int, size: int) -> int:
    """Pictures that the VAE takes at once: two of 1024 pixels, whose activations are gigabytes each."""
    return min(batch, max(1, 2**21 // size**2))


def time_ids(size: tuple[int, int], resolution: int) -> Tensor:
    """SDXL's size conditioning [6]: original height and width, crop corner, target height and width, in pixels."""
    width, height = size
    return torch.tensor([height, width, 0, 0, resolution, resolution], dtype=torch.float32)


def alphas_cumprod(base: Base) -> Tensor:
    """The base's noise schedule [timestep]: the share of signal power left, exactly 0 at a zero-terminal-SNR end."""
    scheduler = _diffusers().DDPMScheduler.from_config(base.pipe.scheduler.config)
    return scheduler.alphas_cumprod.double()


def prediction_type(base: Base) -> str:
    """``epsilon``, ``v_prediction`` or ``sample``: what the UNet was trained to answer."""
    kind = base.pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(f"The base predicts {kind!r}; known are epsilon, v_prediction and sample.")
    return kind


def default_device() -> torch.device:
    """The device accelerate will train on."""
    from accelerate import PartialState

    return PartialState().device


def fingerprint(base: Base) -> str:
    """A few digits of the UNet's size and weights, enough to notice that a run is resumed on another base."""
    unet = base.unet
    probe = sum(float(layer.weight.double().abs().sum()) for layer in (unet.conv_in, unet.conv_out))
    return f"{sum(p.numel() for p in unet.parameters())} numbers, {probe:.6e}"


def _embeds(base: Base, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
    dtype = base.unet.dtype
    found = {f"{prefix}prompt_embeds": prompts.embeds.to(base.device, dtype)}
    if prompts.pooled is not None:
        found[f"{prefix}pooled_prompt_embeds"] = prompts.pooled.to(base.device, dtype)
    return found


def _locate(name: str | Path) -> str:
    """A local folder or a hub name."""
    if str(name) == EMBEDDED:
        return str(embedded_base())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*near, EMBEDDED])
        raise ConfigError(f"There is no base {str(name)!r}: neither a folder, nor {EMBEDDED!r}, nor owner/name.{hint}")
    return str(name)


def _pipeline_class(folder: str, name: str) -> str:
    try:
        with _quiet():
            cls = _diffusers().DiffusionPipeline.load_config(folder)["_class_name"]
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ConfigError(
            f"The base {name!r} has no readable model_index.json, so it is not a diffusers pipeline.{offline} ({error})"
        ) from error
    if cls not in FAMILIES:
        raise ConfigError(f"The base {name!r} is a {cls}; this recipe trains {' and '.join(FAMILIES)}.")
    return cls


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of diffusers and transformers; what matters of them is said by this module."""
    import transformers

    parts = [library.utils.logging for library in (_diffusers(), transformers)]
    levels = [part.get_verbosity() for part in parts]
    for part in parts:
        part.set_verbosity_error()
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part, level in zip(parts, levels, strict=True):
            part.set_verbosity(level)
            part.enable_progress_bar()


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("Text-to-image bases need diffusers: pip install 'smidgen[diffusion]'") from error
    return diffusers
