"""Stable Diffusion 1.5 and SDXL as shapes: what the plan counts on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.bases.architectures import architecture, build_architecture
from smidgen.errors import ConfigError, did_you_mean
from smidgen.lab.planning.dry_run import TOKENS
from smidgen.training.cost import Cost, cost

# Configs of the published checkpoints
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": TOKENS}
_CLIP_L = _TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BIG_G = _TEXT | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
_EYES: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One base: its architecture's name, pixels on a side, and the configs of its text encoders."""

    name: str
    title: str
    family: str
    pixels: int
    texts: tuple[dict[str, Any], ...]

    @property
    def latent(self) -> int:
        """Latent pixels on a side."""
        return self.pixels // 8

    @property
    def caption_bytes(self) -> int:
        """An encoded caption in 16 bits: tokens, and SDXL's pooled embedding."""
        width = sum(text["hidden_size"] for text in self.texts)
        return 2 * (TOKENS * width + sum(text.get("projection_dim", 0) for text in self.texts))

    @property
    def picture_bytes(self) -> int:
        """Mean and deviation of a picture's latent in fp32."""
        return 2 * 4 * 4 * self.latent**2

    def build(self) -> nn.Module:
        """The UNet on the meta device."""
        return build_architecture(self.name)

    @property
    def parameters(self) -> int:
        """Numbers of the UNet."""
        return architecture(self.name).parameters


BASES = {
    shape.name: shape
    for shape in (
        Shape("sd15", "SD 1.5", "sd", 512, (_CLIP_L,)),
        Shape("sdxl", "SDXL", "sdxl", 1024, (_CLIP_L, _BIG_G)),
    )
}


def base_shape(name: str) -> Shape:
    """The base called ``name``; ConfigError with the nearest names otherwise."""
    if name not in BASES:
        raise ConfigError(
            f"There is no plan for the base {name!r}.{did_you_mean(name, BASES)} Known: {', '.join(BASES)}."
        )
    return BASES[name]


@dataclass(frozen=True)
class Part:
    """A frozen network beside the UNet: numbers, and operations for one picture or caption."""

    numbers: int
    flops: int


def vae_encoder(shape: Shape) -> Part:
    """The VAE's encoder on one picture; numbers are the whole VAE's."""
    import diffusers

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(sample_size=shape.pixels, **_VAE).requires_grad_(False)
        pixels = torch.empty(1, 3, shape.pixels, shape.pixels)
    return Part(_numbers(vae), _forward(lambda: vae.encode(pixels).latent_dist.mean.sum()).forward)


def text_encoders(shape: Shape) -> Part:
    """All text encoders on one caption."""
    import transformers

    numbers = flops = 0
    for options in shape.texts:
        with torch.device("meta"):
            config = transformers.CLIPTextConfig(**options)
            kind = (
                transformers.CLIPTextModelWithProjection if "projection_dim" in options else transformers.CLIPTextModel
            )
            network = kind(config).eval().requires_grad_(False)
            words = torch.zeros(1, TOKENS, dtype=torch.long)
        numbers += _numbers(network)
        flops += _forward(lambda network=network, words=words: network(words)[0].sum()).forward  # type: ignore[misc]
    return Part(numbers, flops)


def picture_encoder() -> Part:
    """CLIP ViT-L/14's picture encoder on one picture of 224 pixels."""
    import transformers

    with torch.device("meta"):
        network = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**_EYES)).requires_grad_(
            False
        )
        pixels = torch.empty(1, 3, 224, 224)
    return Part(_numbers(network), _forward(lambda: network(pixel_values=pixels).image_embeds.sum()).forward)


def _forward(run: Any) -> Cost:
    with torch.no_grad():
        return cost(run, backward=False, precision=torch.float32)


def _numbers(network: nn.Module) -> int:
    found: list[Tensor] = list(network.parameters())
    return sum(parameter.numel() for parameter in found)
