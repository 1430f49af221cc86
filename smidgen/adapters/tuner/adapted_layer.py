"""A base layer with adapters, as peft knows one: what it gives, merging, strengths; fused experts are one of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from smidgen.adapters.checkpoint.base_groups import signs
from smidgen.adapters.tuner import calls, experts, targets
from smidgen.adapters.tuner.kinds import Conv2dKind, class_name, computed, kind_of, refresh
from smidgen.adapters.tuner.layer import MERGE_REFUSE, MERGE_WARN, ShiftLayer, hooked
from smidgen.adapters.tuner.shards import whole
from smidgen.adapters.tuner.slot import Slot
from smidgen.errors import SmidgenError

logger = logging.getLogger("smidgen")

# Largest relative error of what a layer gives for :func:`probe` against the same made of its weight. TF32 is 1e-3 off.
OUTPUT_ERROR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class AdaptedLayer(ShiftLayer, BaseTunerLayer):
    """A base layer with adapters, as peft knows it: active adapters, merging, strengths, mixed batches."""

    adapter_layer_names = ("smidgen_slots",)
    other_param_names = ("scaling", "r")

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        inner = self.get_base_layer()
        kind = kind_of(inner)
        if kind is None:
            targets.check_layer(type(inner).__name__, inner)
        assert kind is not None
        try:
            self.quantization_backend = resolve_quantization_backend(inner)
        except ValueError:  # quantised by hand: peft knows no way to write its weight, and nothing here needs one
            self.quantization_backend = None
        self.in_features, self.out_features = kind.geometry(inner)[0], kind.geometry(inner)[1]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._replaced: list[str] = []  # active when others were merged in their place
        self.cast_input_dtype_enabled = True
        self.kwargs: dict[str, Any] = {}
        self.setup(kind, self._read, self._bias, self._swap)
        self.register_load_state_dict_post_hook(_make_factors)

    def _read(self) -> Tensor:
        """The base weight, fetched if accelerate has offloaded it, dequantised if it is quantised."""
        refresh(self.get_base_layer())
        weight = whole(self.get_base_weight())
        offloaded = getattr(getattr(self.get_base_layer(), "_hf_hook", None), "weights_map", None)
        if weight.is_meta and offloaded is not None:
            weight = offloaded["weight"]
        if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize == 1:
            return weight.float()  # fp8, as layerwise casting keeps it
        if not is_plain(weight):
            dequantise = getattr(weight, "dequantize", None)
            if dequantise is None:
                raise SmidgenError(f"Cannot read the {weight.dtype} weight of a {type(self.base_layer).__name__}.")
            weight = dequantise()
        return weight

    def _bias(self) -> Tensor | None:
        """The base layer's bias, fetched if accelerate has offloaded it."""
        layer: Any = self.get_base_layer()
        bias = getattr(layer, "bias", None)
        offloaded = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
        if isinstance(bias, Tensor) and bias.is_meta and offloaded is not None:
            bias = offloaded["bias"]
        return whole(bias).detach() if isinstance(bias, Tensor) else None

    def _swap(self, weight: Tensor) -> Tensor:
        layer = self.get_base_layer()
        before = cast(Tensor, layer.weight)
        if isinstance(before, nn.Parameter) and not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=before.requires_grad)
        layer.weight = weight
        return before

    def forward(
        self, x: Tensor | None = None, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        if x is None:
            x = cast(Tensor, kwargs.pop("input"))  # torch's own name for it, which AnimateDiff uses
        if self.banks and not self.disable_adapters:
            terms = calls.terms(self, x)
            if terms is not None:
                return self.law(x, terms, *args, **kwargs)
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
            return self.mixed(x, adapter_names, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = self._added()
        return self.shifted(x, names, *args, **kwargs) if names else self.base_layer(x, *args, **kwargs)

    def _added(self) -> list[str]:
        """The adapters that a call adds to the base's own weight; none where the weight in its place says it all."""
        names = [n for n in self.active_adapters if n in self.smidgen_slots]
        if not self.merged:
            return names
        beside = [n for n in names if n not in (*self.merged_adapters, *self._replaced)]
        return [*self.merged_adapters, *beside] if beside else []

    def _check_mixed(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    # ---- merging ---------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds deltas to the base weight in fp32, rounds once, keeps the original bits for :meth:`unmerge`.

        Active adapters that are not merged go on beside the merged ones; where only inactive ones are merged, those take
        the place of the active ones until they are unmerged, as in peft.

        Warns when rounding to the weight's dtype loses more than 20 % of the update; with ``safe_merge`` refuses above
        50 % and for non-finite results.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.smidgen_slots]
        if not names:
            return
        self.check_mergeable()
        merged, error = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if error > MERGE_WARN:
            text = (
                f"Merging {', '.join(names)} into a {merged.dtype} weight loses {error:.0%} of the update to rounding; "
                "keep the adapter unmerged or merge into fp32 weights."
            )
            if safe_merge and error > MERGE_REFUSE:
                raise SmidgenError(text)
            logger.warning(text)
        self.put_merged(merged)
        self.merged_adapters.extend(names)
        if not set(self.active_adapters) & set(self.merged_adapters):
            self._replaced = list(self.active_adapters)

    def check_mergeable(self, name: str = "") -> None:
        """Refuses a quantised weight, whose rounding swallows small updates, and one that is made anew for each call.

        Raises:
            SmidgenError: before anything is changed.
        """
        layer = self.get_base_layer()
        weight, where = getattr(layer, "weight", None), f" at {name!r}" if name else ""
        if not is_plain(weight):
            raise SmidgenError(
                f"Merging into a quantised weight{where} ({type(weight).__name__}, {getattr(weight, 'dtype', None)}, of a "
                f"{type(layer).__name__}) would lose most of a small update to rounding; keep the adapter unmerged, or merge it "
                "into the base in 16 or 32 bits."
            )
        if maker := computed(layer):
            raise SmidgenError(
                f"The weight of the {class_name(layer)}{where} is made anew for each call by {maker}, so nothing can be merged "
                "into it; take that off first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "prune.remove), or keep the adapter unmerged."
            )
        if not self._is_its_weight():
            raise SmidgenError(
                f"A {class_name(layer)}{where} does more than multiply by its weight and add its bias (a mask, a norm of the weight), so "
                "that an update merged into the weight is not what the adapter does; keep the adapter unmerged."
            )

    @torch.no_grad()
    def _is_its_weight(self) -> bool:
        """Whether the base layer gives what its weight and bias do, tried with another weight where its class, a hook or a host may
        do more."""
        layer: Any = self.get_base_layer()
        own = type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward) or hooked(layer)
        if (
            not own
            or self.merged
            or not isinstance(layer, nn.Linear | nn.Conv2d)
            or (weight := self._original()).is_meta
        ):
            return True
        given = {}
        if not hasattr(layer, "_hf_hook"):  # accelerate's puts its own weight in place at each call
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
            given["weight"] = weight = weight + weight.std() * noise
        bias = self._bias()
        bias = bias if bias is None else bias.to(weight)
        error = 1e-6 if weight.dtype == torch.float64 else OUTPUT_ERROR[weight.dtype]
        for size in (1.0, 30.0):  # some clamp what is large
            x = size * probe(self).to(weight.device, weight.dtype)
            if isinstance(layer, nn.Linear):
                wanted = nn.functional.linear(x, weight, bias)
            else:
                wanted = layer._conv_forward(x, weight, bias)
            try:
                found = torch.func.functional_call(layer, given, (x,))
            except Exception:  # it wants more than an input
                return False
            most = error * max(float(wanted.float().norm()), 1e-30)
            if found.shape != wanted.shape or not float((found - wanted).float().norm()) <= most:
                return False
        return True

    def unmerge(self) -> None:
        """Puts the original bits of the base weight back."""
        self.restore()
        self.merged_adapters.clear()
        self._replaced = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter out of the layer.

        Raises:
            SmidgenError: it is merged, so that its update would stay.
        """
        if adapter_name in self.merged_adapters:
            raise SmidgenError(
                f"Adapter {adapter_name!r} is merged; unmerge it before it is deleted (unmerge_adapter)."
            )
        super().delete_adapter(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of an adapter in the base weight's layout and dtype of the trained numbers, strength included."""
        return self.delta_weight(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        slot = dict(self.smidgen_slots.items()).get(adapter_name)
        plain = isinstance(slot, Slot) and slot.transform is None and slot.output is None
        return plain and isinstance(self.get_base_layer(), nn.Linear)

    # ---- strengths, as diffusers calls them ------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of an adapter; the whole delta, transform included, is linear in it, but where ``nonneg`` clamps."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters, or puts it back to one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def __repr__(self) -> str:
        return "smidgen." + super().__repr__()


class AdaptedExperts(AdaptedLayer):
    """Fused experts with adapters: called by the module that owns them, it gives the weight that its kernels are to use."""

    def forward(self, *, adapter_names: Sequence[str] | None = None) -> Tensor:  # type: ignore[override]
        if adapter_names is not None:
            raise ValueError(
                "Cannot pass `adapter_names` to adapters on fused experts: tokens of one row go to several experts, and an expert's "
                "weight is one for the whole batch. Run one adapter at a time (smidgen.set_active)."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters else self._added()
        return self.shifted_weight(names) if names else self.base_layer()  # type: ignore[no-any-return]


def probe(layer: AdaptedLayer) -> Tensor:
    """A fixed input for a layer: +-1 in every feature, a few tokens or a small picture."""
    width = layer.kind.geometry(layer.base_layer)[0] * layer.kind.geometry(layer.base_layer)[3]
    rows = signs(width, 2)
    if not isinstance(layer.kind, Conv2dKind):
        return rows.T.contiguous()
    base: Any = layer.base_layer
    size = 2 + max(k * d for k, d in zip(base.kernel_size, base.dilation, strict=True))
    columns = rows[None]
    return columns.repeat(1, 1, size * size // rows.shape[1] + 1)[..., : size * size].reshape(1, width, size, size)


def adapted_layer(base: nn.Module) -> AdaptedLayer:
    """A base layer, made ready for adapters."""
    return (AdaptedExperts if isinstance(base, experts.ExpertStack) else AdaptedLayer)(base)


def _make_factors(layer: nn.Module, _keys: Any) -> None:
    """After a state dict was loaded: factors are made at once, so that whatever traces the model next finds them."""
    for name, slot in cast(AdaptedLayer, layer).smidgen_slots.items():
        if isinstance(slot, Slot) and not (slot.ready or slot.awaits_file or slot.emptied):
            cast(AdaptedLayer, layer).slot(name)


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point tensor, not a quantised or fp8 one."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1
