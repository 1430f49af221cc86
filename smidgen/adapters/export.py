"""Adapters as files of other programs, from a model that carries them: exact, or refused in a sentence.

An adapter changes a layer's weight by W (T - I) + D. Where there is no T, D is written by its own factors (svfit, loldu, seeded, lora,
rings): nothing is decomposed anew, so nothing is lost. Each file is read back by the rules of the program that it is for.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.checkpoint.formats import FORMATS, Format, Lora, Place, Rotation, Scales, Source
from smidgen.adapters.components import parts
from smidgen.adapters.outputs.magnitude import Magnitude
from smidgen.adapters.outputs.scale import Scale
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.transforms.diagonal import Diagonal
from smidgen.adapters.transforms.rotation import Rotation as Turn
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.carried import tuner_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.heads import head_tensors
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.errors import ConfigError, SmidgenError, did_you_mean

MOST_LOST = 0.15  # of an adapter, before a file is refused unless loss is allowed
Approximate = Callable[[Any, str], Lora]  # (an adapted layer, the adapter's name) -> a low-rank stand-in for its change


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        to: the format.
        folder: where.
        files: names there, with their bytes.
        layers: how many the reader finds, which is all.
        notes: sentences about what was lost or left behind.
    """

    to: str
    folder: Path
    files: Mapping[str, int]
    layers: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        listed = ", ".join(self.files)
        return " ".join(
            [f"{self.folder}: {listed}, {self.layers} of {self.layers} layers, {size(self.bytes)}.", *self.notes]
        )


def export(
    model: Any,
    out: str | os.PathLike[str],
    to: str,
    adapter_name: str = "default",
    *,
    base: str | None = None,
    about: Mapping[str, Any] | None = None,
    approximate: Approximate | None = None,
    dtype: torch.dtype | None = None,
    allow_loss: bool = False,
) -> Exported:
    """Writes an adapter as another program's file or files into the folder ``out``, at its present strength.

    Args:
        model: a module or a diffusers pipeline that carries the adapter; it is not changed.
        out: the folder, or the ``.safetensors`` file of a format of one file. Files of other names in a folder stay.
        to: a format of :data:`smidgen.adapters.checkpoint.formats.FORMATS`.
        adapter_name: which adapter.
        base: what the file calls the base model; the adapter's own name for it unless given.
        about: more of what the file is to say of where it comes from.
        approximate: makes a low-rank stand-in of a change that is no low-rank product; without it such a change is refused.
        dtype: number format of a merged model's weights; the model's own unless given.
        allow_loss: write a merged model even if rounding loses more than ``MOST_LOST`` of the adapter.

    Raises:
        SmidgenError: the adapter has no exact form there (the sentence names what would work), or the model carries no such adapter.
        AdapterFileError: what was written is not what its reader would find; nothing is left of it.

    Example:
        >>> import smidgen, tempfile
        >>> model = smidgen.adapt(nn.Sequential(nn.Linear(8, 8)), "svfit", r=4, target_modules=["0"])
        >>> export(model, tempfile.mkdtemp(), "peft").layers
        1
    """
    if to not in FORMATS:
        raise ConfigError(f"There is no format {to!r}.{did_you_mean(to, FORMATS)} Known: {', '.join(FORMATS)}.")
    format, found = FORMATS[to], layers(model, adapter_name)
    own = _own_form(model, adapter_name, found) if to == "peft" else {}
    source = _source(model, adapter_name, found, base, {**(about or {}), **own})
    notes: tuple[str, ...] = ()
    _check_heads(format, source)
    for place in found:
        if why := format.refusal(place, source):
            raise SmidgenError(f"{place} cannot go into a {format.name} file: {why}.")
    if format.holds == "change":
        for place, layer in found.items():
            if isinstance(layer, AdaptedLayer):
                layer.check_mergeable(str(place))
    if format.holds == "weight":
        source, content, notes = _merge(source, found, adapter_name, dtype, allow_loss)
    else:
        content = {p: _held(format, source, p, layer, adapter_name, approximate) for p, layer in found.items()}
    path = format.place(Path(out))
    folder = path if format.file is None else path.parent
    with new_files(folder) as scratch:
        written = scratch if format.file is None else scratch / path.name
        format.write(content, source, written)
        count = format.check(content, source, written)
        files = {str(p.relative_to(scratch)): p.stat().st_size for p in sorted(scratch.rglob("*")) if p.is_file()}
    return Exported(to, folder, files, count, notes)


def layers(model: Any, adapter_name: str = "default") -> dict[Place, Any]:
    """The adapted layers of a model or pipeline, by where they are.

    Raises:
        SmidgenError: it carries no such adapter.
    """
    found = {}
    for component, part in _components(model).items():
        for name, layer in tuner_layers(part, adapter_name).items():
            found[place_of(component, name, layer)] = layer
    if not found:
        known = api.names(model)
        raise SmidgenError(f"The model carries no adapter {adapter_name!r}.{did_you_mean(adapter_name, known)}")
    return found


def place_of(component: str, name: str, layer: Any) -> Place:
    """Where an adapted layer is, and what a file has to know of it."""
    inner = layer.get_base_layer()
    kind = kind_of(inner)
    if kind is None:
        raise SmidgenError(f"{name!r} is a {type(inner).__name__}, of which no file of another program is known.")
    if kind.name != "conv2d":
        _, rows, cols, count = kind.geometry(inner)
        shape = {"conv1d": (cols, rows), "experts": (count, rows, cols)}.get(kind.name, (rows, cols))
        return Place(component, name, shape, kind.name)
    plain = inner.padding_mode == "zeros" and set(inner.dilation) == {1}
    return Place(component, name, tuple(inner.weight.shape), kind.name, inner.groups, plain)


def exact(layer: Any, adapter_name: str) -> Lora | None:
    """The change of an adapted layer by the adapter's own factors, None where it is no product of two (of fused experts: of many)."""
    if isinstance(layer, AdaptedLayer):
        slot = layer.slot(adapter_name)
        if (
            slot.transform is not None
            or slot.output is not None
            or slot.residual is None
            or slot.parts.lead("residual")
        ):
            return None
        own = slot.factors().weighed(layer.scaling[adapter_name])
        up = own.up if own.diagonal is None else own.up * own.diagonal
        return Lora(_plain_tensor(up), _plain_tensor(own.down))
    if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A and not layer.lora_variant.get(adapter_name):
        pair: Any = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        a, b = (_plain_tensor(side.weight).flatten(1) for side in pair)
        return Lora(b * layer.scaling[adapter_name], a)
    return None


def _plain_tensor(value: Tensor) -> Tensor:
    return value.detach().float().cpu().contiguous()


def rotation(layer: Any, adapter_name: str) -> Rotation | None:
    """The rotation of an adapted layer's input, None where its change is anything else."""
    slot = layer.slot(adapter_name) if isinstance(layer, AdaptedLayer) else None
    if slot is None or not isinstance(slot.transform, Turn) or slot.residual is not None or slot.output is not None:
        return None
    if slot.groups != 1:
        return None
    if layer.scaling[adapter_name] != 1:
        return None
    return Rotation(slot.trained()["transform_q"].detach().float().cpu().contiguous(), slot.transform.block)


def dora(layer: Any, adapter_name: str) -> Lora | None:
    """The change of an adapted layer by factors and a magnitude, as DoRA has it; None where it is anything else."""
    slot = layer.slot(adapter_name) if isinstance(layer, AdaptedLayer) else None
    if slot is None or not isinstance(slot.output, Magnitude) or slot.residual is None or slot.transform is not None:
        return None
    if slot.groups != 1 or layer.scaling[adapter_name] != 1:
        return None
    with torch.no_grad():
        own, norms = slot.factors().weighed(), layer.norms(slot, slot.trained())
    up = own.up if own.diagonal is None else own.up * own.diagonal
    magnitude = norms["output_base_norms"] + slot.trained()["output_e"]
    return Lora(_plain_tensor(up), _plain_tensor(own.down), magnitude=_plain_tensor(magnitude))


def scales(layer: Any, adapter_name: str) -> Scales | None:
    """The factors of an adapted layer's outputs, where it has no bias, or of its input; None where its change is anything else."""
    slot = layer.slot(adapter_name) if isinstance(layer, AdaptedLayer) else None
    if slot is None or slot.residual is not None or (slot.transform is not None) == (slot.output is not None):
        return None
    of_input = slot.transform is not None
    if not isinstance(slot.transform if of_input else slot.output, Diagonal | Scale) or slot.parts.stacked:
        return None
    if not of_input and layer.get_base_layer().bias is not None:
        return None
    (e,) = slot.trained().values()
    return Scales(1 + layer.scaling[adapter_name] * _plain_tensor(e).flatten(), of_input)


def held_exactly(format: Format, place: Place, layer: Any, adapter_name: str = "default") -> Any:
    """What a format holds of an adapted layer as it is, None where there is no such thing."""
    found = _EXACT[format.holds](layer, adapter_name)
    return dora(layer, adapter_name) if found is None and format.magnitudes else found


def change(layer: Any, adapter_name: str) -> Tensor | None:
    """The difference that an adapter makes to a layer's weight, in the weight's own layout; None where it cannot be told."""
    if isinstance(layer, AdaptedLayer):
        return layer.delta_weight(adapter_name).detach().float().cpu()
    if exact(layer, adapter_name) is not None:
        return layer.get_delta_weight(adapter_name).detach().float().cpu()  # type: ignore[no-any-return]
    return None


def lost(weight: Tensor, change: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(|rounded change - change|^2, |change|^2) of a weight [rows, ...] and of the weight with the change in it, both rounded to
    ``dtype``; int8 by rows, each with a scale of its own.

    Example:
        >>> error, size = lost(torch.ones(1, 2), torch.tensor([[0.5, 0.0]]), torch.bfloat16)
        >>> error, size
        (0.0, 0.25)
    """
    weight = weight.detach().float().cpu()
    rounded = _round(weight + change, dtype) - _round(weight, dtype)
    return float((rounded - change).square().sum()), float(change.square().sum())


def _round(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return weight.to(dtype).float()
    rows = weight.flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return ((rows / scale).round() * scale).reshape(weight.shape)


def size(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size(14_400), size(2_880_000)
        ('14 kB', '2.9 MB')
    """
    return (
        f"{count} bytes" if count < 1000 else f"{count / 1000:.0f} kB" if count < 10**6 else f"{count / 10**6:.1f} MB"
    )


def _held(
    format: Format, source: Source, place: Place, layer: Any, adapter_name: str, approximate: Approximate | None
) -> Any:
    """What a format holds of a layer.

    Raises:
        SmidgenError: there is no such thing, or it is not finite.
    """
    found: Any = held_exactly(format, place, layer, adapter_name)
    if found is None and format.holds == "lora" and approximate is not None:
        found = approximate(layer, adapter_name)
    if found is None:
        raise SmidgenError(_refusal(format, source, place, layer, adapter_name))
    tensors = [found] if isinstance(found, Tensor) else [value for value in found if isinstance(value, Tensor)]
    if not all(bool(torch.isfinite(value).all()) for value in tensors):
        raise SmidgenError(f"The adapter at {place} holds numbers that are not finite; nothing was written.")
    return found


_EXACT: dict[str, Callable[[Any, str], Any]] = {"lora": exact, "rotation": rotation, "scales": scales, "change": change}


def _refusal(format: Format, source: Source, place: Place, layer: Any, adapter_name: str) -> str:
    """Why an adapter has no exact form in a format, and what would work."""
    what = f"{source.about.get('method', 'The adapter')} at {place}"
    if format.holds == "rotation":
        strong = isinstance(layer, AdaptedLayer) and layer.scaling[adapter_name] != 1
        why = "is not at strength 1, and peft's OFT has no strength" if strong else "is no rotation alone"
        return f"{what} {why}; --to merged or full-diff holds it as it is."
    if format.holds == "scales":
        own = layer.slot(adapter_name) if isinstance(layer, AdaptedLayer) else None
        biased = own is not None and isinstance(own.output, Scale) and len(list(own.members())) == 1
        why = (
            "scales the outputs of a layer that has a bias, and peft's (IA)^3 would scale the bias too"
            if biased
            else "is no factor for each feature alone"
        )
        return f"{what} {why}; --to merged or full-diff holds it as it is."
    if not isinstance(layer, AdaptedLayer):
        return f"{what} is no plain LoRA; --to merged holds it, and peft reads the folder as it is."
    if isinstance(layer.slot(adapter_name).output, Magnitude):
        why = "peft's DoRA has no strength, no transform and no groups"
        if not format.magnitudes:
            why = f"a {format.name} file holds none that its readers agree on (LyCORIS divides dora_scale by |W + D|, ComfyUI by |W|)"
        return (
            f"{what} has a magnitude, and {why}: --to full-diff (ComfyUI, LyCORIS) and --to merged hold it exactly, --to peft too where it "
            "is DoRA at strength 1."
        )
    turned = rotation(layer, adapter_name) is not None
    return (
        f"{what} multiplies the weight by a transform of full rank, which is no LoRA, and a {format.name} file holds nothing else: "
        f"--to full-diff (ComfyUI, LyCORIS) and --to merged hold it exactly{', --to peft-oft too' if turned else ''}."
    )


def _merge(
    source: Source, found: Mapping[Place, Any], adapter_name: str, dtype: torch.dtype | None, allow_loss: bool
) -> tuple[Source, dict[Place, Tensor], tuple[str, ...]]:
    """A copy of the model with the adapter in its weights, those weights, and how much of the adapter rounding would take."""
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    sums = {kind: torch.zeros(2, dtype=torch.float64) for kind in formats}
    for layer in found.values():
        delta = change(layer, adapter_name)
        if delta is not None:
            weight = layer._original() if isinstance(layer, AdaptedLayer) else layer.get_base_layer().weight
            for kind in formats:
                sums[kind] += torch.tensor(lost(weight, delta, kind))
    shares = {kind: float((own[0] / own[1].clamp(min=1e-30)).sqrt()) for kind, own in sums.items()}
    told = ", ".join(f"{name} {shares[kind]:.1%}" for kind, name in formats.items())
    note = f"Of the adapter, rounding the weights takes: {told}."
    if dtype in shares and shares[dtype] > MOST_LOST and not allow_loss:
        raise SmidgenError(
            f"Rounding the merged weights to {formats[dtype]} would take {shares[dtype]:.0%} of the adapter, more than "
            f"{MOST_LOST:.0%}: merge in float32 (--dtype float32), keep the adapter beside the base, or say --allow-loss."
        )
    merged = copy.deepcopy(source.model)
    for part in _components(merged).values():
        for module in part.modules():
            if isinstance(module, BaseTunerLayer) and module.merged:  # others, which would stay in the weights
                module.unmerge()
    merged = api.merge(merged, [adapter_name])
    if dtype is not None and any(p.dtype != dtype for part in _components(merged).values() for p in part.parameters()):
        merged.to(dtype)
    inside = _components(merged)
    content = {place: _weight(inside[place.component], place) for place in found}
    return replace(source, model=merged), content, (note,)


def _weight(model: nn.Module, place: Place) -> Tensor:
    return model.get_parameter(place.layer if place.kind == "experts" else f"{place.layer}.weight").detach()


def _check_heads(format: Format, source: Source) -> None:
    named = [name for names in source.head_modules.values() for name in names]
    if named and not format.heads:
        raise SmidgenError(
            f"The adapter trained the head {named[0]!r} too, and a {format.name} file holds no heads: take --to peft, or --to merged."
        )


def _components(model: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline by their names in it, its denoiser first; of a model alone "" is the model."""
    named = {id(part): name for name, part in getattr(model, "components", {}).items()}
    return {where or named.get(id(part), ""): part for where, part in parts(model).items()}


def _own_form(model: Any, adapter_name: str, found: Mapping[Place, Any]) -> dict[str, Any]:
    """The config of a plain LoRA of ours without alpha, for the header of peft's form, by which the folder is ours too; {} otherwise."""
    own: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if (
        not isinstance(own, SmidgenConfig)
        or own.transform
        or own.output
        or own.residual != LowRank.name
        or own.store_dtype != "float32"
    ):
        return {}
    if own.residual_options.get("alpha") is not None or any(place.groups > 1 for place in found):
        return {}
    if any(layer.scaling[adapter_name] != 1 for layer in found.values()):
        return {}
    stored, tensors, _ = api._content(model, adapter_name, None, None)
    stored = copy.copy(stored)
    stored.inference_mode = True
    stored.seal(tensors)
    return {"config": stored.text()}


def _source(
    model: Any, adapter_name: str, found: Mapping[Place, Any], base: str | None, about: Mapping[str, Any]
) -> Source:
    everything = _components(model)
    carrying = {name: everything[name] for name in dict.fromkeys(place.component for place in found)}
    configs: dict[str, Any] = {name: part.peft_config[adapter_name] for name, part in carrying.items()}  # type: ignore[index]
    own = next(iter(configs.values()))
    heads = {name: head_tensors(part, adapter_name) for name, part in carrying.items()}
    named = {name: tuple(getattr(config, "modules_to_save", None) or ()) for name, config in configs.items()}
    base = public_name(base or own.base_model_name_or_path or "")
    return Source(
        components=tuple(everything) if not isinstance(model, nn.Module) else (),
        modules={name: [n for n, _ in _plain(part).items()] for name, part in carrying.items()},
        about=_about(own, base, about),
        base=base or None,
        heads={name: own for name, own in heads.items() if own},
        head_modules={name: own for name, own in named.items() if own},
        model=model,
    )


def _plain(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by their names in it: what adapters and heads brought is left out."""
    found = {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        inside = (".base_layer", ".smidgen_slots", ".modules_to_save", ".original_module", ".lora_", ".banks")
        if name and not any(word in f".{name}" for word in inside):
            found[name] = module
    return found


def _about(config: Any, base: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of where it comes from. A method is never named alone: LyCORIS has a ``tlora`` that is another paper's."""
    ours = isinstance(config, SmidgenConfig)
    label = config.label() if ours else str(getattr(config.peft_type, "value", config.peft_type)).lower()
    facts = {
        "method": f"smidgen {label}" if ours else f"peft {label}",
        "made_by": f"smidgen {version('smidgen')}",
        "base": base,
        "base_lock": getattr(config, "base_lock", None),
        **more,
    }
    return {name: value for name, value in facts.items() if value}
