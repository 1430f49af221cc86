"""What all families that draw share, as they are diffusers pipelines: loading, images and latents, drawing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from smidgen.adapters.methods import Kind
from smidgen.adapters.tuner.peft_bridge import fingerprint
from smidgen.bases.protocol import Prompts, Sampling, Schedule
from smidgen.bases.schedules import DiscreteSchedule
from smidgen.errors import ConfigError, MissingExtraError
from smidgen.training.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

    from smidgen.bases.judging import Judge

logger = logging.getLogger(__name__)

SCENES = (
    "a portrait of a person",
    "a photo of a person in the street, in the rain",
    "a person smiling, in front of a mountain lake",
    "an oil painting of a person",
    "a person with sunglasses, on a beach",
    "a black and white photo of a person reading a book",
)


class PipelineBase:
    """A base in a diffusers pipeline, as ``protocol.ImageBase`` has it; a family says what is its own (see
    ``stable_diffusion``)."""

    family: str
    component: str
    targets: tuple[str, ...]
    sampling: Sampling
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    load_options: Mapping[str, Any] = {}
    learning: Mapping[str, Kind] = {"image": "picture", "control": "picture"}  # task -> what learning rates go by

    parts_reader: Callable[[], Any] | None = None

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe

    @classmethod
    def load(cls, name: str, folder: str, pipeline: str, precision: str, device: torch.device | str) -> Self:
        """The pipeline of the class ``pipeline`` in ``folder``, frozen. The denoiser takes the ``precision``, the VAE stays
        fp32."""
        diffusers = import_diffusers()
        if precision == "fp16" and torch.device(device).type == "cpu":
            raise ConfigError("fp16 has no arithmetic on a CPU; use --mixed-precision bf16 or no.")
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        messages = diffusers.utils.deprecation_utils
        word = "dtype" if hasattr(messages, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"
        options = {"use_safetensors": True, word: dtype, **cls.load_options}
        try:
            with quiet():
                pipe = getattr(diffusers, pipeline).from_pretrained(folder, **options)
                pipe.vae.to(torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The base {name!r} could not be loaded: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        base = cls(name, pipe.to(device))
        for part in (base.model, *base.encoders.values()):
            part.requires_grad_(False)
        return base

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def factor(self) -> int:
        return int(self.pipe.vae_scale_factor)

    @property
    def resolution(self) -> int:
        size = self.model.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.factor

    def latent_shape(self, size: int) -> tuple[int, ...]:
        return (self.model.config.in_channels, size // self.factor, size // self.factor)

    @cached_property
    def schedule(self) -> Schedule:
        return DiscreteSchedule.of(self.pipe.scheduler)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        parts = {name: getattr(self.pipe, name, None) for name in ("vae", *self.text_encoders)}
        return {name: part for name, part in parts.items() if part is not None}

    def release_encoders(self, keep_vae: bool = False) -> None:
        _ = self._encoder_prints
        for name in (*self.text_encoders, *self.tokenizers, *(() if keep_vae else ("vae",))):
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)

    def encode_images(self, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        with torch.no_grad():
            for part in pixels.split(_at_once(batch, pixels.shape[-1])):
                encoded = self.pipe.vae.encode(part.to(self.device, torch.float32))
                if hasattr(encoded, "latent_dist"):
                    mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
                else:
                    mean, std = encoded.latents, torch.zeros_like(encoded.latents)
                shift, scale = self._standard
                means.append(((mean - shift) * scale).cpu())
                stds.append((std * scale).cpu())
        return torch.cat(means), torch.cat(stds)

    def encode_prompts(self, prompts: Sequence[str], batch: int = 16) -> Prompts:
        self._warn_of_cut(prompts)
        with torch.no_grad(), quiet():
            parts = [self._encoded(list(prompts[at : at + batch])) for at in range(0, len(prompts), batch)]
        return Prompts.join([part.to(torch.device("cpu")) for part in parts])

    def sized(self, prompts: Prompts, sizes: Sequence[tuple[int, int]], resolution: int) -> Prompts:
        return prompts

    def _encoded(self, prompts: list[str]) -> Prompts:
        raise NotImplementedError

    def _warn_of_cut(self, prompts: Sequence[str]) -> None:
        tokenizer = self.pipe.tokenizer
        with quiet():
            lengths = {prompt: len(tokenizer(prompt).input_ids) for prompt in dict.fromkeys(prompts)}
        cut = [prompt for prompt, length in lengths.items() if length > tokenizer.model_max_length]
        if cut:
            limit = tokenizer.model_max_length
            logger.warning("%d prompt(s) longer than %d tokens are cut, e.g. %r.", len(cut), limit, cut[0][:80])

    @property
    def _standard(self) -> tuple[float, float]:
        """Latents are (the VAE's own - shift) * scale."""
        config = self.pipe.vae.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def draw(self, prompts: Prompts, seeds: Sequence[int], **options: Any) -> list[Image]:
        return self.decode(self.draw_latents(prompts, seeds, **options))

    def draw_latents(
        self, prompts: Prompts, seeds: Sequence[int], *, negative: Prompts, steps: int, guidance: float,
        size: int | None = None, batch: int = 8,
    ) -> Tensor:  # fmt: skip
        found, size = [], size or self.resolution
        common = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        for start in range(0, len(prompts), batch):
            own = prompts[start : start + batch]
            given = self._embeds(own, "") | self._embeds(negative[[0] * len(own)], "negative_")
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[start : start + batch]]
            found.append(self.pipe(generator=generators, output_type="latent", **common, **given).images.float().cpu())
        return torch.cat(found)

    def decode(self, latents: Tensor, batch: int = 4) -> list[Image]:
        (shift, scale), images = self._standard, []
        with torch.no_grad():
            for part in latents.split(_at_once(batch, latents.shape[-1] * self.factor)):
                own = part.to(self.device, torch.float32) / scale + shift
                pixels = self.pipe.vae.decode(own, return_dict=False)[0]
                images += self.pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        """Encoded prompts as the pipeline takes them."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        parts = {self.component: fingerprint(self.model)} | self._encoder_prints
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]

    @cached_property
    def _encoder_prints(self) -> dict[str, str]:
        """Of what encodes pictures and prompts, remembered when it is released."""
        return {name: fingerprint(part) for name, part in self.encoders.items()}

    def alias(self, module: str) -> str | None:
        return None

    def scenes(self, count: int, seed: int) -> list[str]:
        return list(SCENES[:count])

    def judge(self) -> Judge | None:
        return None

    def foreign(self, images: Sequence[Image]) -> list[bool]:
        return [False] * len(images)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        return []


def _at_once(batch: int, size: int) -> int:
    """Images that a VAE takes at once: two of 1024 pixels, whose activations are gigabytes each."""
    return min(batch, max(1, 2**21 // size**2))


def default_device() -> torch.device:
    """The device accelerate will train on."""
    from accelerate import PartialState

    return PartialState().device


def import_diffusers() -> Any:
    """diffusers, or the error that names its extra."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("Text-to-image bases need diffusers: pip install 'smidgen[diffusion]'") from error
    return diffusers
