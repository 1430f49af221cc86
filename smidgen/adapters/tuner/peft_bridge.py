"""Sitting on peft: the one file that touches peft's private names.

Holds for peft 0.21.0 to 0.21.2 (``TESTED_PEFT``; tests/adapters/test_peft_bridge.py names the private names). peft has
no registry for tuners from outside, so the type is written into its mappings as a namespaced ``str``; adapters then
work through get_peft_model, PeftModel, transformers' add_adapter and diffusers' add_adapter alike.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import peft.mapping as peft_mapping
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from smidgen.adapters import methods
from smidgen.adapters.checkpoint import base_groups, base_lock, checksum, packing
from smidgen.adapters.checkpoint.base_groups import Part
from smidgen.adapters.linalg.svd import energy_rank
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis
from smidgen.adapters.tuner import bypass, calls, experts, patterns, sharing, targets
from smidgen.adapters.tuner.canary import make_canary, moving_advice
from smidgen.adapters.tuner.config import PEFT_TYPE, SmidgenConfig
from smidgen.adapters.tuner.kinds import class_name, computed, kind_of, refresh
from smidgen.adapters.tuner.layer import MERGE_REFUSE, MERGE_WARN, ShiftLayer
from smidgen.adapters.tuner.numbers import Numbers, check_complete, collect, renamed
from smidgen.adapters.tuner.shards import check_whole, whole, why_partial
from smidgen.adapters.tuner.slot import Members, Slot, Spec, layout_of
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, TargetError, did_you_mean, shown

logger = logging.getLogger("smidgen")

TESTED_PEFT = ("0.21.0", "0.21.1", "0.21.2")
PREFIX = "smidgen_"
_MOST_NUMBERS = 64  # trained for each number of a weight, more than any adapter has use for: before they are made
REBUILT = 1e-3  # relative error of deltas up to which factors count as made again; verify asks for twice that
_WRAP = "base_model.model."
_OWNER = "_smidgen_peft_model"


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
        self.setup(kind, self._read, self._swap)
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
        if not _plain(weight):
            dequantise = getattr(weight, "dequantize", None)
            if dequantise is None:
                raise SmidgenError(f"Cannot read the {weight.dtype} weight of a {type(self.base_layer).__name__}.")
            weight = dequantise()
        return weight

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
        names = self.active_adapters
        if self.merged:
            beside = [n for n in names if n in self.smidgen_slots and n not in (*self.merged_adapters, *self._replaced)]
            if not beside:
                return self.base_layer(x, *args, **kwargs)
            names = [*self.merged_adapters, *beside]
        return self.shifted(x, names, *args, **kwargs)

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
        if not _plain(weight):
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
        return isinstance(slot, Slot) and slot.transform is None and isinstance(self.get_base_layer(), nn.Linear)

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
        if self.disable_adapters or self.merged:
            return self.base_layer()  # type: ignore[no-any-return]
        return self.shifted_weight(self.active_adapters)


def adapted_layer(base: nn.Module) -> AdaptedLayer:
    """A base layer, made ready for adapters."""
    return (AdaptedExperts if isinstance(base, experts.ExpertStack) else AdaptedLayer)(base)


def _make_factors(layer: nn.Module, _keys: Any) -> None:
    """After a state dict was loaded: factors are made at once, so that whatever traces the model next finds them."""
    for name, slot in cast(AdaptedLayer, layer).smidgen_slots.items():
        if isinstance(slot, Slot) and not (slot.ready or slot.awaits_file or slot.emptied):
            cast(AdaptedLayer, layer).slot(name)


class SmidgenModel(BaseTuner):
    """The tuner: puts any adapter of this library into a model. One tuner for all methods, so methods mix."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # ---- injection -------------------------------------------------------------------------------------------------

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """All checks, before anything of the model is touched."""
        assert isinstance(peft_config, SmidgenConfig)
        chosen = matched_layers(self, peft_config, model)
        check_base(peft_config, chosen, model)
        _resolve_energy(peft_config, chosen)
        for name, layer in chosen.items():
            members_of(peft_config, layer, name)
        if _all_linear(peft_config):
            peft_config.target_modules = set(chosen)
        stacked = {name for name, layer in chosen.items() if isinstance(layer, experts.ExpertStack)}
        if stacked:
            peft_config.target_modules = _naming_stacks(peft_config, model, chosen, stacked)
            experts.open_stacks(model, stacked)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """What makes a parametrised weight is no layer, whatever its name."""
        return ".parametrizations." not in key and BaseTuner._check_target_module_exists(peft_config, key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        own: Any = self.peft_config[adapter_name]
        if own.from_file:
            patterns.name_modules(own, list(outside_adapters(model)))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            experts.close_stacks(model)
        sharing.follow(model)
        bypass.follow(model)
        for layer in adapted_layers(model, adapter_name).values():
            if not layer.smidgen_slots[adapter_name].awaits_file:
                layer.slot(adapter_name)  # while the weights are whole, and so that a state dict holds the pins

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's; a name that no adapter has is an error, and active adapters that get no word are named."""
        active = list(dict.fromkeys(n for layer in adapted_layers(self.model).values() for n in layer.active_adapters))
        for name in adapter_names or ():
            if name not in self.peft_config:
                known = did_you_mean(name, self.peft_config)
                raise SmidgenError(
                    f"The model carries no adapter {name!r}.{known} Known: {', '.join(self.peft_config)}."
                )
        self._merge_all(adapter_names, safe_merge)
        if adapter_names and active and not set(active) & set(adapter_names):
            logger.warning(
                "Merged %s, which %s not active: until unmerge_adapter() the active %s without effect.",
                _listed(adapter_names),
                "is" if len(adapter_names) == 1 else "are",
                f"{_listed(active)} {'is' if len(active) == 1 else 'are'}",
            )

    def _check_merge_allowed(self) -> None:
        """What peft warns of, tied embeddings, is no matter here: merging unties."""

    def _merge_all(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Merges at all layers or, when one refuses, at none."""
        check_mergeable(self.model, adapter_names)
        before = [(m, list(m.merged_adapters)) for m in self.model.modules() if isinstance(m, AdaptedLayer)]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    layer.merge(adapter_names=merged)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = [m for m in self.model.modules() if isinstance(m, AdaptedLayer)]
        if merge:  # before the first layer is replaced
            self._merge_all(adapter_names, safe_merge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            base: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[func-returns-value]
        sharing.put_back(base, {id(layer): layer.get_base_layer() for layer in layers})
        sharing.settle(base)
        experts.close_stacks(base)
        bypass.follow(base)
        return base

    def _create_and_replace(  # type: ignore[no-untyped-def,override]
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if experts.is_stack(target) and not experts.is_named(peft_config.target_modules, current_key):
            return
        layer = target if isinstance(target, AdaptedLayer) else adapted_layer(target)
        layer.add_slot(adapter_name, make_slot(peft_config, layer.get_base_layer(), current_key))
        from_file = bool(peft_config.base_lock)
        if from_file and peft_config.inference_mode:
            layer.smidgen_slots[adapter_name].await_file()  # type: ignore[operator]
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.smidgen_slots[adapter_name].float()  # type: ignore[operator]
        if not from_file:
            layer.slot(adapter_name)  # factors are of the weights that are there now
        if adapter_name not in self.active_adapters:
            layer.smidgen_slots[adapter_name].requires_grad_(False)
        if layer is target:
            layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        else:
            self._replace_module(parent, target_name, layer, target)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        return _mixed_batch_hooks(self, kwargs.pop("adapter_names", None))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Trained numbers are fp32, whatever the base is, unless a caller of peft asks for the base's own dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in adapted_layers(self.model, adapter_name).values() if not autocast_adapter_dtype else ():
            weight = layer.get_base_weight()
            for parameter in layer.smidgen_slots[adapter_name].parameters() if _plain(weight) else ():
                parameter.data = parameter.data.to(weight.dtype)

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):  # type: ignore[no-untyped-def]
        check_saved(model, adapter_name)
        layers = adapted_layers(model, adapter_name)
        settle(config, layers, adapter_name)
        found = numbers(model, config, adapter_name, state_dict)
        stamp(model, config, layers, adapter_name, found)
        heads = {name: key for name, (key, _) in named_heads(model, adapter_name).items()}
        state_dict.update({heads[name]: value for name, value in found.heads.items()})  # where peft reads them

        def seal(tensors: dict[str, Tensor]) -> None:
            if not any(value.is_meta for value in tensors.values()):
                config.seal({cls._remove_adapter_name_from_key(name, adapter_name): t for name, t in tensors.items()})

        bare = {key: found.heads[name] for name, key in heads.items() if ".modules_to_save." not in key}
        return _Sealed(file_tensors(config, found) | bare, seal)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if packing.is_packed(key) else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):  # type: ignore[no-untyped-def]
        state_dict = packing.plain_keys(state_dict)
        packed = {k: v for k, v in state_dict.items() if packing.is_packed(k)}
        rest = {k: v for k, v in state_dict.items() if k not in packed}
        layers = adapted_layers(model, adapter_name)
        layout = {name: slot_layout(config, layer.get_base_layer(), name) for name, layer in layers.items()}
        known = {key.removeprefix(_WRAP): value for key, value in model.state_dict().items()}
        own = {name: known[name.removeprefix(_WRAP)] for name in rest if name.removeprefix(_WRAP) in known}
        try:
            packing.check_names(rest.keys() - own.keys(), (), "the adapter file")
            for name, wanted in own.items():
                packing.check_tensor(name, rest[name], tuple(wanted.shape), wanted.dtype, "the adapter file")
            unpacked = packing.unpack(packed, layout)
            if config.checksum:
                checksum.check_tensors(
                    config.checksum["tensors"], as_in_file(model, adapter_name, state_dict), "the adapter file"
                )
                config.mark_current().checksum = None
        except AdapterFileError:
            remove(model, adapter_name)
            raise
        out = dict(rest)
        for name, key in model_keys(model, adapter_name).items():
            out |= {f"{key}.smidgen_slots.{adapter_name}.{tensor}": value for tensor, value in unpacked[name].items()}
        return out


class _Sealed(dict[str, Tensor]):
    """Tensors that peft is about to write, to which it adds heads and embeddings: when it reads them all, ``seal`` is given
    them all, so that the config that it writes next has their checksum."""

    def __init__(self, tensors: dict[str, Tensor], seal: Callable[[dict[str, Tensor]], None]) -> None:
        super().__init__(tensors)
        self._seal = seal

    def items(self):  # type: ignore[no-untyped-def,override]
        self._seal(dict(super().items()))
        return super().items()


# ---- what other rooms of the engine call ---------------------------------------------------------------------------


def matched_layers(tuner: Any, config: SmidgenConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Base layers that a config's targets hit in a model, by name, checked for misses.

    Raises:
        TargetError: an entry matches nothing.
    """
    if config.target_modules is None:
        raise TargetError("The config names no target_modules; smidgen.adapt and peft fill them in for known models.")
    modules = outside_adapters(model)
    targets.check_shapes(modules)
    if _all_linear(config):
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


def _matches(config: Any, modules: dict[str, nn.Module], **changes: Any) -> dict[str, nn.Module]:
    """The modules that a config's targets and what restricts them match; the owner of fused experts stands for them."""
    own = copy.copy(config)
    own.__dict__.update(changes)
    matched = {n: m for n, m in modules.items() if SmidgenModel._check_target_module_exists(own, n)}
    fused = [n for n, m in modules.items() if experts.is_stack(m)]
    for name in list(matched) if fused else ():
        if name in fused and not experts.is_named(own.target_modules, name):
            del matched[name]
        if owned := experts.inside(name, fused):
            del matched[name]
            matched |= {n: modules[n] for n in owned}
    return matched


def _naming_stacks(config: Any, model: nn.Module, chosen: dict[str, nn.Module], stacked: set[str]) -> set[str]:
    """Targets that name fused experts themselves, where those of a config name the modules that own them."""
    modules = outside_adapters(model)
    if isinstance(config.target_modules, str):
        return set(chosen)
    owners = {name.rpartition(".")[0] for name in stacked}
    kept = {t for t in config.target_modules if not any(f".{owner}".endswith(f".{t}") for owner in owners)}
    rest = chosen.keys() - _matches(config, modules, target_modules=kept).keys()
    fused = stacked & rest
    return kept | targets.shortest_names(fused, modules, 2) | targets.shortest_names(rest - fused, modules)


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
    transform, which would make something else of these weights."""
    return config.store_factors and not config.transform and lock.difference < float("inf")


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


def _readable(weight: Any) -> bool:
    """Whether a weight's elements are its values: an ordinary floating-point tensor, fp8 included, not a quantised one."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point tensor, not a quantised or fp8 one."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _all_linear(config: SmidgenConfig) -> bool:
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


def make_slot(config: SmidgenConfig, layer: nn.Module, target: str, size: int | None = None) -> Slot:
    """A fresh slot for a base layer; ``size`` adapters of a bank if given."""
    ties = config.ties.get(target)
    kept = None if ties is None else packing.decode_ties(ties, target)
    return Slot(members_of(config, layer, target), f"{config.seed}/{target}", config.store_factors, size, kept)


def slot_layout(config: SmidgenConfig, layer: nn.Module, target: str) -> dict[str, Spec]:
    """What :func:`make_slot` would store, without making it."""
    return layout_of(members_of(config, layer, target), config.store_factors)


def rank_at(config: SmidgenConfig, target: str) -> int | str | None:
    """The r that a config asks for at a target, None for the residual's own."""
    ranks = config.rank_pattern
    return ranks[target] if target in ranks else ranks.get(get_pattern_key(ranks.keys(), target), config.r)  # type: ignore[arg-type]


def members_of(config: SmidgenConfig, layer: nn.Module, target: str) -> Members:
    """The members of a config at a base layer.

    Raises:
        ConfigError: an option that has no meaning at this geometry.
    """
    kind = kind_of(layer)
    assert kind is not None
    width, rows, cols, groups = kind.geometry(layer)
    options, r = dict(config.residual_options), rank_at(config, target)
    if r is not None and config.residual:
        options["r"] = r
    try:
        members = methods.make_members(
            config.transform, config.residual, config.transform_options, options, width, rows, cols
        )
        trained = sum(member.count() for member in members if member is not None)
    except SmidgenError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        given = shown(config.transform_options | options)
        raise ConfigError(f"An option of {config.label()} has a value of the wrong type: {given} ({error}).") from error
    if trained > _MOST_NUMBERS * rows * cols + 2**20:
        raise ConfigError(
            f"{config.label()} would train {trained:,} numbers for a weight of {rows} x {cols} at {target!r}; take a smaller rank."
        )
    if config.old and isinstance(members[1], DiagonalInBasis):
        _check_alpha_of_old(members[1], target)
    return Members(*members, groups, stacked=kind.name == "experts")


def _check_alpha_of_old(residual: DiagonalInBasis, target: str) -> None:
    """Files from before they had a checksum divided alpha by the r that a matrix had room for, and clamped before it.

    Raises:
        AdapterFileError: one whose effect that changes.
    """
    if residual.scale != 1 and (residual.asked > residual.r or getattr(residual, "nonneg", False)):
        raise AdapterFileError(
            f"This adapter was saved when alpha was divided by the r that a matrix has room for (at {target!r} {residual.r}, "
            f"asked for were {residual.asked}) and nonneg clamped before alpha: its effect would change. Load it with the "
            "version that wrote it, or train it again."
        )


def _resolve_energy(config: SmidgenConfig, chosen: dict[str, nn.Module]) -> None:
    """``r="energy:0.99"`` becomes one r a layer in ``rank_pattern``, so that the file fixes it."""
    if not (isinstance(config.r, str) and config.r.startswith("energy:")):
        return
    share = targets.parse_energy(config.r, config.residual)
    for name, matrix in ((n, _base_matrix(m)) for n, m in chosen.items() if n not in config.rank_pattern):
        values = torch.linalg.svdvals(matrix.float()).reshape(-1, min(matrix.shape[-2:]))
        config.rank_pattern[name] = max(energy_rank(own, share) for own in values)  # experts share one


def check_mergeable(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Whether adapters of ours, the active ones unless named, can be merged wherever they are; says what that unties.

    Raises:
        SmidgenError: before anything is changed.
    """
    layers = {
        name: layer
        for name, layer in adapted_layers(model).items()
        if any(n in layer.smidgen_slots for n in adapter_names or layer.active_adapters)
    }
    for name, layer in layers.items():
        layer.check_mergeable(name)
    sharing.say_untied(model, layers)


def base_matrices(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Base weights [rows, cols] of layers (adapted or not) by name; those of experts one below the other."""
    return {name: _base_matrix(layer).flatten(0, -2) for name, layer in layers.items()}


def _base_matrix(layer: nn.Module) -> Tensor:
    return (layer if isinstance(layer, AdaptedLayer) else adapted_layer(layer)).base_matrix().detach()


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, AdaptedLayer]:
    """Adapted layers of a model by target name (without peft's wrapping), those that carry ``adapter_name`` if given."""
    return {
        name.removeprefix(_WRAP): layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and (adapter_name is None or adapter_name in layer.smidgen_slots)
    }


def model_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Target name -> name of the module in this (possibly wrapped) model."""
    return {
        name.removeprefix(_WRAP): name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in _carried(layer)
    }


def saved_modules(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Heads in modules_to_save (peft's wrappers) by name in this model, those of ``adapter_name`` if given."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in (None, *module.modules_to_save)
    }


def named_heads(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Tensors of the heads that an adapter trained: name in any peft file -> (name in the model's state dict, tensor)."""
    held = {
        name: (f"{name}.modules_to_save.{adapter_name}", head.modules_to_save[adapter_name])
        for name, head in saved_modules(model, adapter_name).items()
    }
    held |= {name: (name, head) for name, head in _bare_heads(model, adapter_name).items()}
    return {
        f"{_WRAP}{name.removeprefix(_WRAP)}.{key}": (f"{where}.{key}", value.detach())
        for name, (where, head) in held.items()
        for key, value in head.state_dict().items()
    }


def head_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of the heads that an adapter trained, under the names they have in any peft file."""
    return {name: value for name, (_, value) in named_heads(model, adapter_name).items()}


def _bare_heads(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Heads that modules_to_save names and that peft has not wrapped: named after the adapter was put in."""
    named = tuple(getattr(model.peft_config[adapter_name], "modules_to_save", None) or ())  # type: ignore[index]
    inside = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper | BaseTunerLayer)
    )
    return {
        n: m
        for n, m in model.named_modules()
        if n.endswith(named) and not f"{n}.".startswith(inside) and not isinstance(m, BaseTunerLayer)
    }


def unsaved(model: nn.Module, adapter_name: str) -> list[str]:
    """Parameters of the base that train and that no file of the adapter would hold."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    if getattr(config, "bias", "none") != "none":  # peft trains and saves those itself
        return []
    brought: list[nn.Module] = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    brought += [bank for layer in adapted_layers(model).values() for bank in layer.banks.values()]
    brought += _bare_heads(model, adapter_name).values()
    saved = {id(p) for p in adapter_parameters(model)} | {id(p) for m in brought for p in m.parameters()}
    return [
        n.removeprefix(_WRAP)
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in saved and not bypass.is_fused(n)
    ]


def check_saved(model: nn.Module, adapter_name: str) -> None:
    """Nothing that was trained may be left out of an adapter's file.

    Raises:
        SmidgenError: a head or another part of the base was unfrozen by hand.
    """
    if left_out := unsaved(model, adapter_name):
        raise SmidgenError(say_unsaved(left_out, adapter_name))


def say_unsaved(left_out: list[str], adapter_name: str) -> str:
    """What to do about parts of the base that train beside an adapter."""
    owners = list(dict.fromkeys(name.rpartition(".")[0].replace(".base_layer", "") for name in left_out))
    named = ", ".join(map(repr, owners[:3])) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
    return (
        f"{len(left_out)} tensors of the base were unfrozen by hand, of {named}, and an adapter's file would hold none of them: "
        f"name them in modules_to_save (now: model.peft_config[{adapter_name!r}].modules_to_save = {owners[:3]}), or freeze them "
        "with requires_grad_(False) if they were not trained."
    )


def as_in_file(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that peft is about to put into a model, by the names that they have in its file."""
    held = {
        f"{name}.{inside}": f"{name}.{key}"
        for name, head in saved_modules(model, adapter_name).items()
        for key, inside in head.adapter_state_dict_load_map(adapter_name).items()
    }
    return {held.get(name, name): value for name, value in tensors.items()}


def base_heads(model: nn.Module, config: SmidgenConfig) -> dict[str, Tensor]:
    """Tensors of the base model's own heads that an adapter of this config would carry, named as in its file."""
    wrapped = saved_modules(model)
    inside = tuple(f"{name}." for name in wrapped)
    heads = {
        n: wrapped[n].original_module if n in wrapped else m
        for n, m in model.named_modules()
        if n.endswith(tuple(config.modules_to_save or ())) and not (inside and n.startswith(inside))
    }
    return {f"{_WRAP}{n}.{key}": value for n, m in heads.items() for key, value in m.state_dict().items()}


def stored_tensors(layer: AdaptedLayer, adapter_name: str, store_factors: bool | None = None) -> dict[str, Tensor]:
    """Stored tensors of an adapter at a layer, its factors among them as it was made unless told; factors are made first
    if they are asked for or if pins depend on them."""
    slot = layer.smidgen_slots[adapter_name]
    assert isinstance(slot, Slot)
    if slot.residual is not None and (slot.residual.pins() or slot.store_factors or store_factors):
        slot = layer.slot(adapter_name)
    return slot.stored(store_factors)


def numbers(
    model: nn.Module, config: SmidgenConfig, adapter_name: str, given: Mapping[str, Any] | None = None
) -> Numbers:
    """What a save by this config writes of an adapter, from the live model or from a state dict; see
    ``tuner/numbers.py``."""
    layers = adapted_layers(model, adapter_name)
    live = {target: stored_tensors(layer, adapter_name, config.store_factors) for target, layer in layers.items()}
    return collect(layers, adapter_name, live, named_heads(model, adapter_name), given)


def file_tensors(config: SmidgenConfig, found: Numbers) -> dict[str, Tensor]:
    """What an adapter's file holds, heads not included: packed, in the config's number format."""
    return packing.cast(packing.pack(found.stored), config.store_dtype)


def settle(config: SmidgenConfig, layers: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Writes into the config of an adapter about to be saved the ties of its factors; and where the base weights changed
    since these were made, so that a file could not rebuild them, that they are stored."""
    if any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return
    here = {name for name, layer in layers.items() if not why_partial(layer.get_base_layer())}
    every = {
        n: layer.slot(adapter_name) if n in here else layer.smidgen_slots[adapter_name] for n, layer in layers.items()
    }
    slots = {n: s for n, s in every.items() if isinstance(s, Slot) and s.made_from}
    config.ties = {n: packing.encode_ties(s.ties) for n, s in slots.items() if s.ties is not None}
    moved = {name: layers[name].moved_since(slots[name]) for name in slots.keys() & here}
    if config.store_factors or not any(moved.values()) or _rebuilds(layers, slots, moved):
        return
    worst = max(moved, key=moved.__getitem__)
    config.store_factors = True
    logger.warning(
        "The base weights changed after the adapter was put in (that of %r by %.1e), so its factors cannot be made of them "
        "again: they are stored in the file, which is larger for it (store_factors=True). To keep files small, load or cast "
        "the base before the adapter is put in.",
        worst,
        moved[worst],
    )


def stamp(
    model: nn.Module, config: SmidgenConfig, layers: dict[str, AdaptedLayer], adapter_name: str, found: Numbers
) -> None:
    """Writes base lock and canary into the config of an adapter about to be saved."""
    if not layers or any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return
    if patterns.held(config):  # a file names its modules
        config.target_modules = set(layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    matrices = {n: layer.base_matrix(found.weights.get(n)).flatten(0, -2) for n, layer in layers.items()}
    config.base_lock = base_lock.make_lock(matrices, rest_of(base_parts(model, found), config, layers))
    config.mark_current().canary = make_canary(layers, adapter_name, found)


@torch.no_grad()
def _rebuilds(layers: dict[str, AdaptedLayer], slots: dict[str, Slot], moved: dict[str, float]) -> bool:
    """Whether the factors that base weights of now give make the deltas that the adapter has, as verify will ask."""
    off, size = 0.0, 0.0
    for name in (name for name, share in moved.items() if share > 0):
        slot, layer = slots[name], layers[name]
        again = Slot(slot.parts, slot.seed, size=slot.size, ties=slot.ties)
        again.fill(slot.trained() | {pin: getattr(slot, pin) for pin in slot.pins})
        again.to(next(slot.parameters()).device).prepare(layer.base_matrix)
        delta = slot.factors().dense()
        off += float((again.factors().dense() - delta).norm()) ** 2
        size += float(delta.norm()) ** 2
    return off <= REBUILT**2 * size


def tuner_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Adapted layers of any method of peft's or ours by target name, those that carry ``adapter_name`` if given."""
    return {
        name.removeprefix(_WRAP): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and (adapter_name is None or adapter_name in _carried(layer))
    }


def _carried(layer: Any) -> set[str]:
    """Names of the adapters at a layer."""
    held: Any = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {adapter for by_name in held if hasattr(by_name, "keys") for adapter in by_name.keys()}  # noqa: SIM118


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Parameters of adapters of any method, each once: layers may share some. Heads are not included."""
    found: dict[int, nn.Parameter] = {}
    for layer in tuner_layers(model, adapter_name).values():
        for held in (getattr(layer, name, None) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
            if isinstance(held, nn.ModuleDict | nn.ParameterDict):
                for name, value in held.items():
                    if adapter_name in (None, name):
                        own = value.parameters() if isinstance(value, nn.Module) else [value]
                        found |= {id(p): p for p in own if isinstance(p, nn.Parameter)}
    return list(found.values())


def inject(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Puts an adapter into a model of any library by peft's own call: a host's method may ask for another peft.

    Methods whose layers share something (VeRA and its kin) keep it in a PeftModel around the model.

    Raises:
        ConfigError: peft refuses its own config.
        TargetError: a layer carries an adapter of another tuner; in files one of the two would have the wrong name.
    """
    if not isinstance(config, SmidgenConfig) and not config.inference_mode:
        _check_lists_of_peft(model, config)
    owner = model if isinstance(model, PeftModel) else model.__dict__.get(_OWNER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        try:
            if owner is not None and (owner is model or _shares(config)):
                owner.add_adapter(adapter_name, config)
                owner.set_adapter(adapter_name)
            elif _shares(config):
                model.__dict__[_OWNER] = get_peft_model(model, config, adapter_name)  # no submodule: it holds the model
            else:
                inject_adapter_in_model(config, model, adapter_name)
        except SmidgenError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"peft refuses its own {type(config).__name__}: {error}") from error
    for name, layer in tuner_layers(model, adapter_name).items():
        if name.endswith(".base_layer") or isinstance(getattr(layer, "base_layer", None), BaseTunerLayer):
            raise TargetError(
                f"Layer {name.removesuffix('.base_layer')!r} carries an adapter of another kind; adapters of one layer are all "
                "smidgen's or all of one method of peft's. Choose other target_modules, or merge the other adapter first."
            )
    if hasattr(
        model, "_hf_peft_config_loaded"
    ):  # what transformers and diffusers ask before they save or list adapters
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        config.base_model_name_or_path = model.__dict__.get("name_or_path")


def _check_lists_of_peft(model: nn.Module, config: Any) -> None:
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


def _shares(config: PeftConfig) -> bool:
    return bool(getattr(peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "uses_shared_state", False))  # type: ignore[call-overload]


def peft_tensors(model: nn.Module, adapter_name: str, given: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """What peft writes in the file of an adapter of its own, heads included, from the model or from a state dict."""
    owner = _owner(model, adapter_name)
    state = None if given is None else renamed(given, owner.state_dict())
    tensors = get_peft_model_state_dict(owner, state_dict=state, adapter_name=adapter_name)
    if given is not None:
        check_complete(tensors, get_peft_model_state_dict(owner, adapter_name=adapter_name), adapter_name)
    tensors = {name: whole(value) for name, value in tensors.items()}
    return {
        name if owner is not model or isinstance(model, PeftModel) else _WRAP + name: t for name, t in tensors.items()
    }


def put_peft_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], where: str) -> None:
    """Fills an adapter of peft's own from the tensors of its file.

    Raises:
        AdapterFileError: they are not those that the adapter calls for.
    """
    owner = _owner(model, adapter_name)
    packing.check_names(tensors, peft_tensors(model, adapter_name), where)
    for name, value in tensors.items():
        packing.check_tensor(name, value, tuple(value.shape), value.dtype, where)
    wrap = _WRAP if owner is model and not isinstance(model, PeftModel) else ""
    plain = {name.removeprefix(wrap): value for name, value in tensors.items()}
    try:
        set_peft_model_state_dict(owner, plain, adapter_name=adapter_name)
    except RuntimeError as error:
        raise AdapterFileError(f"{where} does not fit this model: {error}") from error


def _owner(model: nn.Module, adapter_name: str) -> Any:
    """What peft saves and loads an adapter through."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    return model.__dict__[_OWNER] if _OWNER in model.__dict__ and _shares(config) else model


def remove(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out; layers and heads that carry no other become the base model's again."""
    for name, head in saved_modules(model, adapter_name).items():
        if set(head.modules_to_save) == {adapter_name}:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], head.original_module)
        else:
            head.delete_adapter(adapter_name, new_active_adapters=None)
    emptied: dict[int, nn.Module] = {}
    for name in model_keys(model, adapter_name).values():
        layer: Any = model.get_submodule(name)
        others = [other for other in layer.merged_adapters if other != adapter_name]
        if adapter_name in layer.merged_adapters:
            layer.unmerge()
        layer.delete_adapter(adapter_name)
        if others and not layer.merged:
            layer.merge(adapter_names=others)
        if not _carried(layer):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.base_layer)
            emptied[id(layer)] = layer.base_layer
    sharing.put_back(model, emptied)
    experts.close_stacks(model)
    bypass.follow(model)
    for module in list(model.modules()):
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            configs.pop(adapter_name, None)
            if not configs and not isinstance(module, BaseTuner):
                del module.peft_config
    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        model.__dict__.pop(_OWNER, None)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _mixed_batch_hooks(tuner: nn.Module, adapter_names: Sequence[str] | None):  # type: ignore[no-untyped-def]
    from contextlib import contextmanager
    from functools import partial

    @contextmanager
    def hooks():  # type: ignore[no-untyped-def]
        if adapter_names is None:
            yield
            return
        if tuner.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in tuner.modules() if isinstance(m, AdaptedLayer)]
        known = {name for layer in layers for name in layer.smidgen_slots}
        unknown = {n for n in adapter_names if n != "__base__"} - known
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        def add(_module, args, kwargs, names):  # type: ignore[no-untyped-def]
            return args, kwargs | {"adapter_names": names}

        handles = [
            layer.register_forward_pre_hook(partial(add, names=adapter_names), with_kwargs=True) for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return hooks()


def register() -> None:
    """Makes peft know the type; idempotent, no peft object is replaced.

    Raises:
        SmidgenError: peft's mappings are not where they were in the tested versions.
    """
    tables = (
        ("PEFT_TYPE_TO_CONFIG_MAPPING", SmidgenConfig),
        ("PEFT_TYPE_TO_TUNER_MAPPING", SmidgenModel),
        ("PEFT_TYPE_TO_PREFIX_MAPPING", PREFIX),
    )
    for table, value in tables:
        mapping = getattr(peft_mapping, table, None)
        if not isinstance(mapping, dict):
            import peft

            raise SmidgenError(
                f"peft {peft.__version__} has no mapping {table}; smidgen was tested with peft {', '.join(TESTED_PEFT)}."
            )
        mapping[PEFT_TYPE] = value
