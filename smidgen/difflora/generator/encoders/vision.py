"""Vision models of the transformers family: what is in the picture, as one row of features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen.bases import transformers as bases
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16
LANCZOS, BICUBIC = 1, 3  # Pillow's numbers, which preprocessor_config.json uses


class Vision:
    """``NAME``: a packaged model, a transformers folder, or a hub name, frozen, in fp32 on the CPU.

    Features are CLIP's projected embedding, else the model's pooled output, else its first token. Pictures are scaled,
    cropped and normalised as the folder's ``preprocessor_config.json`` says.

    Raises:
        ConfigError: no such model, no model of pictures, or a folder that does not hold all of its weights.
        MissingExtraError: transformers is not installed.
    """

    default = ""

    def __init__(self, options: str = "") -> None:
        name = options or self.default
        if not name:
            raise ConfigError("vision needs a model: vision:FOLDER, a packaged name, or a hub name.")
        self.network, self.pooled = _load(name)
        self.processor = _processor(name, self.network.config)
        told = f"{bases.fingerprint(self.network)} {sorted(self.processor.items())}"
        self.name = f"{type(self).__name__.lower()}:{Path(name).name}@{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        self.width = self._features(torch.zeros(1, 3, *self.processor["crop"])).shape[1]

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Features [n, width]."""
        prepared = to_tensor(self._prepared(picture) for picture in pictures)
        mean, std = (torch.tensor(self.processor[name])[:, None, None] for name in ("mean", "std"))
        pixels = ((prepared + 1) / 2 - mean) / std
        return torch.cat([self._features(part) for part in pixels.split(BATCH)])

    def _prepared(self, picture: Image) -> Image:
        """Scaled, then cropped to the centre."""
        picture, (height, width) = picture.convert("RGB"), self.processor["crop"]
        size = self.processor["size"]
        if isinstance(size, int):  # of the shorter side
            scale = size / min(picture.size)
            size = (round(picture.height * scale), round(picture.width * scale))
        scaled = picture.resize((size[1], size[0]), self.processor["resample"])
        left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
        return scaled.crop((left, top, left + width, top + height))

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        out = self.network(pixel_values=pixels)
        if hasattr(out, "image_embeds"):
            return out.image_embeds.float()  # type: ignore[no-any-return]
        pooled = getattr(out, "pooler_output", None) if self.pooled else None
        return (out.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float()  # type: ignore[no-any-return]


class Clip(Vision):
    """CLIP's picture encoder with its projection (Radford et al. 2021, arXiv 2103.00020)."""

    default = "openai/clip-vit-large-patch14"


class Dinov2(Vision):
    """DINOv2's normalised class token (Oquab et al. 2023, arXiv 2304.07193)."""

    default = "facebook/dinov2-base"


def _load(name: str) -> tuple[Any, bool]:
    """The frozen network, and whether its pooler is trained."""
    kind = bases.load_config(name).model_type
    auto = "CLIPVisionModelWithProjection" if kind in ("clip", "clip_vision_model") else "AutoModel"
    with bases.hub_errors(name), bases.quiet():
        import transformers

        network, info = getattr(transformers, auto).from_pretrained(
            bases.locate(name), dtype=torch.float32, output_loading_info=True
        )
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise ConfigError(f"{name} is a {type(network).__name__}, which does not take pictures alone.")
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ConfigError(
            f"{name} does not hold all weights of a {type(network).__name__}: {missing[0]!r} is missing"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}."
        )
    return network.eval().requires_grad_(False), not info["missing_keys"]


def _processor(name: str, config: Any) -> dict[str, Any]:
    """What is done to a picture: ``size`` of the shorter side, or height and width; ``crop``, ``mean``, ``std``."""
    values = bases.image_processor(name)
    own = getattr(config, "image_size", None) or 224
    own = own if isinstance(own, int) else own[0]
    size = _sides(values.get("size"), own)
    crop = _sides(values.get("crop_size"), own) if values.get("do_center_crop") else size
    return {
        "size": size,
        "crop": (crop, crop) if isinstance(crop, int) else crop,
        "resample": values.get("resample") or BICUBIC,
        "mean": list(values["image_mean"]),
        "std": list(values["image_std"]),
    }


def _sides(value: Any, own: int) -> Any:
    """A shorter side, or (height, width); ``own`` where none is named."""
    if isinstance(value, int):
        return value
    if isinstance(value, dict):
        return value.get("shortest_edge") or (value["height"], value["width"])
    return own
