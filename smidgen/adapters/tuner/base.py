"""The base model beneath its adapters: its weights, and whether they are those that an adapter was made for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from smidgen.adapters.checkpoint import base_groups, base_lock
from smidgen.adapters.checkpoint.base_groups import Part
from smidgen.adapters.tuner import bypass, experts, targets
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer, adapted_layer
from smidgen.adapters.tuner.canary import moving_advice
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.numbers import Numbers
from smidgen.adapters.tuner.shards import check_whole, whole
from smidgen.errors import TargetError

logger = logging.getLogger("smidgen")


def check_base(config: SmidgenConfig, chosen: dict[str, nn.Module], model: nn.Module) -> None:
    """The targets must be of a supported kind and, for an adapter from a file, hold the weights it was made for.

    Raises:
        TargetError, BaseLockError: before anything of the model is touched.
    """
    for name, layer in chosen.items():
        targets.check_layer(name, layer)
        check_whole(name, layer)
        why = bypass.bypassed(model, name)
        if why:
            raise TargetError(f"Target {name!r} would have no effect: {why}.")
    if config.base_lock:
        carried = adapted_layers(model)  # a merged layer still knows its base weight
        if config.__dict__.pop("_compared", None) == id(model):  # by smidgen.load, a moment ago
            return
        lock = compare_base(config, {n: carried.get(n, m) for n, m in chosen.items()}, model)
        if not travels(config, lock):
            lock.raise_if_other(moving_advice(config))
        config.__dict__["_compared"] = id(model)
        warn_of_base(lock)
    elif config.inference_mode:  # from a file
        logger.warning(
            "This adapter carries no base lock: nobody has checked that this base is the one it was made for."
        )


def compare_base(config: SmidgenConfig, layers: dict[str, nn.Module], model: nn.Module) -> base_lock.LockReport:
    """How a model compares with the base that a config's lock is of; ``layers`` are its targets, adapted or not."""
    matrices, stored = base_matrices(layers), dict[str, torch.dtype | None]()
    for name, layer in layers.items():
        weight: Any = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight
        stored[name] = weight.dtype if _readable(weight) else None
    return base_lock.check_lock(config.base_lock, matrices, rest_of(base_parts(model), config, layers), stored)


def travels(config: SmidgenConfig, lock: base_lock.LockReport) -> bool:
    """Whether an adapter may go on a base of the right shapes and other weights: its file holds the factors, and it has no
    transform of either side, which would make something else of these weights."""
    return config.store_factors and not config.transform and not config.output and lock.difference < float("inf")


def warn_of_base(lock: base_lock.LockReport) -> None:
    """Says what :func:`compare_base` found where it is no error."""
    if lock.state == "other":
        logger.warning(
            "This is another base than the one the adapter was made for (the targets differ by %.0f%%). Its file holds the "
            "factors, so it is put in all the same; what it does here nobody has measured.",
            100 * lock.difference,
        )
    elif lock.state == "cast":
        logger.warning(
            "The base weights differ by %.1e from those the adapter was made for, as another number format does: "
            "smidgen.verify measures what that costs.",
            max(lock.difference, lock.rest or 0.0),
        )
    elif lock.state == "changed":
        logger.warning(
            "This base was changed since the adapter was made (fine-tuned, merged into, another head): it differs in %s, "
            "more than another number format explains; the targets differ by %.1e. smidgen.verify measures what that "
            "costs.",
            base_lock.difference_words(lock),
            lock.difference,
        )
    for note in lock.notes:
        logger.warning("Not compared with the base the adapter was made for: %s.", note)


def rest_of(parts: Mapping[str, Part], config: SmidgenConfig, targets: Collection[str]) -> dict[str, Part]:
    """Of the parts of a base, those that are neither a target's weight nor of a head that the adapter keeps."""
    heads = tuple(config.modules_to_save or ())
    found = {}
    for name, part in parts.items():
        owner, _, key = name.rpartition(".")
        steps = owner.split(".")
        in_head = heads and any(".".join(steps[: i + 1]).endswith(heads) for i in range(len(steps)))
        if not in_head and name not in targets and not (key == "weight" and owner in targets):
            found[name] = part
    return found


def base_parts(model: nn.Module, numbers: Numbers | None = None) -> dict[str, Part]:
    """Samples of all parameters of the base model, each once, by their names in it; ``numbers`` may hold those that the
    model has a piece of."""
    found = {}
    for name, live in base_tensors(model):
        tensor = whole(live) if numbers is None else numbers.held(name, live)
        readable = _readable(tensor)
        values = base_groups.samples(tensor) if readable and not tensor.is_meta else None
        found[name] = Part(tuple(tensor.shape), values, tensor.dtype, not readable)
    return found


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the base model, each once, by their names in it; adapters and their heads are passed over.

    Buffers are no part of it: they move with every pass (running statistics) or follow from the config. A merged layer
    still has its own weight; a weight that accelerate offloaded is fetched.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    seen: set[int] = set()

    def walk(module: Any, name: str, kept: tuple[Tensor, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        if isinstance(module, BaseTunerLayer):
            inner: Any = module
            yield from walk(inner.base_layer, name, getattr(module, "_kept", ()))
            return
        if isinstance(module, ModulesToSaveWrapper):
            yield from walk(module.original_module, name)
            return
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for key, tensor in module._parameters.items():
            tensor = kept[0] if kept and key == "weight" else tensor
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                if tensor.is_meta and weights is not None:
                    tensor = weights[key]
                yield name[:-1] if isinstance(module, experts.ExpertStack) else f"{name}{key}", tensor
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}{key}.")

    yield from walk(model.model if isinstance(model, BaseTuner) else model, "")


def fingerprint(model: nn.Module) -> str:
    """16 letters that follow from the weights of a base model, wherever it was loaded from and whatever adapters it carries.

    Example:
        >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
        False
    """
    return base_groups.fingerprint(base_tensors(model))


def base_matrices(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Base weights [rows, cols] of layers (adapted or not) by name; those of experts one below the other."""
    return {name: base_matrix(layer).flatten(0, -2) for name, layer in layers.items()}


def base_matrix(layer: nn.Module) -> Tensor:
    """The base weight of a layer, adapted or not, as a matrix [rows, cols]; of experts [experts, rows, cols]."""
    return (layer if isinstance(layer, AdaptedLayer) else adapted_layer(layer)).base_matrix().detach()


def _readable(weight: Any) -> bool:
    """Whether a weight's elements are its values: an ordinary floating-point tensor, fp8 included, not a quantised one."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
