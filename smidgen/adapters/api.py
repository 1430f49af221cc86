"""The short forms: adapt, save, load, and what a model carries. Everything also works through peft's own calls."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors.torch import save_file
from torch import Tensor, nn

from smidgen.adapters import hosts
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, as_folder, is_recipe, read_config, read_tensors
from smidgen.adapters.components import component_folders, denoiser, parts
from smidgen.adapters.tuner import patterns, renames, sharing
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.base import check_base
from smidgen.adapters.tuner.building import slot_layout
from smidgen.adapters.tuner.canary import check_deltas
from smidgen.adapters.tuner.carried import adapted_layers, adapter_parameters, check_mergeable, tuner_layers
from smidgen.adapters.tuner.config import (
    SmidgenConfig,
    check_ranks,
    config,
    is_ours,
    read_adapter,
    read_smidgen_config,
)
from smidgen.adapters.tuner.coverage import SMALL, coverage, gaps
from smidgen.adapters.tuner.defaults import default_targets
from smidgen.adapters.tuner.heads import base_heads, check_saved, head_tensors, saved_modules
from smidgen.adapters.tuner.injection import inject, peft_tensors, put_peft_tensors, remove
from smidgen.adapters.tuner.layer import MERGE_REFUSE
from smidgen.adapters.tuner.matching import matched_layers, outside_adapters
from smidgen.adapters.tuner.shards import in_pieces, one_writer
from smidgen.adapters.tuner.stored import file_tensors, numbers, settle, stamp
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError, did_you_mean

logger = logging.getLogger("smidgen")


def adapt(
    model: Any,
    method_or_config: str | PeftConfig,
    adapter_name: str = "default",
    **options: Any,
) -> Any:
    """Puts a fresh adapter into a model, in place: the output stays bit for bit the base model's until it is trained.

    Args:
        model: any torch module (diffusers and transformers models and ``PeftModel`` keep their class), or a whole
            diffusers pipeline, whose UNet or transformer is adapted; its text encoders are modules too, adapt them
            one by one under the same name.
        method_or_config: a method ("svfit"), or a config from :func:`smidgen.config` or of any method of peft's.
        adapter_name: must be new in this model.
        **options: as in :func:`smidgen.config` when a method is named.

    Returns:
        The same model, its base frozen, the new adapter active and trainable.

    Raises:
        ConfigError, TargetError: before anything of the model is changed.

    Example:
        >>> model = adapt(nn.Sequential(nn.Linear(64, 64)), "svfit", r=8, target_modules=["0"])
        >>> trained_numbers(model)
        8
    """
    target = denoiser(model)
    own = config(method_or_config, **options) if isinstance(method_or_config, str) else method_or_config
    if not isinstance(own, PeftConfig):
        raise ConfigError(f"What to adapt with is a method's name or a config (smidgen.config, peft's), got {own!r}.")
    if not isinstance(method_or_config, str) and options:
        raise ConfigError(f"Options {sorted(options)} go with a method's name; set them in the config itself.")
    _check_name(target, adapter_name)
    hosts.check_host(target)
    chosen_here = isinstance(own, SmidgenConfig) and own.target_modules is None
    everything = isinstance(own, SmidgenConfig) and own.target_modules == "all-linear"
    if isinstance(own, SmidgenConfig) and own.target_modules is None:
        own = replace(own, target_modules=default_targets(target))
    with _all_or_nothing(target, adapter_name):
        inject(target, own, adapter_name)
        set_active(target, adapter_name)
        for layer in adapted_layers(target, adapter_name).values():
            layer.slot(adapter_name)
    hosts.follow_trainer(target)
    if chosen_here or everything:
        _say_gaps(target, adapter_name, chosen_here)
    return model


def _say_gaps(model: nn.Module, adapter_name: str, chosen_here: bool) -> None:
    """Warns when targets that nobody named leave out main parts of a model."""
    found = coverage(model, adapter_name)
    said = gaps(found) if chosen_here else []
    if found.fused >= SMALL:
        said.append(
            f"{found.fused:.0%} of the parameters are in weights that belong to no layer, which carry no adapter"
        )
    if found.experts >= SMALL:
        said.append(
            f"{found.experts:.0%} of the parameters are in fused experts, which are adapted when they are named: add "
            f"{' or '.join(map(repr, sorted(found.owners)))} to target_modules"
        )
    if said:
        logger.warning(
            "The %s targets reach %d of %d layers of this %s, %.1f%% of its parameters: %s.%s",
            "default" if chosen_here else "all-linear",
            found.layers,
            found.there,
            type(model).__name__,
            100 * found.share,
            "; ".join(said),
            ' Name target_modules, or take "all-linear", to choose others.' if chosen_here else "",
        )


@contextmanager
def _all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within, a model is given an adapter; on an error it becomes what it was: classes, active adapters and flags."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    active = [(layer, list(layer.active_adapters)) for layer in tuner_layers(model).values()]
    try:
        yield
    except BaseException:
        remove(model, adapter_name)
        for layer, names in active:
            layer._active_adapter = names
        for parameter, flag in flags:
            if parameter.requires_grad != flag:  # one without a shape cannot be told
                parameter.requires_grad_(flag)
        raise


def _check_name(model: nn.Module, adapter_name: str) -> None:
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise SmidgenError(f"An adapter's name is a word without dots, got {adapter_name!r}.")
    if adapter_name in names(model):
        raise SmidgenError(f"The model already carries an adapter named {adapter_name!r}; choose another adapter_name.")


# ---- files -----------------------------------------------------------------------------------------------------------


def save(
    model: Any,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Any] | None = None,
    store_factors: bool | None = None,
) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, all or nothing; of peft's methods, what peft writes.

    Of a pipeline, every component that carries the adapter is written: the UNet or transformer in the folder itself,
    each other in a sub-folder of its name (``text_encoder``). A model that ``fully_shard`` (FSDP2) has sharded is
    gathered: every process makes the call, the first one writes. With a whole ``state_dict`` the one that has it saves alone.

    Args:
        model: what carries the adapter, or a wrapper around it (DistributedDataParallel, AveragedModel, compiled).
        path: the folder.
        adapter_name: which adapter.
        state_dict: numbers to write in place of the model's: a moving average, the best step, gathered shards; of the
            model as it is or wrapped, or the adapter's own (``peft.get_peft_model_state_dict``).
        store_factors: write the frozen factors too, so that the file goes on any base of these shapes; whatever the
            adapter was made with. None: as its config says.

    Returns:
        The folder.

    Raises:
        SmidgenError: the model carries no such adapter, what is to be written is missing, misshapen or not finite, or one
            of peft's methods is told to store factors.
    """
    _check_carried(model, [adapter_name])
    folder = _path(path)
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; an adapter is saved into a folder.")
    everything = parts(model)
    carrying = {where: part for where, part in everything.items() if adapter_name in names(part)}
    if state_dict is not None and len(carrying) > 1:
        raise SmidgenError(
            f"A state dict is of one module, and adapter {adapter_name!r} is on {len(carrying)} of this pipeline "
            f"({', '.join(where or 'the denoiser' for where in carrying)}): save them one by one."
        )
    read = [state_dict.values()] if state_dict is not None else [part.parameters() for part in carrying.values()]
    together = any(in_pieces(value) for values in read for value in values)
    content = {where: _content(part, adapter_name, state_dict, store_factors) for where, part in carrying.items()}
    with one_writer(together) as writes:
        if writes:
            write_parts(folder, content, everything.keys() - carrying.keys())
    return folder


def write_parts(
    folder: Path, content: Mapping[str, tuple[Any, dict[str, Tensor], Any]], gone: Iterable[str] = ()
) -> None:
    """Puts (config, tensors, metadata) of an adapter's parts into their sub-folders in one step; what an earlier writer left of the
    parts in ``gone`` goes."""
    old = [f"{where}/{name}".removeprefix("/") for where in gone for name in (CONFIG_NAME, WEIGHTS_NAME)]
    with new_files(folder, old) as scratch:
        for where, (own, tensors, metadata) in content.items():
            _write(own, tensors, metadata, scratch / where)


def _content(
    model: nn.Module, adapter_name: str, given: Mapping[str, Any] | None, store_factors: bool | None
) -> tuple[Any, dict[str, Tensor], Any]:
    """(config, tensors, metadata) of an adapter's files."""
    own: Any = model.peft_config[adapter_name]  # type: ignore[index]
    check_saved(model, adapter_name)
    if not isinstance(own, SmidgenConfig):
        if store_factors is not None:
            raise SmidgenError(
                f"store_factors is for smidgen's methods; {adapter_name!r} is a {own.peft_type} of peft's."
            )
        return own, peft_tensors(model, adapter_name, given), {"format": "pt"}
    layers = adapted_layers(model, adapter_name)
    settle(own if store_factors is None else (own := replace(own, store_factors=store_factors)), layers, adapter_name)
    found = numbers(model, own, adapter_name, given)
    stamp(model, own, layers, adapter_name, found)
    return own, file_tensors(own, found) | found.heads, None


def _write(own: Any, tensors: dict[str, Tensor], metadata: Any, folder: Path) -> None:
    stored = copy.copy(own)
    stored.inference_mode = True
    if isinstance(stored, SmidgenConfig):
        stored.seal(tensors)
    base = own.base_model_name_or_path
    if base and (Path(base).is_absolute() or Path(base).is_dir()):  # where it lay on this machine is nobody's business
        stored.base_model_name_or_path = Path(base).name
    folder.mkdir(parents=True, exist_ok=True)
    stored.save_pretrained(str(folder))
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS_NAME, metadata)


def load(model: Any, path: str | os.PathLike[str], adapter_name: str = "default") -> Any:
    """Loads an adapter folder into a model and makes it active. Everything is checked first; on any error the model is
    left as it was.

    Args:
        model: the base model (any torch module, or one that already carries adapters), or a whole diffusers pipeline,
            each of whose components gets what the folder holds for it.
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``, of any method of ours or peft's; or a
            ``.recipe`` of ``smidgen predict``, whose generator is at hand.
        adapter_name: any name; need not be the one it was saved under.

    Raises:
        AdapterFileError: a missing, truncated, hostile or ill-fitting file, NaN included.
        BaseLockError: another base model.
        TargetError: the base lacks the target modules.
    """
    load_parts(folders(model, _path(path)).values(), adapter_name)
    if isinstance(model, nn.Module):
        say_others(Path(path))
    return model


def say_others(path: Path) -> None:
    """Warns that an adapter folder, read for one module, holds adapters of other parts of a pipeline."""
    if others := [other.name for other in component_folders(path)]:
        logger.warning(
            "%s also holds adapters of a pipeline's %s: load it into the pipeline to have them.",
            path,
            ", ".join(others),
        )


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise AdapterFileError(f"Where an adapter lies is a path, got {path!r}.")
    return Path(path)


def load_parts(found: Iterable[tuple[nn.Module, Path]], adapter_name: str) -> None:
    """Loads each folder into its module: all, or none of them."""
    ready = [(part, _checked(part, folder, adapter_name)) for part, folder in found]
    with ExitStack() as stack:
        for part, put_in in ready:
            stack.enter_context(_all_or_nothing(part, adapter_name))
            put_in()


def folders(model: Any, path: str | os.PathLike[str]) -> dict[str, tuple[nn.Module, Path]]:
    """The parts of a model that an adapter folder holds something for: sub-folder -> (part, folder).

    Raises:
        AdapterFileError: the folder holds nothing, or something for a component that the pipeline has not.
    """
    own = parts(model)
    if is_recipe(path):
        return {"": (own[""], Path(path))}
    folder = as_folder(path)
    inside = [] if isinstance(model, nn.Module) else [found.name for found in component_folders(folder)]
    for name in inside:
        if name not in own:
            raise AdapterFileError(
                f"{folder / name} is an adapter of a {name}, which a {type(model).__name__} has not."
            )
    if not inside or (folder / CONFIG_NAME).is_file():
        inside = ["", *inside]
    return {name: (own[name], folder / name) for name in inside}


def _checked(model: nn.Module, path: Path, adapter_name: str) -> Callable[[], None]:
    """Reads and checks a folder for a module without touching it; the call that follows puts the adapter in."""
    _check_name(model, adapter_name)
    if not is_ours(path):
        return _checked_of_peft(model, path, adapter_name)
    own, tensors = read_adapter(path)
    if own.checksum:
        own.mark_current().checksum = None  # what is trained from here on are other numbers
    called = renames.follow(own, model)
    unpacked, heads = fitting(model, own, str(path), called).unpack(tensors, str(path))

    def put_in() -> None:
        inject(model, own, adapter_name)
        set_active(model, adapter_name)
        for name, layer in adapted_layers(model, adapter_name).items():
            layer.smidgen_slots[adapter_name].fill(unpacked[name])  # type: ignore[operator]
            layer.slot(adapter_name)
        check_deltas(own, renames.in_file(called, adapted_layers(model, adapter_name)), adapter_name)
        with torch.no_grad():
            for name, tensor in head_tensors(model, adapter_name).items():
                tensor.copy_(heads[name])

    return put_in


def _checked_of_peft(model: nn.Module, path: Path, adapter_name: str) -> Callable[[], None]:
    kind = read_config(path).get("peft_type")
    if kind not in list(PeftType):
        raise AdapterFileError(f"{path} holds an adapter of type {kind!r}, which this peft does not know.")
    tensors = read_tensors(path)
    try:
        own: Any = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # whatever peft makes of it
        raise AdapterFileError(f"{path}: adapter_config.json is damaged ({error}).") from error
    check_ranks(vars(own), tensors, path)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    patterns.name_modules(own, list(outside_adapters(inner)))

    def put_in() -> None:
        inject(model, own, adapter_name)
        put_peft_tensors(model, adapter_name, tensors, str(path))
        set_active(model, adapter_name)

    return put_in


@dataclass(frozen=True)
class Fitting:
    """How files of one config lie on a model that they were found to fit.

    Attributes:
        chosen: the target layers; called: their names in the file, where they are others (:func:`renames.follow`).
        layout: what a file holds of each; heads: tensors of those in modules_to_save, as the model has them.
    """

    chosen: tuple[str, ...]
    called: Mapping[str, str]
    layout: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str, Tensor]

    def unpack(
        self, tensors: Mapping[str, Tensor], where: str
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """(tensors by target, heads in modules_to_save) of a file.

        Raises:
            AdapterFileError: they are not those that the model and the config call for.
        """
        layout, heads = self.layout, self.heads
        packing.check_names(tensors, {name for own in layout.values() for name in own} | heads.keys(), where)
        for name, wanted in heads.items():
            packing.check_tensor(name, tensors[name], tuple(wanted.shape), wanted.dtype, where)
        unpacked = packing.unpack({k: v for k, v in tensors.items() if k not in heads}, layout, where)
        held = {name: tensors[name].to(wanted.dtype) for name, wanted in heads.items()}  # beside codes they are halves
        return {name: unpacked[self.called.get(name, name)] for name in self.chosen}, held


def fitting(model: nn.Module, own: SmidgenConfig, where: str, called: Mapping[str, str]) -> Fitting:
    """Checks the config of a file against a model, base lock included, without touching the model."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    patterns.name_modules(own, list(outside_adapters(inner)))
    chosen = matched_layers(own, inner)
    check_base(own, chosen, inner)
    if called:
        logger.warning("%s: %s", where, renames.words(called))
    layout = renames.in_file(called, {name: slot_layout(own, layer, name) for name, layer in chosen.items()})
    return Fitting(tuple(chosen), called, layout, base_heads(inner, own))


# ---- what a model carries --------------------------------------------------------------------------------------------


def names(model: Any) -> list[str]:
    """Names of the adapters a model carries, of whatever method; of a pipeline, those of all its components."""
    return list(
        dict.fromkeys(name for part in parts(model).values() for name in getattr(part, "peft_config", None) or {})
    )


def _check_carried(model: Any, wanted: Iterable[str]) -> None:
    known = names(model)
    for name in wanted:
        if name not in known:
            raise SmidgenError(f"The model carries no adapter {name!r}.{did_you_mean(name, known)}")


def trained_numbers(model: Any, adapter_name: str | None = None) -> int:
    """Trained numbers of a model's adapter(s), heads in modules_to_save not included."""
    return sum(p.numel() for part in parts(model).values() for p in adapter_parameters(part, adapter_name))


def set_active(model: Any, adapter_names: str | list[str]) -> None:
    """Makes adapters active, several at once if a list is given: their deltas add."""
    wanted = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
    _check_carried(model, wanted)
    heads = [
        (head, name, [n for n in wanted if n in head.modules_to_save])
        for part in parts(model).values()
        for name, head in saved_modules(part).items()
    ]
    for _, name, trained in heads:
        if len(trained) > 1:
            raise SmidgenError(f"{name!r} was trained by each of {trained}; heads do not add, make one of them active.")
    merged = {n: layer for part in parts(model).values() for n, layer in tuner_layers(part).items() if layer.merged}
    if merged:
        logger.warning("Adapters are set while others are merged, which are unmerged first, as in peft.")
    for layer in merged.values():
        layer.unmerge()
    for part in parts(model).values():
        for layer in tuner_layers(part).values():
            layer.set_adapter(wanted)
        if isinstance(part, PeftModel) and len(wanted) == 1 and wanted[0] in names(part):
            part.active_adapter = wanted[0]
    for head, _, trained in heads:
        head.set_adapter(trained)


def _finite(name: str, strength: Any) -> float:
    try:
        found = float(strength)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SmidgenError(f"The strength of adapter {name!r} is a number, got {strength!r}.") from error
    if not isfinite(found):
        raise SmidgenError(f"The strength of adapter {name!r} is a finite number, got {found}.")
    return found


def set_strength(model: Any, strength: float | dict[str, float]) -> None:
    """Sets the strength of all adapters, or of each by name; 0 is the base model, the delta is linear in it.

    Raises:
        SmidgenError: no such adapter, no finite number, or a method of peft's that has no strength (OFT, VeRA); nothing is changed.
    """
    given = strength if isinstance(strength, Mapping) else dict.fromkeys(names(model), strength)
    _check_carried(model, given)
    wanted = {name: _finite(name, value) for name, value in given.items()}
    pairs = [
        (layer, name)
        for name in wanted
        for part in parts(model).values()
        for layer in tuner_layers(part, name).values()
    ]
    before = [(layer.scaling, dict(layer.scaling)) for layer, _ in pairs if hasattr(layer, "scaling")]
    merged = {layer: list(layer.merged_adapters) for layer, name in pairs if name in layer.merged_adapters}
    for layer in merged:
        layer.unmerge()  # what was merged has the strength of before
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # how peft says that nothing was done
            for layer, name in pairs:
                layer.set_scale(name, wanted[name])
    except (AttributeError, UserWarning) as error:
        for scaling, kept in before:
            scaling.update(kept)
        raise SmidgenError(
            f"Adapter {name!r} has no strength to set: peft's {type(layer).__module__.split('.')[-2]} has none."
        ) from error
    finally:
        for layer, again in merged.items():
            layer.merge(adapter_names=again)


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """Within: exactly the base model, also when nested or after merging."""
    layers = [layer for part in parts(model).values() for layer in tuner_layers(part).values()]
    wrappers = [head for part in parts(model).values() for head in saved_modules(part).values()]
    heads = [(head, head.disable_adapters) for head in wrappers]
    before = [
        (layer, layer.disable_adapters, list(layer.merged_adapters), list(layer.active_adapters)) for layer in layers
    ]
    grads = [(p, p.requires_grad) for module in (*layers, *wrappers) for p in module.parameters()]
    try:
        for head, _ in heads:
            head.enable_adapters(False)
        for layer, _, merged, _ in before:
            if merged:
                layer.unmerge()
            layer.enable_adapters(False)
        yield model
    finally:
        for layer, was_off, merged, active in before:
            if not was_off:
                layer._disable_adapters = False
                layer._active_adapter = active
            if merged:
                layer.merge(adapter_names=merged)
        for head, was_off in heads:
            head._disable_adapters = was_off
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def parameter_groups(
    model: Any, lr: float, transform_lr: float | None = None, weight_decay: float = 0.0, output_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: residuals, transforms (0.3 x lr unless given), output transforms (lr unless given) and all else that trains.

    Decay is safe on every member: trained numbers are differences from the start, except LoRA's and the ring's cores.
    """
    groups: dict[str, list[nn.Parameter]] = {"residual": [], "transform": [], "output": [], "other": []}
    adapted = [
        part for where, part in parts(model).items() if not where or names(part)
    ]  # a pipeline's VAE is not frozen
    for name, p in (named for part in adapted for named in part.named_parameters()):
        if p.requires_grad:
            last = name.rpartition(".")[2]
            kind = last.partition("_")[0] if ".smidgen_slots." in name else "other"
            groups[kind].append(p)
    rates = {"residual": lr, "transform": 0.3 * lr if transform_lr is None else transform_lr, "other": lr}
    rates["output"] = lr if output_lr is None else output_lr
    return [
        {"name": kind, "params": params, "lr": rates[kind], "weight_decay": weight_decay}
        for kind, params in groups.items()
        if params
    ]


def merge(model: Any, adapter_names: list[str] | None = None) -> Any:
    """Merges adapters into the base weights and takes the adapted layers away, in place: the active ones unless named.

    Adapters that are not merged go with the layers; a warning names them. Returns the model; of a ``PeftModel``, which is
    nothing without adapters, the model within.

    A weight that an adapted layer shares with others (tied embeddings, an encoder and its decoder) is theirs alone
    afterwards: the adapted layer gets one of its own, and a warning says so.

    Raises:
        SmidgenError: before anything is changed: rounding to the weights' dtype would lose more than half of an update, the
            weight is quantised, or it is made anew for each call (weight_norm, pruning); an active adapter would be lost, or
            a bank its layers.
    """
    _check_carried(model, adapter_names or ())
    _check_left(model, adapter_names)
    for part in parts(model).values():
        _check_merge(part, adapter_names)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for part in parts(model).values():
        _merge(part, adapter_names)
    return inner


def _check_left(model: Any, adapter_names: list[str] | None) -> None:
    """Merging takes the adapted layers away: what else is on them is named, and refused where it is at work."""
    layers = [layer for part in parts(model).values() for layer in tuner_layers(part).values()]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    merged = active if adapter_names is None else adapter_names
    lost = [name for name in active if name not in merged]
    if lost and set(active) & set(merged):
        raise SmidgenError(
            f"Merging {', '.join(merged)} takes the adapted layers away, and {', '.join(lost)} is active too: merge all of "
            f"{active}, or make only what you merge active (set_active), or merge for a while with peft's merge_adapter."
        )
    if any(getattr(layer, "banks", None) for layer in layers):
        raise SmidgenError(
            "A bank is on this model, and merging takes its layers away: delete the bank first (del bank), or let it answer "
            "the merged adapter as one of its rows."
        )
    left = [name for name in names(model) if name not in merged]
    if left:
        logger.warning("Merging %s takes %s out of the model too.", ", ".join(merged), ", ".join(left))


def _check_merge(model: nn.Module, adapter_names: list[str] | None) -> None:
    check_mergeable(model, adapter_names)
    for name, layer in tuner_layers(model).items():
        if not isinstance(layer, AdaptedLayer):
            if not all(bool(torch.isfinite(p).all()) for p in adapter_parameters(layer)):
                raise SmidgenError(f"The adapter at {name!r} holds numbers that are not finite; it was not merged.")
            continue
        wanted = [n for n in (adapter_names or layer.active_adapters) if n in layer.smidgen_slots]
        if wanted:
            merged, error = layer.merged_weight(wanted)
            if error > MERGE_REFUSE or not bool(torch.isfinite(merged).all()):
                raise SmidgenError(
                    f"Merging {wanted} at {name!r} would lose {error:.0%} of the update to rounding in {merged.dtype}; "
                    "cast the base to float32 first, or keep the adapter unmerged."
                )


def _merge(model: nn.Module, adapter_names: list[str] | None) -> None:
    for name, head in saved_modules(model).items():
        merged_heads = [n for n in adapter_names or head.active_adapters if n in head.modules_to_save]
        trained = head.modules_to_save[merged_heads[0]] if merged_heads else head.original_module
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], trained)
    sharing.untie(model, {n: layer for n, layer in tuner_layers(model).items() if not isinstance(layer, AdaptedLayer)})
    for layer in tuner_layers(model).values():
        layer.merge(adapter_names=adapter_names)
        layer.merged_adapters = []
        if isinstance(layer, AdaptedLayer):
            layer.forget_kept()
    for adapter_name in names(model):
        remove(model, adapter_name)
    sharing.settle(model)


__all__ = [
    "adapt",
    "default_targets",
    "denoiser",
    "disabled",
    "load",
    "merge",
    "names",
    "parameter_groups",
    "parts",
    "read_adapter",
    "read_smidgen_config",
    "save",
    "set_active",
    "set_strength",
    "trained_numbers",
]
