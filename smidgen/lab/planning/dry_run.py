"""A training step counted on the meta device: the real model, adapter and loss with real shapes, and no numbers.

Operations are counted by torch's FlopCounterMode (two for a multiplication with its addition), bytes by following every
storage from its making to its end. The meta device has neither autocast nor fused attention, so :class:`_AsOnGPU` gives
it both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import smidgen
from smidgen.adapters.bank import Bank
from smidgen.bases.families import FAMILIES
from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask

TOKENS = 77  # of an encoded caption


@dataclass(frozen=True)
class Cost:
    """Operations of a forward pass and of all that training adds to it (backward, and forward again where gradients are
    checkpointed); most bytes alive at a time, weights not among them."""

    forward: int
    training: int
    bytes: int


def cost(run: Callable[[], Tensor], backward: bool = True, precision: torch.dtype | None = None) -> Cost:
    """What ``run`` costs, which answers a scalar to differentiate; ``precision`` is that of autocast on a GPU.

    It runs twice: torch's counter of operations holds on to tensors, so bytes are counted without it.
    """
    with nullcontext() if precision is None else _AsOnGPU(precision):
        with FlopCounterMode(display=False) as flops:
            result = run()
            forward = flops.get_total_flops()
            if backward:
                result.backward()
            training = flops.get_total_flops() - forward
        del result
        with _Memory() as memory:
            result = run()
            if backward:
                result.backward()
            del result
    return Cost(forward, training, memory.most)


def group_step(
    family: str,
    unet: nn.Module,
    config: smidgen.SmidgenConfig,
    size: int,
    checkpointing: bool,
    precision: torch.dtype,
) -> Cost:
    """One row of group training or of the end-to-end stage: one latent of ``size`` x ``size`` through ``unet`` of a family (on the meta
    device, without an adapter) with an adapter of a bank, and back to the adapter. Rows of a batch cost the same each.
    """
    nn.Module.to(unet, precision).requires_grad_(False).train()  # diffusers would speak of layers kept in fp32
    unet.disable_gradient_checkpointing()  # type: ignore[operator]
    if checkpointing:
        unet.enable_gradient_checkpointing(_checkpoint(precision))  # type: ignore[operator]
    from diffusers import DDPMScheduler

    adapted = smidgen.adapt(unet, config, "counted")
    try:
        bank = Bank(adapted, config, ["one"])
        bank.start()
        for parameter in bank.parameters():
            parameter.requires_grad_(True)
        base = FAMILIES[family].cls(
            "counted", SimpleNamespace(unet=unet, scheduler=DDPMScheduler(), vae_scale_factor=8)
        )
        batch = _batch(base, size, precision)
        task = PersonalizeTask(Encoded(torch.empty(1), torch.empty(1), batch["prompts"], ()), base, batch_size=1)
        with bank.rows(["one"]):
            return cost(lambda: task.errors(adapted, batch).sum(), precision=precision)
    finally:
        bank.remove()
        smidgen.adapters.api.remove(unet, "counted")


def numbers(unet: nn.Module, config: smidgen.SmidgenConfig) -> int:
    """Numbers of one adapter: the size of a zoo's row."""
    return smidgen.count(unet, config)


def _checkpoint(precision: torch.dtype) -> Callable[..., Any]:
    """Checkpointing whose second forward pass, run from within backward, sees the mode too."""
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsOnGPU(precision)))


def _batch(base: ImageBase, size: int, precision: torch.dtype) -> dict[str, Any]:
    latents = torch.empty(1, base.model.config.in_channels, size, size, device="meta")
    shapes = base.prompt_shapes(base.model, TOKENS)
    prompts = Prompts({n: torch.empty(1, *shape, device="meta", dtype=precision) for n, shape in shapes.items()})
    level, weight = torch.zeros(1, device="meta"), torch.ones(1, device="meta")
    return {"latents": latents, "noise": latents, "prompts": prompts, "levels": level, "weights": weight}


class _Memory(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; ``most`` of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _key(value) not in before | self.known:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


class _AsOnGPU(TorchFunctionMode):
    """Autocast and fused attention for the meta device: products in ``precision``, norms in fp32, no matrix of attention
    weights kept."""

    PRODUCTS = frozenset(
        {nn.functional.linear, nn.functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm}
    )
    NORMS = frozenset({nn.functional.layer_norm, nn.functional.group_norm, nn.functional.mse_loss})

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args, kwargs = tree_map(self._cast(self.precision), (args, kwargs))
        elif func in self.NORMS:
            args, kwargs = tree_map(self._cast(torch.float32), (args, kwargs))
        elif func is nn.functional.scaled_dot_product_attention:
            query, key, value = tree_map(self._cast(self.precision), args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)

    @staticmethod
    def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
        return lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
