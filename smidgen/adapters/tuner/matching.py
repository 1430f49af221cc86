"""Which layers of a model a config's targets hit: peft's own matching, with fused experts, and checked for misses."""

from __future__ import annotations

import copy
import logging
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from smidgen.adapters.tuner import bypass, experts, sharing, targets
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.errors import TargetError

logger = logging.getLogger("smidgen")


def matched_layers(config: SmidgenConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Base layers that a config's targets hit in a model, by name, checked for misses.

    Raises:
        TargetError: an entry matches nothing.
    """
    if config.target_modules is None:
        raise TargetError("The config names no target_modules; smidgen.adapt and peft fill them in for known models.")
    modules = outside_adapters(model)
    targets.check_shapes(modules)
    if is_all_linear(config):
        heads = [*(config.modules_to_save or ()), *(SEQ_CLS_HEAD_NAMES if config.task_type == "SEQ_CLS" else ())]
        left_out = tuple(f".{head}" for head in heads)
        found = {n: m for n, m in modules.items() if _is_linear_target(m, model) and not f".{n}".endswith(left_out)}
        wanted: Any = set(_called(found, model))
    else:
        wanted = config.target_modules
    adaptable = _matches(
        config, modules, target_modules=wanted, **dict.fromkeys(("exclude_modules", "layers_to_transform"))
    )
    chosen = _matches(config, modules, target_modules=wanted)
    meant = [n for n, m in modules.items() if n in adaptable or not experts.is_stack(m)]
    targets.check_fused(config.target_modules, meant, modules.keys() - meant)
    targets.check_names(config.target_modules, meant, list(adaptable), sharing.aliases(model))
    if config.base_lock is None:  # what a file lists was checked when it was made, and is held against its tensors
        targets.check_lists(config, list(modules), list(adaptable), list(chosen))
    targets.check_any(config.target_modules, list(chosen))
    return {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in chosen.items()}


def outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name and its fused experts, adapted ones as they are, without what is inside them."""
    modules = {n: m for n, m in model.named_modules() if n and ".smidgen_slots" not in n} | experts.stacks(model)
    inside = tuple(f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer))
    return {n: m for n, m in modules.items() if not (inside and n.startswith(inside))}


def is_target(config: Any, name: str) -> Any:
    """Whether peft finds a name in a config's lists; what makes a parametrised weight is no layer, whatever its name."""
    return ".parametrizations." not in name and BaseTuner._check_target_module_exists(config, name)


def _matches(config: Any, modules: dict[str, nn.Module], **changes: Any) -> dict[str, nn.Module]:
    """The modules that a config's targets and what restricts them match; the owner of fused experts stands for them."""
    own = copy.copy(config)
    own.__dict__.update(changes)
    matched = {n: m for n, m in modules.items() if is_target(own, n)}
    fused = [n for n, m in modules.items() if experts.is_stack(m)]
    for name in list(matched) if fused else ():
        if name in fused and not experts.is_named(own.target_modules, name):
            del matched[name]
        if owned := experts.inside(name, fused):
            del matched[name]
            matched |= {n: modules[n] for n in owned}
    return matched


def naming_stacks(config: Any, model: nn.Module, chosen: dict[str, nn.Module], stacked: set[str]) -> set[str]:
    """Targets that name fused experts themselves, where those of a config name the modules that own them."""
    modules = outside_adapters(model)
    if isinstance(config.target_modules, str):
        return set(chosen)
    owners = {name.rpartition(".")[0] for name in stacked}
    kept = {t for t in config.target_modules if not any(f".{owner}".endswith(f".{t}") for owner in owners)}
    rest = chosen.keys() - _matches(config, modules, target_modules=kept).keys()
    fused = stacked & rest
    return kept | targets.shortest_names(fused, modules, 2) | targets.shortest_names(rest - fused, modules)


def is_all_linear(config: SmidgenConfig) -> bool:
    """Whether a config asks for every linear layer, as peft's word for it does."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _called(chosen: dict[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
    """What "all-linear" found without the layers that are known not to be called.

    Raises:
        TargetError: none is left.
    """
    read = {name: why for name in chosen if (why := bypass.bypassed(model, name))}
    if read:
        name, why = next(iter(read.items()))
        if len(read) == len(chosen):
            raise TargetError(f"'all-linear' finds no layer that is called: {name!r}: {why}.")
        logger.warning("all-linear leaves out %d of %d layers, such as %r: %s.", len(read), len(chosen), name, why)
    return {n: m for n, m in chosen.items() if n not in read}


def _is_linear_target(module: nn.Module, model: nn.Module) -> bool:
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = kind_of(inner)
    if kind is None or kind.name in ("conv2d", "experts"):
        return False
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return inner is not head


def check_lists_of_peft(model: nn.Module, config: Any) -> None:
    """The lists of one of peft's own configs, which passes over a name that matches nothing when another does."""
    own = getattr(config, "target_modules", None)
    if (
        own is None
        or (isinstance(own, str) and own.lower() == "all-linear")
        or getattr(config, "target_parameters", None)
    ):
        return
    modules = {n: m for n, m in outside_adapters(model).items() if not n.endswith(".base_layer")}
    names, nothing = list(modules), dict.fromkeys(("exclude_modules", "layers_to_transform"))
    adaptable = list(_matches(config, modules, **nothing))
    targets.check_names(own, names, adaptable, sharing.aliases(model))
    targets.check_lists(config, names, adaptable, list(_matches(config, modules)))
