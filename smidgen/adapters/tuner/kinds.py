"""Layer kinds: how a base layer's weight reads as a matrix, and how transforms and residuals reach its activations.

A kind is stateless. ``matrix`` and ``unmatrix`` translate weights; ``input_shift`` and ``output_shift`` are the two
terms of the shift law, y = base(x + (T - I) x) + D x.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from smidgen.adapters.member import Factors
from smidgen.adapters.tuner.experts import ExpertStack
from smidgen.adapters.tuner.rows import LowRankShift

Map = Callable[[Tensor], Tensor]
Layer = Any  # an nn.Module, whose every attribute torch types as Tensor | Module


def laid_like(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory order of x: a base layer rounds differently for another order, and T = I must change no bit."""
    if y.stride() == x.stride():
        return y
    laid = torch.empty_like(x)
    if laid.stride() != x.stride() and _apart(x):
        laid = x.new_empty_strided(x.shape, x.stride())
    return laid.copy_(y)


def _apart(x: Tensor) -> bool:
    """Whether no two numbers of x share a place, gaps between them or not: what ``empty_like`` would close the gaps of."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


class LinearKind:
    """``nn.Linear`` and everything with its forward: weight [out, in], features last."""

    name = "linear"

    def geometry(self, layer: Layer) -> tuple[int, int, int, int]:
        """(width of the transform, rows, cols, groups) of the layer."""
        return layer.in_features, layer.out_features, layer.in_features, 1

    def matrix(self, weight: Tensor, layer: Layer) -> Tensor:
        """The weight as [rows, cols]."""
        return weight

    def unmatrix(self, matrix: Tensor, layer: Layer) -> Tensor:
        """Inverse of :meth:`matrix`."""
        return matrix

    def transform_matrix(self, matrix: Tensor, shift: Map, layer: Layer) -> Tensor:
        """W (T - I) as [rows, cols], by a map of rows [groups, n, width] to those rows (T - I)."""
        return shift(self.transform_rows(matrix, layer)).reshape(matrix.shape)

    def transform_rows(self, matrix: Tensor, layer: Layer) -> Tensor:
        """What a transform multiplies, [groups, n, width]: W (T - I) of a matrix [rows, cols] is each group times T - I."""
        return matrix if matrix.dim() == 3 else matrix[None]

    def transform(self, apply: Map, x: Tensor, layer: Layer) -> Tensor:
        """T x: a map applied over the feature axis of the activations, of the input or of the output."""
        return laid_like(x, apply(x))

    def as_outputs(self, features: Tensor) -> Tensor:
        """One number for each output feature as it meets the outputs."""
        return features

    def output_shift(self, factors: Factors, x: Tensor, layer: Layer) -> Tensor:
        """D x from its factors; computed in the dtype of x."""
        hidden = self._hidden(factors, x)
        return F.linear(hidden, factors.up.to(hidden.dtype))

    def add_output_shift(self, y: Tensor, factors: Factors, x: Tensor, layer: Layer) -> Tensor:
        """y + D x, in one pass over y; in bf16 where frozen factors alone are rounded to it (:attr:`Slot.rounded`)."""
        if factors.down.dtype == torch.bfloat16 and x.dtype == torch.float32:
            rounded = F.linear(self._hidden(factors, x.bfloat16(), x.dtype).bfloat16(), factors.up.bfloat16())
            return y + rounded.to(y.dtype)
        hidden = self._hidden(factors, x)
        if y.dtype != hidden.dtype or not y.is_contiguous() or y.dim() == 1:
            return y + F.linear(hidden, factors.up.to(hidden.dtype)).to(y.dtype)
        rows = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), factors.up.to(y.dtype).T)
        return rows.view(y.shape)

    def add_output_shifts(self, y: Tensor, factors: Factors, x: Tensor) -> Tensor:
        """y + D x with a D of its own for each run of rows: trained factors lead with [runs], frozen ones are shared."""
        x, up, down, device = x.to(y.dtype), factors.up.to(y.dtype), factors.down.to(y.dtype), y.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else nullcontext():
            if factors.diagonal is None:
                if not torch.is_grad_enabled():
                    return LowRankShift.shifted(y, x, up, down)[0]
                return LowRankShift.apply(y, x, up, down)  # type: ignore[no-any-return]
            hidden = (x @ down.mT).unflatten(0, (len(factors.diagonal), -1))  # [runs, rows, ..., k]
            diagonal = factors.diagonal.to(y.dtype).unflatten(0, (-1, *[1] * (hidden.dim() - 2)))
            scaled = (hidden * diagonal).flatten(0, 1)
            if not y.is_contiguous():
                return y + scaled @ up.mT
            return torch.addmm(y.flatten(0, -2), scaled.flatten(0, -2), up.mT).view(y.shape)

    @staticmethod
    def _hidden(factors: Factors, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """diag(diagonal) down x, the diagonal in ``dtype`` (that of x)."""
        hidden = F.linear(x, factors.down.to(x.dtype)).to(dtype or x.dtype)
        return hidden if factors.diagonal is None else hidden * factors.diagonal.to(hidden.dtype)


def autocasting(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


class Conv1DKind(LinearKind):
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored [in, out]."""

    name = "conv1d"

    def geometry(self, layer: Layer) -> tuple[int, int, int, int]:
        width, rows = layer.weight.shape
        return width, rows, width, 1

    def matrix(self, weight: Tensor, layer: Layer) -> Tensor:
        return weight.T

    def unmatrix(self, matrix: Tensor, layer: Layer) -> Tensor:
        return matrix.T


class Conv2dKind:
    """``nn.Conv2d``, any stride, padding, dilation and groups: weight [out, in/g, kh, kw] read as [out, in/g*kh*kw].

    T acts on the channels of one group, the same T shape in each group with its own numbers [groups, ...]; D is one
    product for the whole weight: a convolution with ``down`` in every group, then ``up`` at 1 x 1.
    """

    name = "conv2d"

    def geometry(self, layer: Layer) -> tuple[int, int, int, int]:
        return layer.in_channels // layer.groups, layer.out_channels, prod(layer.weight.shape[1:]), layer.groups

    def matrix(self, weight: Tensor, layer: Layer) -> Tensor:
        return weight.flatten(1)

    def unmatrix(self, matrix: Tensor, layer: Layer) -> Tensor:
        return matrix.reshape(layer.weight.shape)

    def transform_matrix(self, matrix: Tensor, shift: Map, layer: Layer) -> Tensor:
        moved = shift(self.transform_rows(matrix, layer))
        return moved.unflatten(1, (matrix.shape[0] // layer.groups, -1)).transpose(2, 3).reshape(matrix.shape)

    def transform_rows(self, matrix: Tensor, layer: Layer) -> Tensor:
        groups = layer.groups
        w = matrix.reshape(groups, matrix.shape[0] // groups, layer.in_channels // groups, -1)
        return w.transpose(2, 3).flatten(1, 2)

    def transform(self, apply: Map, x: Tensor, layer: Layer) -> Tensor:
        channels_last = x.movedim(-3, -1)
        if layer.groups == 1:
            return laid_like(x, apply(channels_last).movedim(-1, -3))
        pieces = channels_last.unflatten(-1, (layer.groups, -1))
        return laid_like(x, apply(pieces).flatten(-2).movedim(-1, -3))

    def as_outputs(self, features: Tensor) -> Tensor:
        return features[:, None, None]

    def output_shift(self, factors: Factors, x: Tensor, layer: Layer) -> Tensor:
        groups, (kh, kw) = layer.groups, layer.kernel_size
        kernel = factors.down.to(x.dtype).reshape(factors.down.shape[0], -1, kh, kw)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        batched = x if x.dim() == 4 else x[None]
        pieces = batched.unflatten(1, (groups, -1)).flatten(0, 1)
        hidden = F.conv2d(pieces, kernel, None, layer.stride, padding, layer.dilation)
        if factors.diagonal is not None:
            hidden = hidden * factors.diagonal.to(hidden.dtype)[:, None, None]
        up = factors.up.to(hidden.dtype).unflatten(0, (groups, -1))
        hidden = hidden.unflatten(0, (-1, groups))
        y = torch.einsum("ngkhw,gok->ngohw", hidden, up).flatten(1, 2)
        return y if x.dim() == 4 else y[0]

    def add_output_shift(self, y: Tensor, factors: Factors, x: Tensor, layer: Layer) -> Tensor:
        return y + self.output_shift(factors, x, layer).to(y.dtype)


class ExpertsKind(LinearKind):
    """Fused experts (:class:`~smidgen.adapters.tuner.experts.ExpertStack`): [experts, out, in], each with its own T, D and S.

    Their activations are inside the owner's kernels: the layer gives the owner the weight S (W T + D) instead.
    """

    name = "experts"

    def geometry(self, layer: Layer) -> tuple[int, int, int, int]:
        """(width, rows, cols) of one expert, and how many there are."""
        experts, rows, cols = self.matrix(layer.weight, layer).shape
        return cols, rows, cols, experts

    def matrix(self, weight: Tensor, layer: Layer) -> Tensor:
        """The weight as [experts, rows, cols]."""
        return weight.mT if layer.transposed else weight

    def unmatrix(self, matrix: Tensor, layer: Layer) -> Tensor:
        return matrix.mT if layer.transposed else matrix


Kind = LinearKind | Conv2dKind

_LINEAR, _CONV1D, _CONV2D, _EXPERTS = LinearKind(), Conv1DKind(), Conv2dKind(), ExpertsKind()


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a base layer, None when no kind fits. Subclasses and quantised forms of a class have its kind."""
    if isinstance(layer, ExpertStack):
        return _EXPERTS
    if isinstance(layer, nn.Conv2d):
        return _CONV2D
    if isinstance(layer, nn.Linear):
        return _LINEAR
    if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__):
        return _CONV1D
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and hasattr(layer, "weight"):
        weight = layer.weight
        shape = tuple(getattr(weight, "shape", ()))
        quantised = not getattr(weight, "is_floating_point", lambda: False)()
        if quantised or shape == (layer.out_features, layer.in_features):
            return _LINEAR
    return None


def class_name(layer: nn.Module) -> str:
    """The name of a layer's class as its author wrote it, not of the one that torch makes for a parametrised layer."""
    kind = type(layer)
    return (kind.__mro__[1] if parametrize.is_parametrized(layer) else kind).__name__


def computed(layer: nn.Module) -> str | None:
    """What makes a layer's weight anew for each call, such as "WeightNorm", so that nothing can be merged into it; None for
    a weight that is a tensor of the layer's own."""
    if parametrize.is_parametrized(layer, "weight"):
        steps: Any = layer.parametrizations["weight"]  # type: ignore[index]
        return " and ".join(type(step).__name__.lstrip("_") for step in steps)
    if "weight" in layer._parameters or "weight" in layer._buffers or not hasattr(layer, "weight"):
        return None
    makers = [type(hook).__name__ for hook in layer._forward_pre_hooks.values() if _makes_weight(hook)]
    return " and ".join(makers) or f"the class {class_name(layer)}"


@torch.no_grad()
def refresh(layer: nn.Module) -> None:
    """Makes a weight anew that torch's older norms or pruning made before the tensors it comes from were loaded, and takes one out of
    the order that bitsandbytes packs it into for calls on a CPU, in which nobody else can read it."""
    if "weight" in layer._parameters or "weight" in layer._buffers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # which unpacks the weight itself
        return
    training, layer.training = layer.training, False  # a spectral norm moves on at each call in training
    for hook in layer._forward_pre_hooks.values():
        if _makes_weight(hook):
            hook(layer, ())
    layer.training = training


def _makes_weight(hook: Any) -> bool:
    """Whether a hook of torch's older weight_norm, spectral_norm or pruning sets the weight."""
    return type(hook).__module__.startswith("torch.nn.utils.") and (
        getattr(hook, "name", None) == "weight" or getattr(hook, "_tensor_name", None) == "weight"
    )


KIND_NAMES = ("nn.Linear", "transformers Conv1D", "nn.Conv2d and their subclasses and quantised forms", "fused experts")
