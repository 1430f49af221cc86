"""How many numbers a config trains, without weights, on the meta device.

A config of this library is counted from geometry alone, N = sum over target modules of

    groups * count(transform) + count(residual)          (each member's docstring has its formula; experts * both)

and any other peft config by letting peft put it into a copy of the model without storage. Heads (``modules_to_save``)
are not part of an adapter and not counted; biases and embeddings that an adapter itself trains are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.api import default_targets
from smidgen.adapters.tuner.building import members_of
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.config import config as make_config
from smidgen.adapters.tuner.experts import close_stacks
from smidgen.adapters.tuner.matching import matched_layers
from smidgen.adapters.tuner.targets import check_layer, parse_energy
from smidgen.errors import ConfigError


def count(model: nn.Module, method_or_config: str | PeftConfig, **options: Any) -> int:
    """Numbers that an adapter would train.

    Args:
        model: a torch model (left untouched, its weights are not read).
        method_or_config: a config from :func:`smidgen.config`, any peft config, or a method's name. Without
            ``target_modules`` the model's defaults are taken.
        **options: as in :func:`smidgen.config` when a method is named.

    Returns:
        Trained numbers, heads in ``modules_to_save`` not included.

    Raises:
        ConfigError: an unknown method, a rank that only weights can tell (``r="energy:0.99"``), or a
            config that peft refuses.
        TargetError: a target that matches nothing or cannot carry an adapter.

    Example:
        >>> count(nn.Sequential(nn.Linear(64, 32)), "svfit", r=8, target_modules=["0"])
        8
    """
    own = chosen_config(method_or_config, options)
    if isinstance(own, SmidgenConfig):
        if own.target_modules is None:
            own.target_modules = default_targets(model)
        return _count_members(model, own)
    return _count_by_injection(_without_storage(model), own)


def chosen_config(method_or_config: str | PeftConfig, options: Mapping[str, Any]) -> PeftConfig:
    """A config of the caller's own: made from a method's name and its options, or a copy of the one given."""
    if isinstance(method_or_config, str):
        return make_config(method_or_config, **options)
    if options:
        raise ConfigError(f"Options {sorted(options)} go with a method's name; set them in the config itself.")
    if not isinstance(method_or_config, PeftConfig):
        raise ConfigError(f"A config is a method's name or a peft config, got a {type(method_or_config).__name__}.")
    return copy.deepcopy(method_or_config)


# ---- configs of this library ---------------------------------------------------------------------------------------


def _count_members(model: nn.Module, config: SmidgenConfig) -> int:
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    chosen = matched_layers(config, model)
    _refuse_energy(config, chosen)
    return sum(_count_at(config, name, layer) for name, layer in chosen.items())


def _count_at(config: SmidgenConfig, target: str, layer: nn.Module) -> int:
    """Trained numbers at one target."""
    check_layer(target, layer)
    return members_of(config, layer, target).trained()


def _refuse_energy(config: SmidgenConfig, chosen: Iterable[str]) -> None:
    """``r="energy:0.99"`` is a rank a layer once a file or a tuner has fixed it in ``rank_pattern``, not before."""
    if isinstance(config.r, str) and config.r.startswith("energy:") and set(chosen) - set(config.rank_pattern):
        parse_energy(config.r, config.residual)
        raise ConfigError(
            f"r={config.r!r} follows from the singular values of the weights and cannot be counted without them; count "
            "a whole number or 'full' (its upper bound), or adapt a model with weights and ask smidgen.trained_numbers."
        )


# ---- any other peft config -----------------------------------------------------------------------------------------


def _count_by_injection(model: nn.Module, config: PeftConfig) -> int:
    """What requires grad after peft put the adapter into a model that has shapes but no storage.

    Where peft builds a different adapter on different machines it counts what this machine would get: without BOFT's
    CUDA extension, peft trains one butterfly factor whatever ``boft_n_butterfly_factor`` says. AdaLoRA's ``ranknum``
    holds the current rank and is left out: peft freezes it, but loses the flag on the meta device.
    """
    if not config.is_prompt_learning:
        config.task_type = None  # the task only adds a head
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = False  # type: ignore[attr-defined]  # PiSSA and its like read the weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"peft refuses this {type(config).__name__} for a {type(model).__name__}: {error} ({type(error).__name__})."
        ) from error
    left_out = (".modules_to_save.", ".ranknum.")
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    return sum(p.numel() for n, p in trained if not any(part in n for part in left_out))


def _without_storage(model: nn.Module) -> nn.Module:
    """A frozen copy of a model on the meta device, adapters it carries taken off; the model itself is not touched."""
    stand_ins: dict[int, Any] = {}
    for p in model.parameters():
        empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
        stand_ins[id(p)] = nn.Parameter(empty, requires_grad=False)
    for b in model.buffers():
        stand_ins[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="meta")
    bare = copy.deepcopy(model, stand_ins)
    bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare
    for name, layer in list(bare.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(bare.get_submodule(parent), child, layer.get_base_layer())
    close_stacks(bare)
    if "peft_config" in bare.__dict__:
        del bare.peft_config
    return bare
