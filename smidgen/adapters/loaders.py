"""diffusers' own LoRA calls, met by adapters of ours: each would fail later and elsewhere, or write what diffusers itself refuses.

``load_lora_weights`` of our folder, ``save_lora_adapter`` of our adapter and ``save_lora_weights`` of its state dict end in a sentence
that names ``smidgen export``, and ``save_pretrained`` of a model or pipeline that carries one in one that names ``smidgen.merge``.
Adapters of other kinds go through diffusers' code, unchanged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.files import CONFIG_NAME, read_config
from smidgen.adapters.tuner.config import PEFT_TYPE_NAME, SmidgenConfig
from smidgen.errors import SmidgenError

_HOW = "`smidgen export ADAPTER --to diffusers --out DIR`, or smidgen.adapters.export.export(pipe, DIR, 'diffusers'), writes one"


def follow() -> None:
    """Teaches what is imported of diffusers' loaders; idempotent. ``import smidgen`` has it called when one of them is."""
    base, loaders = (sys.modules.get(f"diffusers.loaders.{name}") for name in ("lora_base", "peft"))
    if mixin := getattr(base, "LoraBaseMixin", None):
        _wrap(mixin, "pack_weights", _packing, staticmethod)
    if mixin := getattr(loaders, "PeftAdapterMixin", None):
        _wrap(mixin, "save_lora_adapter", _saving)
    models, pipelines = (
        sys.modules.get(f"diffusers.{n}") for n in ("models.modeling_utils", "pipelines.pipeline_utils")
    )
    for owner in (getattr(models, "ModelMixin", None), getattr(pipelines, "DiffusionPipeline", None)):
        _wrap(owner, "save_pretrained", _saving_all)
    fetch = getattr(base, "_fetch_state_dict", None)
    if fetch is not None and not hasattr(fetch, "__wrapped__"):
        reading = _reading(fetch)
        for module in [m for name, m in sys.modules.items() if name.startswith("diffusers.loaders.")]:
            if vars(module).get("_fetch_state_dict") is fetch:
                module._fetch_state_dict = reading  # type: ignore[attr-defined]


def _wrap(
    owner: Any, name: str, wrap: Callable[[Any], Any], kind: Callable[[Any], Any] = lambda method: method
) -> None:
    method = getattr(owner, name, None)
    if method is not None and not hasattr(method, "__wrapped__"):
        setattr(owner, name, kind(wrap(method)))


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def fetch(pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        given = pretrained_model_name_or_path_or_dict
        folder = Path(given) / (kwargs.get("subfolder") or "") if isinstance(given, str | Path) else None
        named = kwargs.get("weight_name")
        if folder is not None and (named or "adapter_model").startswith("adapter_model") and is_ours(folder):
            raise SmidgenError(
                f"{folder} holds an adapter of smidgen's, no LoRA file: smidgen.load(pipe, {str(given)!r}) puts it on as it is; "
                f"for diffusers alone, `smidgen export {given} --to diffusers --out DIR` writes what load_lora_weights reads."
            )
        return method(given, *args, **kwargs)

    return fetch


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an adapter of ours and no file that diffusers looks for."""
    try:
        own = (folder / CONFIG_NAME).is_file() and read_config(folder).get("peft_type") == PEFT_TYPE_NAME
    except SmidgenError:
        return False  # diffusers says what it thinks of it
    return own and not (folder / "pytorch_lora_weights.safetensors").is_file()


def _saving(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def save_lora_adapter(
        self: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance((getattr(self, "peft_config", None) or {}).get(adapter_name), SmidgenConfig):
            raise SmidgenError(
                f"save_lora_adapter writes LoRA, and adapter {adapter_name!r} is one of smidgen's: smidgen.save(pipe, DIR) writes it as "
                f"it is; {_HOW} that diffusers reads."
            )
        return method(self, save_directory, adapter_name, *args, **kwargs)

    return save_lora_adapter


def _saving_all(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        for part in getattr(self, "components", {"": self}).values():
            configs = getattr(part, "peft_config", None) or {}
            if ours := [name for name, own in configs.items() if isinstance(own, SmidgenConfig)]:
                raise SmidgenError(
                    f"save_pretrained would write the {type(part).__name__} with its layers under names that from_pretrained does not find, as "
                    f"it carries the adapter {ours[0]!r}: smidgen.save writes the adapter alone, smidgen.merge puts it into the weights first."
                )
        return method(self, *args, **kwargs)

    return save_pretrained


def _packing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def pack_weights(layers: Any, prefix: str) -> Any:
        if isinstance(layers, dict) and any(packing.is_packed(str(key)) for key in layers):
            raise SmidgenError(
                f"save_lora_weights writes LoRA, and the {prefix} numbers given are of an adapter of smidgen's: smidgen.save(pipe, DIR) "
                f"writes it as it is; {_HOW} that diffusers reads."
            )
        return method(layers, prefix)

    return pack_weights
