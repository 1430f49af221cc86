"""From a byte budget to a config: ``allocate(model, "20kB")`` says what to train where, so that the folder fits.

Bytes are those of the folder that :func:`smidgen.save` writes, ``adapter_config.json`` and ``adapter_model.safetensors``
together (peft's own ``save_pretrained`` adds about 150); the numbers of heads in ``modules_to_save`` are not counted. The rule is
measured (docs/budget.md): coefficients of seeded directions in 4 bits, on the few matrices with the largest gradient per number.
Most of it lies in the value and output projections of the last layers, so without a loss these are taken.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.checkpoint.base_groups import Part
from smidgen.adapters.tuner import patterns
from smidgen.adapters.tuner.base import base_matrices, base_parts, rest_of
from smidgen.adapters.tuner.building import members_of, slot_layout
from smidgen.adapters.tuner.config import SmidgenConfig, config
from smidgen.adapters.tuner.matching import matched_layers
from smidgen.errors import ConfigError

logger = logging.getLogger("smidgen")

Loss = Callable[[nn.Module], Tensor]
LossBatches = Iterable[Loss] | tuple[Callable[[nn.Module, Any], Tensor], Iterable[Any]]
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 1024, "mib": 2**20, "gib": 2**30}
_CANARY = {"sketch": base_lock.encode(torch.zeros(1 + base_lock.PROBES), "<f4")}
_TENSORS = 8  # that a layer's adapter has at most, whose places the heads move on
FEW = 128  # directions below which a matrix is not worth its name in the file
SHARE = 0.2  # of the largest gradient per number: what a matrix needs to be among the first
# Endings of value and output projections of attention, by the names transformers and diffusers give them.
_FIRST = ("value", "v_proj", "v_lin", "to_v", "attention.output.dense", "o_proj", "out_lin", "to_out.0", "out_proj")


def allocate(
    model: nn.Module,
    budget: int | str,
    loss_batches: LossBatches | None = None,
    *,
    target_modules: Any = "all-linear",
    **options: Any,
) -> SmidgenConfig:
    """The config of the adapter that makes the most of ``budget`` bytes on this model.

    Args:
        model: the base model with its head, as it will be given to :func:`smidgen.adapt`.
        budget: bytes of the saved folder without heads: 20000, "20kB", "1.5MB".
        loss_batches: a few callables model -> scalar loss, or a pair (loss of model and batch, batches); their
            gradients say which matrices matter. Without them the value and output projections of the last layers do.
        target_modules: what may be chosen from; all linear layers but the head unless given.
        **options: other fields of the config, as in :func:`smidgen.config` (``seed``, ``task_type``,
            ``modules_to_save``; ``store_dtype="float16"`` to keep more digits of a quarter of the numbers).

    Returns:
        A config whose folder has at most ``budget`` bytes.

    Raises:
        ConfigError: no such number of bytes, or too few: the least that works is said.
        TargetError: ``target_modules`` match nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> own = allocate(model, "1kB")
        >>> file_bytes(model, own) <= 1000
        True
    """
    limit = parse_bytes(budget)
    options = {"store_dtype": "int4"} | options
    chosen = _repeated(matched_layers(config("seeded", target_modules=target_modules, **options), model))
    matrices, parts = base_matrices(chosen), base_parts(model)
    order, first = _by_place(list(chosen))
    if loss_batches is not None:
        order, first = _by_gradient(model, chosen, loss_batches) or (order, first)
    names = list(dict(model.named_modules()))

    def plan(numbers: int) -> SmidgenConfig:
        count = _targets(numbers, first, min(min(matrices[n].shape) for n in order[:first]), len(order))
        return config("seeded", r=numbers // count, target_modules=_pattern(order[:count], names), **options)

    def size(numbers: int) -> int:
        own = plan(numbers)
        return _bytes(model, own, {n: chosen[n] for n in matched_layers(own, model)}, matrices, parts)

    least = size(1)
    if least > limit:
        raise ConfigError(
            f"A budget of {limit:,} bytes is too small for this model: an adapter of one number takes {least:,} (the "
            f"config, the base lock and the file's header). Give at least {least:,}."
        )
    low, high = 1, 2 * limit
    while low < high:  # the most numbers that fit; the names of targets make the size uneven, hence the last loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle - 1)
    while size(low) > limit:
        low -= 1
    return plan(low)


def _targets(numbers: int, first: int, full: int, every: int) -> int:
    """How many targets share ``numbers``: as many of the ``first`` as get ``FEW`` each, more once these are full."""
    if numbers <= first * full:
        return min(first, max(1, numbers // FEW))
    return min(every, -(-numbers // full))


def parse_bytes(budget: int | str) -> int:
    """Bytes of "20kB", "1.5MB", "64 KiB" or a whole number.

    Raises:
        ConfigError: anything else, or less than one byte.

    Example:
        >>> parse_bytes("1.5MB"), parse_bytes("2 KiB"), parse_bytes(700)
        (1500000, 2048, 700)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", str(budget), re.IGNORECASE)
    unit = _UNITS.get(match[2].lower()) if match else None
    if not match or not unit or isinstance(budget, bool) or float(match[1]) * unit < 1:
        raise ConfigError(f"A budget is a number of bytes such as 20000, '20kB', '1.5MB' or '64KiB', got {budget!r}.")
    return int(float(match[1]) * unit)


def file_bytes(model: nn.Module, own: SmidgenConfig) -> int:
    """Bytes of the folder that an adapter of this config would be saved as, without making it; heads are not counted.

    Raises:
        ConfigError, TargetError: the config does not fit the model.
    """
    chosen = matched_layers(own, model)
    return _bytes(model, own, chosen, base_matrices(chosen), base_parts(model))


def _bytes(
    model: nn.Module,
    own: SmidgenConfig,
    chosen: Mapping[str, nn.Module],
    matrices: Mapping[str, Tensor],
    parts: Mapping[str, Part],
) -> int:
    sizes: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    frozen: set[str] = set()
    for name, layer in chosen.items():
        for tensor, (shape, dtype) in slot_layout(own, layer, name).items():
            sizes[tensor] = sizes.get(tensor, 0) + torch.Size(shape).numel()
            dtypes[tensor] = dtype
        if own.store_factors and (residual := members_of(own, layer, name).residual) is not None:
            frozen |= {f"residual_{factor}" for factor in residual.factor_shapes()}
    zeros = {tensor: torch.zeros(n, dtype=dtypes[tensor]) for tensor, n in sizes.items()}
    tensors = packing.encode(zeros, own.store_dtype, frozen)
    lock = base_lock.blank_lock({name: matrices[name] for name in chosen}, rest_of(parts, own, chosen))
    where = own.base_model_name_or_path or model.__dict__.get("name_or_path")
    named = _named_heads(model, own)
    canary = _CANARY | ({"heads": _CANARY["sketch"]} if named else {})
    saved = replace(own, base_lock=lock, canary=canary, inference_mode=True, base_model_name_or_path=where)
    if patterns.held(own):  # as at save
        saved.target_modules = set(chosen)
    saved.seal(tensors)
    return len(save(tensors)) + named + len(saved.text().encode())


def _named_heads(model: nn.Module, own: SmidgenConfig) -> int:
    """Bytes, at most, that the names of heads take in the file's header; their numbers are not counted."""
    entries, end = 0, 0
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{head}") for head in own.modules_to_save or ()):
            for key, value in module.state_dict().items():
                end += 4 * value.numel()
                place = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end]}
                entries += len(json.dumps({f"base_model.model.{name}.{key}": place}, separators=(",", ":")))
    return entries + 2 * _TENSORS * len(str(end)) + 8 if entries else 0


# ---- which matrices come first ---------------------------------------------------------------------------------------


def _repeated(chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Targets in numbered layers, if there are any: what stands alone beside the head (a pooler) has by far the largest
    gradient and changes nothing that the head cannot."""
    numbered = {name: layer for name, layer in chosen.items() if any(part.isdigit() for part in name.split("."))}
    return numbered or chosen


def _by_place(names: list[str]) -> tuple[list[str], int]:
    """Value and output projections from the last layer backwards, then all else, and how many come first: half."""
    backwards = names[::-1]
    projections = [n for n in backwards if f".{n}".endswith(tuple(f".{end}" for end in _FIRST))]
    order = projections + [n for n in backwards if n not in set(projections)]
    return order, max(1, len(projections or order) // 2)


def _by_gradient(
    model: nn.Module, chosen: Mapping[str, nn.Module], loss_batches: LossBatches
) -> tuple[list[str], int] | None:
    """Targets by |dLoss/dW| / sqrt(rows cols), the largest first, and how many have ``SHARE`` of it.

    That is the gradient that a number of the matrix sees, as any fixed direction does. None where there is no gradient.
    """
    weights = {n: layer.weight for n, layer in chosen.items() if isinstance(layer.weight, nn.Parameter)}
    if len(weights) < len(chosen) or not all(w.is_floating_point() for w in weights.values()):
        logger.warning("The weights of a quantised base take no gradient; the budget is spent on the last layers.")
        return None
    scores = dict.fromkeys(weights, 0.0)
    with _trainable(model, weights.values()):
        for loss in _losses(loss_batches):
            loss(model).backward()
            for name, w in weights.items():
                if w.grad is not None:
                    scores[name] += float(w.grad.float().norm()) / w.numel() ** 0.5
                    w.grad = None
    largest = max(scores.values())
    if not largest or not all(isfinite(score) for score in scores.values()):
        logger.warning("The loss gives no finite gradient to any target; the budget is spent on the last layers.")
        return None
    order = sorted(scores, key=lambda name: -scores[name])
    return order, sum(score >= SHARE * largest for score in scores.values())


def _losses(loss_batches: LossBatches) -> Iterator[Loss]:
    if isinstance(loss_batches, tuple) and len(loss_batches) == 2 and not callable(loss_batches[1]):
        loss, batches = loss_batches
        return (partial(_on, loss, batch) for batch in batches)
    return iter(loss_batches)  # type: ignore[arg-type]


def _on(loss: Callable[[nn.Module, Any], Tensor], batch: Any, model: nn.Module) -> Tensor:
    return loss(model, batch)


@contextmanager
def _trainable(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, gradients reach these weights and nothing else; afterwards flags and gradients are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag, grad in before:
            p.grad = grad
            p.requires_grad_(flag)


# ---- targets in few bytes --------------------------------------------------------------------------------------------


def _pattern(wanted: Sequence[str], names: Sequence[str]) -> str | list[str]:
    """The shortest way to say ``wanted`` among the modules ``names``: endings, a regular expression, or whole names."""
    ends = sorted({name.rpartition(".")[2] for name in wanted})
    matched = {n for n in names if n.rpartition(".")[2] in ends}
    regex = _regex(wanted)
    ways: list[str | list[str]] = [ends] if matched == set(wanted) else []
    ways += [regex] if {n for n in names if re.fullmatch(regex, n)} == set(wanted) else []
    return min([*ways, sorted(wanted)], key=lambda way: len(str(way)))


def _regex(wanted: Sequence[str]) -> str:
    """One regular expression: names that differ by their first number share an alternative."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in sorted(wanted):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        head, number, tail = (
            (name, "", "") if at is None else (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :]))
        )
        numbers.setdefault((head, tail), []).append(number)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), own in numbers.items():
        tails.setdefault((head, tuple(own)), []).append(tail)
    return "|".join(
        ".".join(part for part in (head, _either(own), _either(ends)) if part) for (head, own), ends in tails.items()
    )


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"
