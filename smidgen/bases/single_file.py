"""Bases in one file, as they are published for other programs; diffusers' ``from_single_file`` knows the names in them.

A file holds weights alone. How they are put together is a pipeline's: of the folder or hub name given beside it, else of the
published pipeline that diffusers takes such a file for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smidgen.errors import ConfigError
from smidgen.training.quiet import quiet

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.")
_UNET = "model.diffusion_model.input_blocks.0.0.weight"  # of every UNet in its first spelling
_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant)$")


def is_single_file(name: str | Path) -> bool:
    """Whether ``name`` is a base in one file, not a folder or a hub name.

    Raises ConfigError for a file of another kind, or that is damaged or not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return False
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"The base {str(name)!r} is a pickle, which runs whatever code its maker put into it; take the .safetensors of the same "
            "model, or write one where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT), of what is "
            "under 'state_dict' if that is there."
        )
    if path.suffix.lower() == ".gguf":
        raise ConfigError(
            f"The base {str(name)!r} is a GGUF, which is not read; take the .safetensors of the same model."
        )
    if path.suffix.lower() != ".safetensors":
        return False
    if not path.is_file():
        raise ConfigError(f"There is no file {str(name)!r}, as --base names one.")
    _shapes(path)
    return True


def published_config(name: str | Path) -> str:
    """The hub name of the pipeline that diffusers takes the file for.

    Raises ConfigError where that is none, or its configs are not here and cannot be fetched.
    """
    from diffusers import DiffusionPipeline
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub.constants import HF_HUB_OFFLINE

    give = "Give --base-config the folder of a pipeline of the same model, or its hub name."
    shapes = _shapes(name)
    try:
        found = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    except (KeyError, ValueError, UnboundLocalError, RuntimeError):
        found = ""
    if not found or (
        "stable-diffusion-v1-5" in found and _UNET not in shapes
    ):  # what diffusers says of all it does not know
        raise ConfigError(f"The base {str(name)!r} is one file, and nothing in it says of which model. {give}")
    try:
        with quiet():
            DiffusionPipeline.load_config(found)
    except (OSError, ValueError) as error:
        offline = ": HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""
        raise ConfigError(
            f"The base {str(name)!r} is one file, put together as {found!r} is, whose configs are not on this machine and cannot be "
            f"fetched{offline}. {give}"
        ) from error
    return found


def holds_more(name: str | Path) -> bool:
    """Whether the file holds more than a denoiser."""
    return any(key.startswith(_OTHER_PARTS) for key in _shapes(name))


def read_file(cls: Any, name: str | Path, config: str, options: Mapping[str, Any]) -> Any:
    """The pipeline or model of the class ``cls`` in a file; ``options`` are those of ``from_pretrained``.

    Raises ConfigError where a tensor is not in the file, which diffusers leaves without numbers, or nothing is quantised.
    """
    given = {key: value for key, value in options.items() if key not in ("use_safetensors", "variant")}
    quantized = given.get("quantization_config")
    ours = type(quantized).__name__ == "TorchAoConfig"  # which diffusers 0.42 leaves out of single files without a word
    if ours:
        del given["quantization_config"]
    found = cls.from_single_file(str(name), config=config, **given)
    parts = [found] if isinstance(found, nn.Module) else found.components.values()
    for part in parts:
        lacking = (
            [key for key, value in part.named_parameters() if value.is_meta] if isinstance(part, nn.Module) else []
        )
        if lacking:
            raise ConfigError(
                f"The base {str(name)!r} lacks {len(lacking)} tensors of a {type(part).__name__}, such as {lacking[0]!r}: the file is "
                "not whole, or --base-config names another model."
            )
    if ours:
        from torchao.quantization import quantize_

        quantize_(found, quantized.get_apply_tensor_subclass())  # type: ignore[union-attr]
    elif quantized is not None and not any("bitsandbytes" in type(m).__module__ for m in found.modules()):
        raise ConfigError(
            f"diffusers did not quantise {str(name)!r}, as it is one file; take --quantize int8-torchao or fp8."
        )
    return found


def _shapes(name: str | Path) -> dict[str, Tensor]:
    """The file's tensors without their numbers.

    Raises ConfigError for a file that is damaged, or no base's.
    """
    try:
        with safe_open(Path(name).expanduser(), "pt") as file:
            found = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The base {str(name)!r} is no whole safetensors file: {error}") from error
    if any("lora_" in key or ".lokr_" in key or ".hada_" in key for key in found):
        raise ConfigError(f"The base {str(name)!r} is an adapter's file (it holds LoRA or the like), not a base's.")
    if any(_SCALED.search(key) for key in found):
        raise ConfigError(
            f"The base {str(name)!r} holds weights of 8 bits with scales beside them, which diffusers does not apply; take the file in "
            "bf16 or fp16, and --quantize fp8 or int8-torchao for less memory."
        )
    return found
