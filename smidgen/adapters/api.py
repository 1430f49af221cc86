"""The short forms: adapt, save, load, and what a model carries. Everything also works through peft's own calls."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.files import CONFIG_NAME, read_config, read_tensors
from smidgen.adapters.tuner.config import PEFT_TYPE_NAME, SmidgenConfig, config
from smidgen.adapters.tuner.coverage import SMALL, coverage, gaps
from smidgen.adapters.tuner.layer import MERGE_REFUSE
from smidgen.adapters.tuner.peft_bridge import (
    adapted_layers,
    base_heads,
    check_base,
    file_tensors,
    head_tensors,
    inject,
    matched_layers,
    remove,
    saved_modules,
    slot_layout,
    stamp,
)
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, TargetError, did_you_mean

logger = logging.getLogger("smidgen")


def adapt(
    model: nn.Module,
    method_or_config: str | PeftConfig,
    adapter_name: str = "default",
    **options: Any,
) -> nn.Module:
    """Puts a fresh adapter into a model, in place: the output stays bit for bit the base model's until it is trained.

    Args:
        model: any torch module (diffusers and transformers models and ``PeftModel`` keep their class), or a whole
            diffusers pipeline, whose UNet or transformer is adapted.
        method_or_config: a method ("svfit"), or a config from :func:`smidgen.config` or peft.
        adapter_name: must be new in this model.
        **options: as in :func:`smidgen.config` when a method is named.

    Returns:
        The same model, its base frozen, the new adapter active and trainable.

    Raises:
        ConfigError, TargetError: before anything of the model is changed.

    Example:
        >>> model = adapt(nn.Sequential(nn.Linear(64, 64)), "svfit", r=8, target_modules=["0"])
        >>> trained_numbers(model)
        8
    """
    if model is not denoiser(model):
        adapt(denoiser(model), method_or_config, adapter_name, **options)
        return model
    own = config(method_or_config, **options) if isinstance(method_or_config, str) else method_or_config
    if not isinstance(method_or_config, str) and options:
        raise ConfigError(f"Options {sorted(options)} go with a method's name; set them in the config itself.")
    _check_name(model, adapter_name)
    chosen_here = isinstance(own, SmidgenConfig) and own.target_modules is None
    everything = isinstance(own, SmidgenConfig) and own.target_modules == "all-linear"
    if isinstance(own, SmidgenConfig) and own.target_modules is None:
        own = replace(own, target_modules=default_targets(model))
    with _all_or_nothing(model, adapter_name):
        inject(model, own, adapter_name)
        set_active(model, adapter_name)
        for layer in adapted_layers(model, adapter_name).values():
            layer.slot(adapter_name)
    if chosen_here or everything:
        _say_gaps(model, adapter_name, chosen_here)
    return model


def _say_gaps(model: nn.Module, adapter_name: str, chosen_here: bool) -> None:
    """Warns when targets that nobody named leave out main parts of a model."""
    found = coverage(model, adapter_name)
    said = gaps(found) if chosen_here else []
    if found.fused >= SMALL:
        said.append(f"{found.fused:.0%} of the parameters are in fused weights (experts), which carry no adapter")
    if said:
        logger.warning(
            "The %s targets reach %d of %d layers of this %s, %.1f%% of its parameters: %s.%s",
            "default" if chosen_here else "all-linear",
            found.layers,
            found.there,
            type(model).__name__,
            100 * found.share,
            "; ".join(said),
            ' Name target_modules, or take "all-linear", to choose others.' if chosen_here else "",
        )


def denoiser(model: Any) -> nn.Module:
    """The module that adapters go on: the model itself, or the UNet or transformer of a diffusers pipeline."""
    if isinstance(model, nn.Module):
        return model
    components = getattr(model, "components", {})
    for name in ("unet", "transformer"):
        if isinstance(components.get(name), nn.Module):
            return components[name]
    raise SmidgenError(
        f"Expected a torch module or a diffusers pipeline with a unet or transformer, got a {type(model).__name__}."
    )


@contextmanager
def _all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within, a model is given an adapter; on an error it becomes what it was: classes, active adapters and flags."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    active = [(layer, list(layer.active_adapters)) for layer in adapted_layers(model).values()]
    try:
        yield
    except BaseException:
        remove(model, adapter_name)
        for layer, names in active:
            layer._active_adapter = names
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def default_targets(model: nn.Module) -> set[str]:
    """The attention projections of the architectures the papers use, as far as the model has them.

    Raises:
        TargetError: none is there.
    """
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    attention = {"to_q", "to_k", "to_v", "to_out.0"}
    pairs = (("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("q_lin", "v_lin"))
    candidates = [*map(set, pairs), {"c_attn"}, {"query_key_value"}]
    if {"to_q", "to_k", "to_v"} <= ends:
        return attention
    for wanted in candidates:
        if wanted <= ends:
            return set(wanted)
    raise TargetError(
        f"No known attention projections in a {type(model).__name__}; name target_modules. Modules end in: "
        f"{', '.join(sorted(e for e in ends if e and not e.isdigit())[:20])}."
    )


def _check_name(model: nn.Module, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise SmidgenError(f"An adapter's name is a word without dots, got {adapter_name!r}.")
    if adapter_name in names(model):
        raise SmidgenError(f"The model already carries an adapter named {adapter_name!r}; choose another adapter_name.")


# ---- files -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, all or nothing.

    Returns:
        The folder.

    Raises:
        SmidgenError: the model carries no such adapter.
    """
    model = denoiser(model)
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise SmidgenError(f"The model carries no adapter {adapter_name!r}.{did_you_mean(adapter_name, names(model))}")
    own: SmidgenConfig = model.peft_config[adapter_name]  # type: ignore[index,assignment]
    stamp(own, layers, adapter_name)
    tensors = file_tensors(own, layers, adapter_name)
    tensors |= head_tensors(model, adapter_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        inference, own.inference_mode = own.inference_mode, True
        try:
            own.save_pretrained(str(scratch))
        finally:
            own.inference_mode = inference
        save_file({k: v.contiguous() for k, v in tensors.items()}, scratch / SAFETENSORS_WEIGHTS_NAME)
        (scratch / SAFETENSORS_WEIGHTS_NAME).chmod((scratch / CONFIG_NAME).stat().st_mode)  # safetensors writes 0600
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def load(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Loads an adapter folder into a model and makes it active. Everything is checked first; on any error the model is
    left as it was.

    Args:
        model: the base model (any torch module, or one that already carries adapters), or a whole diffusers pipeline.
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: any name; need not be the one it was saved under.

    Raises:
        AdapterFileError: a missing, truncated, hostile or ill-fitting file, NaN included.
        BaseLockError: another base model.
        TargetError: the base lacks the target modules.
    """
    if model is not denoiser(model):
        load(denoiser(model), path, adapter_name)
        return model
    _check_name(model, adapter_name)
    own, tensors = read_adapter(path)
    unpacked, heads = _fit(model, own, tensors, str(path))
    with _all_or_nothing(model, adapter_name):
        inject(model, own, adapter_name)
        set_active(model, adapter_name)
        for name, layer in adapted_layers(model, adapter_name).items():
            layer.smidgen_slots[adapter_name].fill(unpacked[name])  # type: ignore[operator]
            layer.slot(adapter_name)
        with torch.no_grad():
            for name, tensor in head_tensors(model, adapter_name).items():
                tensor.copy_(heads[name])
    return model


def read_adapter(path: str | os.PathLike[str]) -> tuple[SmidgenConfig, dict[str, Tensor]]:
    """(config, tensors) of an adapter folder, whichever library wrote it: the one reader of ``load`` and ``verify``.

    Raises:
        AdapterFileError: a missing, truncated or hostile file, or another kind of adapter.
    """
    return read_smidgen_config(path), packing.plain_keys(read_tensors(path))


def read_smidgen_config(path: str | os.PathLike[str]) -> SmidgenConfig:
    """The config of an adapter folder.

    Raises:
        AdapterFileError: no folder, no config, or another kind of adapter.
    """
    data = read_config(path)
    kind = data.get("peft_type")
    if kind != PEFT_TYPE_NAME:
        raise AdapterFileError(
            f"{path} holds a peft adapter of type {kind!r}, not one of smidgen's; "
            "load it with peft.PeftModel.from_pretrained."
        )
    known = set(SmidgenConfig.__dataclass_fields__)
    unknown = sorted(set(data) - known)
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise AdapterFileError(f"{path}: adapter_config.json has unknown keys {unknown}.{hint}")
    fields = {k: v for k, v in data.items() if k not in ("peft_type", "auto_mapping")}
    try:
        return SmidgenConfig(**fields)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise AdapterFileError(f"{path}: adapter_config.json is damaged ({error}).") from error


def _fit(
    model: nn.Module, own: SmidgenConfig, tensors: dict[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Checks a file against a model without touching it: (tensors by target, heads in modules_to_save)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    chosen = matched_layers(None, own, inner)
    check_base(own, chosen, inner)
    layout = {name: slot_layout(own, layer, name) for name, layer in chosen.items()}
    heads = base_heads(inner, own)
    packing.check_names(tensors, {name for own in layout.values() for name in own} | heads.keys(), where)
    for name, wanted in heads.items():
        packing.check_tensor(name, tensors[name], tuple(wanted.shape), wanted.dtype, where)
    packed = {k: v for k, v in tensors.items() if k not in heads}
    return packing.unpack(packed, layout, where), {k: tensors[k] for k in heads}


# ---- what a model carries --------------------------------------------------------------------------------------------


def names(model: nn.Module) -> list[str]:
    """Names of the adapters a model carries, peft's other methods included."""
    return list(getattr(model, "peft_config", None) or {})


def trained_numbers(model: nn.Module, adapter_name: str | None = None) -> int:
    """Trained numbers of a model's adapter(s), heads in modules_to_save not included."""
    slots = (
        slot
        for layer in adapted_layers(model, adapter_name).values()
        for name, slot in layer.smidgen_slots.items()
        if adapter_name in (None, name)
    )
    return sum(p.numel() for slot in slots for p in slot.parameters())


def set_active(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Makes adapters active, several at once if a list is given: their deltas add."""
    wanted = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in set(wanted) - set(names(model)):
        raise SmidgenError(f"The model carries no adapter {name!r}.{did_you_mean(name, names(model))}")
    heads = {name: [n for n in wanted if n in head.modules_to_save] for name, head in saved_modules(model).items()}
    for name, trained in heads.items():
        if len(trained) > 1:
            raise SmidgenError(f"{name!r} was trained by each of {trained}; heads do not add, make one of them active.")
    for layer in adapted_layers(model).values():
        layer.set_adapter(wanted)
    for name, head in saved_modules(model).items():
        head.set_adapter(heads[name])
    if isinstance(model, PeftModel) and len(wanted) == 1:
        model.active_adapter = wanted[0]


def set_strength(model: nn.Module, strength: float | dict[str, float]) -> None:
    """Sets the strength of all adapters, or of each by name; 0 is the base model, the delta is linear in it."""
    known = {name for layer in adapted_layers(model).values() for name in layer.smidgen_slots}
    wanted = dict.fromkeys(known, float(strength)) if isinstance(strength, (int, float)) else strength
    for name in set(wanted) - known:
        raise SmidgenError(f"The model carries no adapter {name!r}.{did_you_mean(name, known)}")
    for layer in adapted_layers(model).values():
        for name, value in wanted.items():
            layer.set_scale(name, value)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within: exactly the base model, also when nested or after merging."""
    layers = adapted_layers(model).values()
    heads = [(head, head.disable_adapters) for head in saved_modules(model).values()]
    before = [
        (layer, layer.disable_adapters, list(layer.merged_adapters), list(layer.active_adapters)) for layer in layers
    ]
    grads = [(p, p.requires_grad) for layer in layers for p in layer.smidgen_slots.parameters()]
    grads += [(p, p.requires_grad) for head, _ in heads for p in head.parameters()]
    try:
        for head, _ in heads:
            head.enable_adapters(False)
        for layer, _, merged, _ in before:
            if merged:
                layer.unmerge()
            layer.enable_adapters(False)
        yield model
    finally:
        for layer, was_off, merged, active in before:
            if not was_off:
                layer._disable_adapters = False
                layer._active_adapter = active
            if merged:
                layer.merge(adapter_names=merged)
        for head, was_off in heads:
            head._disable_adapters = was_off
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def parameter_groups(
    model: nn.Module, lr: float, transform_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: residuals, transforms (0.3 x lr unless given; TLoRA sheet, section 6.5) and all else that trains.

    Decay is safe on every member: trained numbers are differences from the start, except LoRA's and the ring's cores.
    """
    groups: dict[str, list[nn.Parameter]] = {"residual": [], "transform": [], "other": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            last = name.rpartition(".")[2]
            kind = last.partition("_")[0] if ".smidgen_slots." in name else "other"
            groups[kind].append(p)
    rates = {"residual": lr, "transform": 0.3 * lr if transform_lr is None else transform_lr, "other": lr}
    return [
        {"name": kind, "params": params, "lr": rates[kind], "weight_decay": weight_decay}
        for kind, params in groups.items()
        if params
    ]


def merge(model: nn.Module, adapter_names: list[str] | None = None) -> nn.Module:
    """Merges adapters into the base weights and takes the adapted layers away, in place; refuses when rounding to the
    weights' dtype would lose more than half of an update, before anything is changed."""
    layers = adapted_layers(model)
    for name in set(adapter_names or ()) - set(names(model)):
        raise SmidgenError(f"The model carries no adapter {name!r}.{did_you_mean(name, names(model))}")
    for name, layer in layers.items():
        wanted = [n for n in (adapter_names or layer.active_adapters) if n in layer.smidgen_slots]
        if wanted:
            layer.check_mergeable()
            merged, error = layer.merged_weight(wanted)
            if error > MERGE_REFUSE or not bool(torch.isfinite(merged).all()):
                raise SmidgenError(
                    f"Merging {wanted} at {name!r} would lose {error:.0%} of the update to rounding in {merged.dtype}; "
                    "cast the base to float32 first, or keep the adapter unmerged."
                )
    for name, head in saved_modules(model).items():
        merged_heads = [n for n in adapter_names or head.active_adapters if n in head.modules_to_save]
        trained = head.modules_to_save[merged_heads[0]] if merged_heads else head.original_module
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], trained)
    for layer in layers.values():
        layer.merge(adapter_names=adapter_names)
        layer._kept, layer.merged_adapters = None, []
    for adapter_name in names(model):
        remove(model, adapter_name)
    return model


__all__ = [
    "adapt",
    "default_targets",
    "disabled",
    "load",
    "merge",
    "names",
    "parameter_groups",
    "read_adapter",
    "read_smidgen_config",
    "save",
    "set_active",
    "set_strength",
    "trained_numbers",
]
