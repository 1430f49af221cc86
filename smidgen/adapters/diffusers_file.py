"""A plain LoRA as the one file that diffusers (``pipe.load_lora_weights``) and ComfyUI read.

Keys are ``transformer.<layer>.lora_A.weight`` and ``lora_B.weight``, with ``unet`` or ``text_encoder`` in place of ``transformer`` where
it is on those; layers are named as diffusers names them. There is no ``alpha``: the scale is in B.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.components import parts
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import SmidgenError

NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder


def pair(component: str, layer: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The two tensors of a layer, whose change is b a, by their keys."""
    named = {"lora_A": a, "lora_B": b}
    return {f"{component}.{layer}.{name}.weight": value.contiguous() for name, value in named.items()}


def write_lora(pipe: Any, folder: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Writes an adapter of the method ``lora`` on a diffusers pipeline, on all its components, as ``NAME`` in ``folder``; returns
    the file. Its present strength is in B.

    Raises:
        SmidgenError: the pipeline carries no such adapter, or one that is no plain LoRA.
    """
    tensors: dict[str, Tensor] = {}
    for where, part in parts(pipe).items():
        component = where or next(name for name in ("unet", "transformer") if getattr(pipe, name, None) is part)
        for name, layer in adapted_layers(part, adapter_name).items():
            slot = layer.slot(adapter_name)
            if type(slot.residual) is not LowRank or slot.transform is not None or slot.groups != 1:
                raise SmidgenError(
                    f"Adapter {adapter_name!r} at {component}.{name} is no plain LoRA, and diffusers' file holds nothing else; save "
                    "it with smidgen.save, or merge it into the base."
                )
            own = slot.trained()
            found = slot.residual.factors({"a": own["residual_a"], "b": own["residual_b"]})
            a, b = found.down, found.up * layer.scaling[adapter_name]
            inner = layer.get_base_layer()
            if isinstance(inner, nn.Conv2d):
                a = a.reshape(len(a), inner.in_channels, *inner.kernel_size)
                b = b.reshape(*b.shape, 1, 1)
            tensors |= pair(component, name, a.detach().float().cpu(), b.detach().float().cpu())
    if not tensors:
        raise SmidgenError(f"The pipeline carries no adapter {adapter_name!r} of Smidgen's methods.")
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(tensors, {"format": "pt"}))
    return path
