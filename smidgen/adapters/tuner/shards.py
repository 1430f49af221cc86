"""Weights that are not here whole: DTensors of FSDP2 and of tensor parallelism, DeepSpeed ZeRO-3's empty ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from smidgen.adapters.tuner.experts import ExpertStack
from smidgen.errors import TargetError


def whole(value: Tensor) -> Tensor:
    """A tensor as it is, a DTensor gathered: every process of its mesh must make the same call."""
    return value.full_tensor() if in_pieces(value) else value  # type: ignore[attr-defined,no-any-return]


def in_pieces(value: object) -> bool:
    """Whether it is a DTensor, which takes every process to read."""
    return hasattr(value, "full_tensor")


def why_partial(layer: Any) -> str | None:
    """Why the weight of a base layer cannot be read here, or None when it is whole."""
    weight: Any = getattr(layer, "weight", None)
    if in_pieces(weight):
        axes = ", ".join(map(str, getattr(weight.device_mesh, "mesh_dim_names", None) or ())) or "its mesh"
        return f"its weight is a DTensor, in pieces ({', '.join(map(str, weight.placements))}) over {axes}"
    if hasattr(weight, "ds_shape") and tuple(weight.shape) != tuple(weight.ds_shape):
        return f"its weight is empty here, DeepSpeed ZeRO-3 keeps it in pieces (ds_shape {tuple(weight.ds_shape)})"
    dims = 4 if isinstance(layer, nn.Conv2d) else 3 if isinstance(layer, ExpertStack) else 2
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if plain and (weight.numel() == 0 or weight.dim() != dims):
        return f"its weight has shape {tuple(weight.shape)} here: it is empty, or one process's piece of it"
    return None


def check_whole(name: str, layer: nn.Module) -> None:
    """An adapter goes on a layer whose weight is here.

    Raises:
        TargetError: the base is sharded already.
    """
    why = why_partial(layer)
    if why:
        raise TargetError(
            f"Target {name!r}: {why}. Put the adapter in while the weights are whole, before fully_shard, "
            "deepspeed.initialize or the Trainer shards them; tensor-parallel bases (tp_plan) and bases loaded under "
            "deepspeed.zero.Init carry no adapter of smidgen's (docs/multi_gpu.md)."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel, DataParallel, an averaged model or torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def one_writer(together: bool) -> Iterator[bool]:
    """Whether this process writes: where all make the call the first one does, and the others wait for it."""
    together = together and distributed.is_available() and distributed.is_initialized()
    try:
        yield not together or distributed.get_rank() == 0
    finally:
        if together:
            distributed.barrier()
