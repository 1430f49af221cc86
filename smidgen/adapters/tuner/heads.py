"""Heads that train beside an adapter (``modules_to_save``), and what trains and would be in no file."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from smidgen.adapters.tuner import bypass
from smidgen.adapters.tuner.carried import WRAP, adapted_layers, adapter_parameters
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.errors import SmidgenError


def saved_modules(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Heads in modules_to_save (peft's wrappers) by name in this model, those of ``adapter_name`` if given."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in (None, *module.modules_to_save)
    }


def named_heads(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Tensors of the heads that an adapter trained: name in any peft file -> (name in the model's state dict, tensor)."""
    held = {
        name: (f"{name}.modules_to_save.{adapter_name}", head.modules_to_save[adapter_name])
        for name, head in saved_modules(model, adapter_name).items()
    }
    held |= {name: (name, head) for name, head in _bare_heads(model, adapter_name).items()}
    return {
        f"{WRAP}{name.removeprefix(WRAP)}.{key}": (f"{where}.{key}", value.detach())
        for name, (where, head) in held.items()
        for key, value in head.state_dict().items()
    }


def head_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of the heads that an adapter trained, under the names they have in any peft file."""
    return {name: value for name, (_, value) in named_heads(model, adapter_name).items()}


def base_heads(model: nn.Module, config: SmidgenConfig) -> dict[str, Tensor]:
    """Tensors of the base model's own heads that an adapter of this config would carry, named as in its file."""
    wrapped = saved_modules(model)
    inside = tuple(f"{name}." for name in wrapped)
    heads = {
        n: wrapped[n].original_module if n in wrapped else m
        for n, m in model.named_modules()
        if n.endswith(tuple(config.modules_to_save or ())) and not (inside and n.startswith(inside))
    }
    return {f"{WRAP}{n}.{key}": value for n, m in heads.items() for key, value in m.state_dict().items()}


def as_in_file(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that peft is about to put into a model, by the names that they have in its file."""
    held = {
        f"{name}.{inside}": f"{name}.{key}"
        for name, head in saved_modules(model, adapter_name).items()
        for key, inside in head.adapter_state_dict_load_map(adapter_name).items()
    }
    return {held.get(name, name): value for name, value in tensors.items()}


def unsaved(model: nn.Module, adapter_name: str) -> list[str]:
    """Parameters of the base that train and that no file of the adapter would hold."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    if getattr(config, "bias", "none") != "none":  # peft trains and saves those itself
        return []
    brought: list[nn.Module] = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    brought += [bank for layer in adapted_layers(model).values() for bank in layer.banks.values()]
    brought += _bare_heads(model, adapter_name).values()
    saved = {id(p) for p in adapter_parameters(model)} | {id(p) for m in brought for p in m.parameters()}
    return [
        n.removeprefix(WRAP)
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in saved and not bypass.is_fused(n)
    ]


def check_saved(model: nn.Module, adapter_name: str) -> None:
    """Nothing that was trained may be left out of an adapter's file.

    Raises:
        SmidgenError: a head or another part of the base was unfrozen by hand.
    """
    if left_out := unsaved(model, adapter_name):
        raise SmidgenError(say_unsaved(left_out, adapter_name))


def say_unsaved(left_out: list[str], adapter_name: str) -> str:
    """What to do about parts of the base that train beside an adapter."""
    owners = list(dict.fromkeys(name.rpartition(".")[0].replace(".base_layer", "") for name in left_out))
    named = ", ".join(map(repr, owners[:3])) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
    return (
        f"{len(left_out)} tensors of the base were unfrozen by hand, of {named}, and an adapter's file would hold none of them: "
        f"name them in modules_to_save (now: model.peft_config[{adapter_name!r}].modules_to_save = {owners[:3]}), or freeze them "
        "with requires_grad_(False) if they were not trained."
    )


def _bare_heads(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Heads that modules_to_save names and that peft has not wrapped: named after the adapter was put in."""
    named = tuple(getattr(model.peft_config[adapter_name], "modules_to_save", None) or ())  # type: ignore[index]
    inside = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper | BaseTunerLayer)
    )
    return {
        n: m
        for n, m in model.named_modules()
        if n.endswith(named) and not f"{n}.".startswith(inside) and not isinstance(m, BaseTunerLayer)
    }
