"""What running a model costs, counted on the meta device: the real model and loss with real shapes, and no numbers.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Card:
    """A GPU as its maker states it: dense bf16 operations a second with fp32 sums, fp32 ones, and bytes of memory."""

    name: str
    peak: float
    single: float
    memory: float


CARDS = (
    Card("H100 SXM 80 GB", 989e12, 67e12, 80e9),
    Card("A100 SXM 80 GB", 312e12, 19.5e12, 80e9),
    Card("RTX 4090 24 GB", 165e12, 82.6e12, 24e9),
)
ADAM = 16  # bytes of a trained number: value, gradient and two moments in fp32


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


def checkpointed(precision: torch.dtype) -> Callable[..., Any]:
    """Gradient checkpointing whose second forward pass, run from within backward, sees the mode too."""
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsOnGPU(precision)))


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
        {
            nn.functional.linear,
            nn.functional.conv2d,
            nn.functional.conv3d,
            torch.matmul,
            torch.bmm,
            torch.baddbmm,
            torch.addmm,
        }
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
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any
    ) -> Tensor:
        """Fused, whatever the mask; heads of keys that several queries share are counted once for each of these."""
        query, key, value = tree_map(self._cast(self.precision), (query, key, value))
        if enable_gqa:
            shared = query.shape[-3] // key.shape[-3]
            key, value = (found.repeat_interleave(shared, dim=-3) for found in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]  # type: ignore[no-any-return]

    @staticmethod
    def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
        return lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
