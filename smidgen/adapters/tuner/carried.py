"""What a model carries of adapters: its adapted layers and their parameters by name, and whether they can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.tuner import sharing
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer

WRAP = "base_model.model."  # what peft puts before the names of a model's modules


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, AdaptedLayer]:
    """Adapted layers of a model by target name (without peft's wrapping), those that carry ``adapter_name`` if given."""
    return {
        name.removeprefix(WRAP): layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and (adapter_name is None or adapter_name in layer.smidgen_slots)
    }


def tuner_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Adapted layers of any method of peft's or ours by target name, those that carry ``adapter_name`` if given."""
    return {
        name.removeprefix(WRAP): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and (adapter_name is None or adapter_name in names_at(layer))
    }


def model_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Target name -> name of the module in this (possibly wrapped) model."""
    return {
        name.removeprefix(WRAP): name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in names_at(layer)
    }


def names_at(layer: Any) -> set[str]:
    """Names of the adapters at a layer."""
    held: Any = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {adapter for by_name in held if hasattr(by_name, "keys") for adapter in by_name.keys()}  # noqa: SIM118


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Parameters of adapters of any method, each once: layers may share some. Heads are not included."""
    found: dict[int, nn.Parameter] = {}
    for layer in tuner_layers(model, adapter_name).values():
        for held in (getattr(layer, name, None) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
            if isinstance(held, nn.ModuleDict | nn.ParameterDict):
                for name, value in held.items():
                    if adapter_name in (None, name):
                        own = value.parameters() if isinstance(value, nn.Module) else [value]
                        found |= {id(p): p for p in own if isinstance(p, nn.Parameter)}
    return list(found.values())


def check_mergeable(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Whether adapters of ours, the active ones unless named, can be merged wherever they are; says what that unties.

    Raises:
        SmidgenError: before anything is changed.
    """
    layers = {
        name: layer
        for name, layer in adapted_layers(model).items()
        if any(n in layer.smidgen_slots for n in adapter_names or layer.active_adapters)
    }
    for name, layer in layers.items():
        layer.check_mergeable(name)
    sharing.say_untied(model, layers)
