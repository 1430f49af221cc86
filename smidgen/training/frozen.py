"""Frozen matrices multiplied in bfloat16, on processors that do so: what is trained, and all else, stays in its own precision.

Half the bits are half the work, and a frozen matrix has no small steps that rounding could lose. Its products are
rounded to 8 bits, about .4 %, the same for every method; gradients pass through the same rounded matrix. The frozen factors around a
trained diagonal (svfit, loldu, seeded) are such matrices too.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.adapters.tuner.kinds import Conv2dKind, ExpertsKind
from smidgen.adapters.tuner.layer import ShiftLayer
from smidgen.adapters.tuner.slot import Slot
from smidgen.training.quick import multiplies_bf16

logger = logging.getLogger(__name__)

Matmuls = Literal["base", "bf16"]  # the base's own precision, or bfloat16


@contextmanager
def frozen_matmuls(model: nn.Module, how: Matmuls) -> Iterator[bool]:
    """Within, the frozen fp32 linear layers of ``model``, and the frozen factors of its adapters, multiply as ``how`` says; yields
    whether in bf16.

    The weights themselves stay as they are, so that adapters made of them do too; each gets a copy in half the bytes.
    """
    device = next(model.parameters()).device
    if how == "bf16" and not multiplies_bf16(device):
        logger.warning(
            "This processor does not multiply in bf16; frozen matrices are multiplied in their own precision."
        )
    if how != "bf16" or not multiplies_bf16(device):
        yield False
        return
    changed: list[Any] = [module for module in model.modules() if _is_frozen(module)]
    slots = [slot for module in model.modules() if isinstance(module, ShiftLayer) for slot in _diagonals(module)]
    try:
        for module in changed:
            module.forward = partial(_in_bf16, module, module.weight.detach().bfloat16())
        for slot in slots:
            with torch.no_grad():
                factors = slot.factors()
            if factors.down.dtype == torch.float32:
                slot.rounded = factors.up.bfloat16(), factors.down.bfloat16()
        yield True
    finally:
        for slot in slots:
            slot.rounded = None
        for module in changed:
            module.__dict__.pop("forward", None)


def _is_frozen(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and "forward" not in module.__dict__
    )


def _diagonals(layer: ShiftLayer) -> list[Slot]:
    """The slots of a linear layer that have a trained diagonal between two frozen factors."""
    if isinstance(layer.kind, Conv2dKind | ExpertsKind):
        return []
    slots = [slot for slot in layer.smidgen_slots.values() if isinstance(slot, Slot)]
    return [slot for slot in slots if slot.residual is not None and slot.residual.diagonal_between]


def _in_bf16(module: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return F.linear(x, module.weight, module.bias)
    out = F.linear(x.bfloat16(), weight).float()
    return out if module.bias is None else out + module.bias
