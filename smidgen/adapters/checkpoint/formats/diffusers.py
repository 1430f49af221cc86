"""``pytorch_lora_weights.safetensors``: what diffusers' ``load_lora_weights`` reads, and ComfyUI for transformers.

Keys are ``unet.<layer>.lora_A.weight`` and ``lora_B.weight``, with ``transformer``, ``text_encoder`` or ``text_encoder_2`` in place of
``unet``; layers are named as diffusers names them. There is no ``alpha``: the scale is in B. ComfyUI reads none of these keys of a UNet.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import write_file
from smidgen.adapters.checkpoint.files import LORA_NAME, check_file
from smidgen.adapters.checkpoint.formats.format import (
    Content,
    Format,
    Lora,
    Place,
    Source,
    as_weights,
    both,
    check_layers,
    check_magnitude,
    check_pair,
    sides,
)  # fmt: skip
from smidgen.adapters.checkpoint.formats.peft import MAGNITUDE, magnitude
from smidgen.errors import AdapterFileError

ENDINGS = {"lora_A.weight": "a", "lora_B.weight": "b"}
_OTHERS = {  # of files that others wrote
    "lora.down.weight": "a", "lora.up.weight": "b", "lora_down.weight": "a", "lora_up.weight": "b",
    "lora_linear_layer.down.weight": "a", "lora_linear_layer.up.weight": "b", "alpha": "alpha",
}  # fmt: skip
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


class Diffusers(Format):
    """One file for all components of a pipeline."""

    name = "diffusers"
    summary = f"{LORA_NAME} for diffusers' pipe.load_lora_weights; of a transformer for ComfyUI too"
    holds = "lora"
    magnitudes = True
    file = LORA_NAME

    def refusal(self, place: Place, source: Source) -> str | None:
        if not place.component:
            return "it is of no pipeline; peft reads a folder (--to peft)"
        if place.kind not in ("linear", "conv2d"):
            return f"diffusers has no LoRA for {place.kind} layers; --to full-diff or merged hold it"
        if place.groups > 1 or not place.plain:
            return "diffusers' LoRA of a convolution knows no groups, dilation or padding mode; --to full-diff or merged hold it"
        return _unread(place.component, source.model)

    def write(self, content: Content, source: Source, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for place, lora in content.items():
            tensors |= pair(place, lora)
            tensors |= {f"{layer_name(place)}.{end}": value for end, value in magnitude(lora, place).items()}
        write_file(path, save(tensors, source.header))

    def check(self, content: Content, source: Source, path: Path) -> int:
        """diffusers takes each component's keys by its prefix, wants ``lora`` in all of them, and the layers' own names."""
        tensors, alpha = read_tensors(path)
        found = sides(tensors, ENDINGS | MAGNITUDE, path)
        if alpha is not None:
            raise AdapterFileError(f"{path.name} names an alpha in its header, and its scale is in the factors.")
        wanted = {layer_name(place): place for place in content}
        count = check_layers(found, wanted, path, "diffusers")
        for name, place in wanted.items():
            check_pair(place, name, found[name], content[place], path)
            check_magnitude(place, found[name].get("magnitude"), content[place], path)
        return count

    @staticmethod
    def read(path: Path) -> dict[str, Lora]:
        """The LoRA in a file, of diffusers' or kohya's keys, or older ones, by the layers' names in it.

        Raises:
            AdapterFileError: keys that are no part of a plain LoRA, damage.
        """
        tensors, usual = read_tensors(path)
        found = {}
        for name, own in sides(tensors, ENDINGS | _OTHERS, path, _PROCESSOR).items():
            a, b = both(name, own, path)
            alpha = float(own["alpha"]) if "alpha" in own else usual
            found[name] = Lora(b, a, (alpha or len(a)) / len(a))
        return found


def _unread(component: str, pipe: Any) -> str | None:
    """Why a pipeline's ``load_lora_weights`` would pass a component's keys over; None where it reads them."""
    kind, instead = type(pipe).__name__, "--to merged holds it, and --to peft the module alone"
    read = getattr(pipe, "_lora_loadable_modules", None)
    if read is None:
        return f"a {kind} of diffusers has no load_lora_weights; {instead}"
    if component not in read:
        return f"the load_lora_weights of a {kind} reads {' and '.join(read)} alone; {instead}"
    if component == "transformer_2":
        return f"the load_lora_weights of a {kind} reads what it puts there from keys of the transformer; {instead}"
    return None


def layer_name(place: Place) -> str:
    """The layer's name before ``.lora_A``. Newer transformers have taken ``text_model`` out of CLIP's names, files have not."""
    return f"{place.component}.{clip_name(place)}"


def clip_name(place: Place) -> str:
    """A layer's own name; of a CLIP text encoder as all versions of transformers know it."""
    flat = place.component.startswith("text_encoder") and place.layer.startswith("encoder.layers.")
    return (
        f"text_model.{place.layer}"
        if (flat and ".self_attn." in place.layer) or (flat and ".mlp." in place.layer)
        else place.layer
    )


def pair(place: Place, lora: Lora) -> dict[str, Tensor]:
    """The two tensors of a layer by their keys."""
    return dict(zip((f"{layer_name(place)}.{end}" for end in ENDINGS), as_weights(lora, place), strict=True))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """Tensors of a LoRA file, and the alpha that diffusers wrote into its header, if it did.

    Raises:
        AdapterFileError: damage, or a header that says it is no plain LoRA.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path} is truncated or not a safetensors file ({error}).") from error
    own = {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in described.items()}
    for option in ("use_dora", "use_rslora", "alpha_pattern"):
        if own.get(option):
            raise AdapterFileError(f"{path} was trained with {option}; save it through peft, whose folders say it all.")
    alpha = own.get("lora_alpha")
    return tensors, None if alpha is None else float(alpha)
