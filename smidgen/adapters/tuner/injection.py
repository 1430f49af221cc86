"""Into a model and out of it: adapters of any method by peft's own calls, and the tensors of peft's own methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft.mapping as peft_mapping
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from smidgen.adapters.checkpoint import packing
from smidgen.adapters.tuner import bypass, experts, sharing
from smidgen.adapters.tuner.carried import WRAP, model_keys, names_at, tuner_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.heads import saved_modules
from smidgen.adapters.tuner.matching import check_lists_of_peft
from smidgen.adapters.tuner.numbers import check_complete, renamed
from smidgen.adapters.tuner.shards import whole
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, TargetError

_OWNER = "_smidgen_peft_model"


def inject(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Puts an adapter into a model of any library by peft's own call: a host's method may ask for another peft.

    Methods whose layers share something (VeRA and its kin) keep it in a PeftModel around the model.

    Raises:
        ConfigError: peft refuses its own config.
        TargetError: a layer carries an adapter of another tuner; in files one of the two would have the wrong name.
    """
    if not isinstance(config, SmidgenConfig) and not config.inference_mode:
        check_lists_of_peft(model, config)
    owner = model if isinstance(model, PeftModel) else model.__dict__.get(_OWNER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        try:
            if owner is not None and (owner is model or _shares(config)):
                owner.add_adapter(adapter_name, config)
                owner.set_adapter(adapter_name)
            elif _shares(config):
                model.__dict__[_OWNER] = get_peft_model(model, config, adapter_name)  # no submodule: it holds the model
            else:
                inject_adapter_in_model(config, model, adapter_name)
        except SmidgenError:
            raise
        except (ValueError, TypeError) as error:
            held = getattr(owner, "peft_type", config.peft_type)
            if held != config.peft_type:
                raise ConfigError(
                    f"A PeftModel holds adapters of one kind, this one of {getattr(held, 'value', held)}: put a "
                    f"{type(config).__name__}'s on the model inside it, model.get_base_model(), on layers that carry none."
                ) from error
            raise ConfigError(f"peft refuses its own {type(config).__name__}: {error}") from error
    for name, layer in tuner_layers(model, adapter_name).items():
        if name.endswith(".base_layer") or isinstance(getattr(layer, "base_layer", None), BaseTunerLayer):
            raise TargetError(
                f"Layer {name.removesuffix('.base_layer')!r} carries an adapter of another kind; adapters of one layer are all "
                "smidgen's or all of one method of peft's. Choose other target_modules, or merge the other adapter first."
            )
    if hasattr(
        model, "_hf_peft_config_loaded"
    ):  # what transformers and diffusers ask before they save or list adapters
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        config.base_model_name_or_path = model.__dict__.get("name_or_path")


def remove(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out; layers and heads that carry no other become the base model's again."""
    for name, head in saved_modules(model, adapter_name).items():
        if set(head.modules_to_save) == {adapter_name}:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], head.original_module)
        else:
            head.delete_adapter(adapter_name, new_active_adapters=None)
    emptied: dict[int, nn.Module] = {}
    for name in model_keys(model, adapter_name).values():
        layer: Any = model.get_submodule(name)
        others = [other for other in layer.merged_adapters if other != adapter_name]
        if adapter_name in layer.merged_adapters:
            layer.unmerge()
        layer.delete_adapter(adapter_name)
        if others and not layer.merged:
            layer.merge(adapter_names=others)
        if not names_at(layer):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.base_layer)
            emptied[id(layer)] = layer.base_layer
    sharing.put_back(model, emptied)
    experts.close_stacks(model)
    bypass.follow(model)
    for module in list(model.modules()):
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            configs.pop(adapter_name, None)
            if not configs and not isinstance(module, BaseTuner):
                del module.peft_config
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        model.__dict__.pop(_OWNER, None)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def peft_tensors(model: nn.Module, adapter_name: str, given: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """What peft writes in the file of an adapter of its own, heads included, from the model or from a state dict."""
    owner = _owner(model, adapter_name)
    state = None if given is None else renamed(given, owner.state_dict())
    tensors = get_peft_model_state_dict(owner, state_dict=state, adapter_name=adapter_name)
    if given is not None:
        check_complete(tensors, get_peft_model_state_dict(owner, adapter_name=adapter_name), adapter_name)
    tensors = {name: whole(value) for name, value in tensors.items()}
    return {
        name if owner is not model or isinstance(model, PeftModel) else WRAP + name: t for name, t in tensors.items()
    }


def put_peft_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], where: str) -> None:
    """Fills an adapter of peft's own from the tensors of its file.

    Raises:
        AdapterFileError: they are not those that the adapter calls for.
    """
    owner = _owner(model, adapter_name)
    packing.check_names(tensors, peft_tensors(model, adapter_name), where)
    for name, value in tensors.items():
        packing.check_tensor(name, value, tuple(value.shape), value.dtype, where)
    wrap = WRAP if owner is model and not isinstance(model, PeftModel) else ""
    plain = {name.removeprefix(wrap): value for name, value in tensors.items()}
    try:
        set_peft_model_state_dict(owner, plain, adapter_name=adapter_name)
    except RuntimeError as error:
        raise AdapterFileError(f"{where} does not fit this model: {error}") from error


def _owner(model: nn.Module, adapter_name: str) -> Any:
    """What peft saves and loads an adapter through."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    return model.__dict__[_OWNER] if _OWNER in model.__dict__ and _shares(config) else model


def _shares(config: PeftConfig) -> bool:
    return bool(getattr(peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "uses_shared_state", False))  # type: ignore[call-overload]
