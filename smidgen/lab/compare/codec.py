"""One codec for every method, ours and peft's: what is trained, in the packed format of smidgen's files.

All trained tensors of a kind (``lora_A``, ``residual_delta``, ...) are laid end to end and stored as one tensor in fp16, int8 or int4
(``adapters.checkpoint.packing``). What follows from the base alone is not stored: a tensor that starts at the same numbers whatever the seed
(zeros, ones, a norm's scale, the singular vectors of PiSSA) is stored as its change since then. Beside it counts the config, without the fields that have
their default. Base lock, canary and checksum are left out: they are ours alone, and could stand beside any method.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters.checkpoint import packing
from smidgen.training import engine

_ASIDE = {  # of a config: where it lay, what made it, what is not of the method
    "base_lock",
    "canary",
    "checksum",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "store_dtype",
}


def trained(model: nn.Module, heads: Collection[str]) -> dict[str, nn.Parameter]:
    """What is trained of ``model`` beside its heads, by name."""
    head = {id(parameter) for parameter in engine.head_parameters(model, list(heads))}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in head}


def numbers(model: nn.Module, heads: Collection[str]) -> dict[str, Tensor]:
    """The values of :func:`trained` as they are now, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trained(model, heads).items()}


def starts_known(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that start alike with two seeds: they follow from the base."""
    return {name for name, value in first.items() if name in second and torch.equal(value, second[name])}


def stored(tensors: Mapping[str, Tensor], dtype: str) -> tuple[dict[str, Tensor], int]:
    """What comes back of ``tensors`` from a file in the format ``dtype``, and the bytes of that file.

    Raises:
        AdapterFileError: numbers that fp16 cannot hold.

    Example:
        >>> back, size = stored({"layer.lora_A.default.weight": torch.tensor([[7.0, -1.2]])}, "int4")
        >>> back["layer.lora_A.default.weight"].tolist()
        [[7.0, -1.0]]
    """
    if not tensors:
        return {}, 0
    by_target: dict[str, dict[str, Tensor]] = {}
    places = {name: _place(name) for name in tensors}
    for name, (target, kind) in places.items():
        by_target.setdefault(target, {})[kind] = tensors[name].detach().float().cpu()
    coded = packing.encode(packing.pack(by_target), dtype)
    layout = {
        target: {kind: (tuple(value.shape), torch.float32) for kind, value in own.items()}
        for target, own in by_target.items()
    }
    back = packing.unpack(packing.decode(coded, dtype, "the codec"), layout)
    return {name: back[target][kind].float() for name, (target, kind) in places.items()}, len(save(coded))


def _place(name: str) -> tuple[str, str]:
    """(where a tensor belongs, its kind), by its name in the model."""
    parts = name.split(".")
    at = parts.index(engine.NAME) - 1 if engine.NAME in parts[1:] else len(parts) - 1
    kind = "_".join(part for part in parts[at:] if part != engine.NAME)
    return ".".join(parts[:at]), f"residual_{kind}"  # as packed tensors are called


def config_bytes(config: Any) -> int:
    """Bytes of a config as the smallest JSON that says the same; 0 for the controls."""
    if not hasattr(config, "to_dict"):
        return 0
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(type(config))
    }
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _ASIDE and (name == "peft_type" or value != defaults.get(name, MISSING))
    }
    return len(json.dumps(kept, separators=(",", ":"), sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
