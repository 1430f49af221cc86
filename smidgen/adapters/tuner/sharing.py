"""What layers of a model share: one module under several names, one weight in several layers.

A module that stands in several places is one layer, so its adapter is in all of them. A weight that several layers share
is merged into the adapted layer alone, which then has a weight of its own: merging unties.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger("smidgen")

_WRAP = "base_model.model."


def follow(model: nn.Module) -> None:
    """Puts an adapted layer in every place of its base layer, and takes one without adapters out of every place."""
    adapted = {id(layer.base_layer): layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    if not adapted:
        return
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            for name, child in module._modules.items():
                if id(child) in adapted:
                    module._modules[name] = adapted[id(child)]


def put_back(model: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Puts base layers in every place of the adapted layers whose ids they are given under."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in layers:
                module._modules[name] = layers[id(child)]


def aliases(model: nn.Module) -> dict[str, str]:
    """Names that a module has besides its first one -> the first one."""
    first: dict[int, str] = {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            found[name] = first[id(module)]
    return found


def sharers(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Adapted layer -> the other parameters of a model that are its weight too, for those that share theirs."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        name = name.removeprefix(_WRAP).removesuffix(".base_layer")
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    found = {}
    for name, layer in layers.items():
        others = owners.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
        if len(others) > 1:
            found[name] = [other for other in others if other != f"{name}.weight"]
    return found


def say_untied(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Says which layers get a weight of their own when they are merged."""
    for name, others in sharers(model, layers).items():
        logger.warning(
            "%r shares its weight with %s; merged, it has one of its own: merging unties.", name, ", ".join(others)
        )


def untie(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Gives layers of peft's, which merge into the weight where it is, a weight of their own where they share it."""
    shared = sharers(model, layers)
    say_untied(model, {name: layers[name] for name in shared})
    for name in shared:
        base = layers[name].get_base_layer()
        if type(base.weight) is nn.Parameter:
            base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)


def settle(model: nn.Module) -> None:
    """After a merge: a transformers model that no longer shares what its config ties would tie it again when it is loaded."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(module, "get_output_embeddings"):
            continue
        tied: Any = getattr(module, "all_tied_weights_keys", None)  # not before transformers 5
        for one, other in list((tied or {}).items()):
            if _get(module, one) is not _get(module, other):
                del tied[one]
        try:
            into, out = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
        except NotImplementedError:  # transformers 4's answer of a model without tokens
            continue
        if not tied and None not in (into, out) and into.weight is not out.weight:
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            logger.warning("The %s's config has tie_word_embeddings = False now.", type(module).__name__)


def _get(module: nn.Module, name: str) -> Any:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return name
