"""Sitting on peft: the tuner that peft calls, and the type that peft knows it by.

Holds for peft 0.21.0 to 0.21.2 (``TESTED_PEFT``). peft has no registry for tuners from outside, so the type is written
into its mappings as a namespaced ``str``; adapters then work through get_peft_model, PeftModel, transformers' add_adapter
and diffusers' add_adapter alike. peft's private names are used in this folder alone; tests/adapters/test_peft_bridge.py
lists them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import peft.mapping as peft_mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from smidgen.adapters.checkpoint import checksum, packing
from smidgen.adapters.tuner import bypass, experts, patterns, sharing
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer, adapted_layer, is_plain
from smidgen.adapters.tuner.base import check_base
from smidgen.adapters.tuner.building import make_slot, members_of, resolve_energy, slot_layout
from smidgen.adapters.tuner.carried import WRAP, adapted_layers, check_mergeable, model_keys
from smidgen.adapters.tuner.config import PEFT_TYPE, SmidgenConfig
from smidgen.adapters.tuner.heads import as_in_file, check_saved, named_heads
from smidgen.adapters.tuner.injection import remove
from smidgen.adapters.tuner.matching import is_all_linear, is_target, matched_layers, naming_stacks, outside_adapters
from smidgen.adapters.tuner.stored import file_tensors, numbers, settle, stamp
from smidgen.errors import AdapterFileError, SmidgenError, did_you_mean

logger = logging.getLogger("smidgen")

TESTED_PEFT = ("0.21.0", "0.21.1", "0.21.2")
PREFIX = "smidgen_"


class SmidgenModel(BaseTuner):
    """The tuner: puts any adapter of this library into a model. One tuner for all methods, so methods mix."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # ---- injection -------------------------------------------------------------------------------------------------

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """All checks, before anything of the model is touched."""
        assert isinstance(peft_config, SmidgenConfig)
        chosen = matched_layers(peft_config, model)
        check_base(peft_config, chosen, model)
        resolve_energy(peft_config, chosen)
        for name, layer in chosen.items():
            members_of(peft_config, layer, name)
        if is_all_linear(peft_config):
            peft_config.target_modules = set(chosen)
        stacked = {name for name, layer in chosen.items() if isinstance(layer, experts.ExpertStack)}
        if stacked:
            peft_config.target_modules = naming_stacks(peft_config, model, chosen, stacked)
            experts.open_stacks(model, stacked)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return is_target(peft_config, key)

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
            slot = layer.smidgen_slots[adapter_name]
            if not (slot.awaits_file or slot.emptied):  # emptied: peft's low_cpu_mem_usage, numbers come later
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
            for parameter in layer.smidgen_slots[adapter_name].parameters() if is_plain(weight) else ():
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
        known = {key.removeprefix(WRAP): value for key, value in model.state_dict().items()}
        own = {name: known[name.removeprefix(WRAP)] for name in rest if name.removeprefix(WRAP) in known}
        try:
            packing.check_names(rest.keys() - own.keys(), (), "the adapter file")
            for name, wanted in own.items():
                packing.check_tensor(name, rest[name], tuple(wanted.shape), wanted.dtype, "the adapter file")
            unpacked = packing.unpack(packing.decode(packed, config.store_dtype, "the adapter file"), layout)
            if config.checksum:
                checksum.check_tensors(
                    config.checksum["tensors"], as_in_file(model, adapter_name, state_dict), "the adapter file"
                )
                config.mark_current().checksum = None
        except AdapterFileError:
            remove(model, adapter_name)
            raise
        out = {name: value.to(own[name].dtype) for name, value in rest.items()}  # heads beside codes are halves
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
