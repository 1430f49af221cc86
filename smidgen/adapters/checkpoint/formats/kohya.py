"""kohya's keys, which ComfyUI, A1111, LyCORIS and diffusers read: ``lora_unet_<path with _>.lora_down.weight``, ``lora_up``, ``alpha``.

``lora_te_`` is the text encoder of SD 1.x and 2.x, ``lora_te1_`` and ``lora_te2_`` are SDXL's two. Layers of a transformer or of a model
alone have the prefix ``lycoris_``, by which LyCORIS and ComfyUI find them. The scale is in ``lora_up``, and alpha is the commonest rank
everywhere: of several alphas in a UNet diffusers takes one for all attention layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import write_file
from smidgen.adapters.checkpoint.files import read_safetensors
from smidgen.adapters.checkpoint.formats.diffusers import clip_name
from smidgen.adapters.checkpoint.formats.format import (
    Content,
    Format,
    Place,
    Source,
    as_weights,
    at_one_alpha,
    both,
    check_layers,
    check_pair,
    sides,
)  # fmt: skip
from smidgen.errors import AdapterFileError

ENDINGS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}


class Kohya(Format):
    """One file for all components of a pipeline."""

    name = "kohya"
    summary = "one file with kohya's keys, for ComfyUI, A1111, LyCORIS and diffusers"
    holds = "lora"
    file = "{name}.safetensors"

    def refusal(self, place: Place, source: Source) -> str | None:
        if place.kind not in ("linear", "conv2d"):
            return f"kohya's files know no {place.kind} layers; --to full-diff or merged hold it"
        if place.groups > 1:
            return "readers of kohya's files lay out a grouped convolution each in its own way; --to full-diff or merged hold it"
        return known_component(place)

    def write(self, content: Content, source: Source, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        alpha, scaled = at_one_alpha(content)
        for place, lora in scaled.items():
            name, (a, b) = file_name(place, source), as_weights(lora, place)
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        write_file(path, save(tensors, source.header))

    def check(self, content: Content, source: Source, path: Path) -> int:
        """A reader makes the names from the model's, looks for three keys of each, and takes alpha / rank as the scale."""
        found = sides(read_safetensors(path), ENDINGS, path)
        wanted = {file_name(place, source): place for place in content}
        count = check_layers(found, wanted, path, "ComfyUI")
        for name, place in wanted.items():
            a, _ = both(name, found[name], path)
            if "alpha" not in found[name]:
                raise AdapterFileError(
                    f"{path.name}: {name!r} has no alpha, without which readers disagree on the scale."
                )
            check_pair(place, name, found[name], content[place], path, float(found[name]["alpha"]) / len(a))
        return count


def file_name(place: Place, source: Source) -> str:
    """The layer's name before ``.lora_down``."""
    second = "text_encoder_2" in source.components
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if second else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    return f"{prefixes.get(place.component, 'lycoris')}_{clip_name(place).replace('.', '_')}"


def known_component(place: Place) -> str | None:
    """Why a pipeline's component has no prefix in such files; None where it has."""
    if place.component in ("", "unet", "transformer", "text_encoder", "text_encoder_2"):
        return None
    return f"files of this kind have no name for a pipeline's {place.component}; export it alone, or merge it"
