"""A folder of peft's LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``, for peft, transformers, vLLM and whatever reads those.

Of a pipeline, the UNet or transformer is in the folder itself and each other component in a sub-folder of its name, as in ours.
Ranks that differ are in ``rank_pattern``; alpha is the rank everywhere, the scale is in B.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import write_file
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.base_lock import read_lock
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, parse_config, read_config, read_tensors
from smidgen.adapters.checkpoint.formats.format import (
    HEADER,
    Content,
    Format,
    Lora,
    Place,
    Source,
    as_weights,
    both,
    check_change,
    check_layers,
    check_magnitude,
    sides,
)  # fmt: skip
from smidgen.errors import AdapterFileError

WRAP = "base_model.model."  # what peft puts before the names of a model's modules
ENDINGS = {"lora_A.weight": "a", "lora_B.weight": "b"}
MAGNITUDE = {"lora_magnitude_vector": "magnitude"}
_DENOISERS = ("unet", "transformer")
# Options of peft's that no file of ours sets, each of which would make peft's another adapter.
_ELSEWHERE = (
    "use_dora",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
)
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # peft refuses their out_proj: kernels read it


class PeftFolder(Format):
    """What folders of peft's methods share: one a component, a config that names targets exactly, heads beside."""

    heads = True
    peft_type: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]

    def config(self, places: Mapping[Place, Any], options: Mapping[str, Any]) -> PeftConfig:
        """peft's own config for these layers."""
        raise NotImplementedError

    def layers(self, places: Mapping[Place, Any]) -> dict[Place, dict[str, Tensor]]:
        """The tensors of each layer by the ends of their keys."""
        raise NotImplementedError

    def check_layer(
        self, place: Place, own: Mapping[str, Tensor], value: Any, config: Mapping[str, Any], where: Path
    ) -> None:
        """AdapterFileError unless peft makes of these tensors what the adapter is."""
        raise NotImplementedError

    def write(self, content: Content, source: Source, path: Path) -> None:
        for component, places in by_component(content).items():
            inside = path / subfolder(component)
            inside.mkdir(exist_ok=True)
            names = {place.layer for place in places}
            heads = source.heads.get(component, {})
            config = self.config(
                places,
                {
                    "target_modules": exactly(names, source.modules.get(component, names)),
                    "modules_to_save": sorted(source.head_modules.get(component, ())) or None,
                    "base_model_name_or_path": source.base,
                    "inference_mode": True,
                },
            )
            tensors = {
                f"{WRAP}{place.layer}.{end}": value.contiguous()
                for place, own in self.layers(places).items()
                for end, value in own.items()
            }
            tensors |= {name: value.detach().cpu().contiguous() for name, value in heads.items()}
            config.save_pretrained(str(inside))
            write_file(inside / WEIGHTS_NAME, save(tensors, source.header))

    def check(self, content: Content, source: Source, path: Path) -> int:
        """peft finds layers by its config, whose targets must mean these and no others, and their numbers by the names they have
        in the model."""
        count = 0
        for component, places in by_component(content).items():
            inside = path / subfolder(component)
            config, tensors = read_config(inside), read_tensors(inside)
            if config.get("peft_type") != self.peft_type:
                raise AdapterFileError(
                    f"{inside.name}: peft_type is {config.get('peft_type')!r}, not {self.peft_type!r}."
                )
            named = {place.layer: place for place in places}
            meant = matching(config.get("target_modules") or (), source.modules.get(component, named))
            check_layers(dict.fromkeys(meant), named, inside, "peft's config")
            heads = source.heads.get(component, {})
            if lost := sorted(heads.keys() - tensors.keys()):
                raise AdapterFileError(f"{inside.name} lacks {lost[0]!r} of the head.")
            own = {key: value for key, value in tensors.items() if key not in heads}
            for key in own:
                if not key.startswith(WRAP):
                    raise AdapterFileError(f"{inside.name}: peft ignores {key!r}, which does not start with {WRAP!r}.")
            found = sides({k.removeprefix(WRAP): v for k, v in own.items()}, self.endings, inside)
            count += check_layers(found, named, inside, "peft")
            for name, place in named.items():
                self.check_layer(place, found[name], places[place], config, inside)
        return count


class Peft(PeftFolder):
    name = "peft"
    summary = "a folder of peft's LoRA, for peft, transformers, vLLM and whatever reads those"
    holds = "lora"
    magnitudes = True
    peft_type = "LORA"
    endings = ENDINGS | MAGNITUDE

    def refusal(self, place: Place, source: Source) -> str | None:
        if place.kind == "experts":
            return "peft's LoRA of fused experts is laid out by each model in its own way; --to merged holds it"
        if not place.plain:
            return "peft's LoRA of a convolution knows no dilation or padding mode; --to full-diff or merged hold it"
        kind = getattr(getattr(source.model, "config", None), "model_type", None)
        if kind in _MAMBA and place.layer.rpartition(".")[2] in ("out_proj", "conv1d"):
            return f"peft puts no LoRA on this layer of a {kind}; adapt others (in_proj, x_proj), or take --to merged"
        return None

    def config(self, places: Mapping[Place, Any], options: Mapping[str, Any]) -> PeftConfig:
        ranks = {place.layer: lora.r * place.groups for place, lora in places.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        pattern: dict[str, Any] = {"^" + re.escape(layer): r for layer, r in ranks.items() if r != usual}
        transposed = all(place.kind == "conv1d" for place in places)
        return LoraConfig(
            r=usual,
            lora_alpha=usual,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            fan_in_fan_out=transposed,
            use_dora=any(lora.magnitude is not None for lora in places.values()),
            **options,
        )

    def layers(self, places: Mapping[Place, Lora]) -> dict[Place, dict[str, Tensor]]:
        found: dict[Place, dict[str, Tensor]] = {}
        for place, lora in places.items():
            a, b = as_weights(lora, place)
            found[place] = {"lora_A.weight": _spread(a, place.groups), "lora_B.weight": b, **magnitude(lora, place)}
        return found

    def check_layer(
        self, place: Place, own: Mapping[str, Tensor], value: Lora, config: Mapping[str, Any], where: Path
    ) -> None:
        a, b = both(place.layer, own, where)
        kernel, width = own["a"].shape[2:], own["a"].shape[1]
        inputs = place.shape[0] if place.kind == "conv1d" else place.shape[1] * place.groups
        r = rank_of(config, place.layer)
        if kernel != place.shape[2:] or width != inputs or r != len(a):
            raise AdapterFileError(
                f"{where.name}: lora_A at {place} is {tuple(own['a'].shape)}, the layer takes {(r, inputs, *place.shape[2:])}."
            )
        a = _gathered(own["a"].float(), place).flatten(1)
        check_change(place, Lora(b, a, scale_of(config, place.layer, r)), value, where)
        check_magnitude(place, own.get("magnitude") if config.get("use_dora") else None, value, where)

    @staticmethod
    def read(folder: Path) -> dict[str, Lora]:
        """The LoRA in a folder by its layers' names.

        Raises:
            AdapterFileError: another kind of adapter, or one that is no product of two factors; damage.
        """
        config = read_config(folder)
        _check_plain(config, folder)
        tensors = {key.removeprefix(WRAP): value for key, value in read_tensors(folder).items()}
        found = {}
        for name, own in sides(tensors, ENDINGS, folder).items():
            a, b = both(name, own, folder)
            found[name] = Lora(b, a, scale_of(config, name, len(a)))
        return found


def magnitude(lora: Lora, place: Place) -> dict[str, Tensor]:
    """DoRA's magnitude by the end of its key, where there is one, in the shape that peft has it in."""
    if lora.magnitude is None:
        return {}
    shape = (1, -1, 1, 1) if place.kind == "conv2d" else (-1,)
    return {end: lora.magnitude.reshape(shape) for end in MAGNITUDE}


def own_options(folder: Path) -> dict[str, Any] | None:
    """The options of an adapter of ours that is in peft's form, from the header of its numbers; None where there are none.

    Raises:
        AdapterFileError: they are damaged.
    """
    file, theirs = folder / WEIGHTS_NAME, read_config(folder)
    if not file.is_file() or theirs.get("peft_type") != Peft.peft_type:
        return None
    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{file} is truncated or not a safetensors file ({error}).") from error
    text = told.get("config") if isinstance(told, dict) else None
    if not isinstance(text, str):
        return None
    own = parse_config(text.encode(), str(file))
    _check_as_written(theirs, own, folder / CONFIG_NAME)
    return own


def _check_as_written(theirs: Mapping[str, Any], own: Mapping[str, Any], where: Path) -> None:
    """The config that peft reads says what the one in the header does.

    Raises:
        AdapterFileError: somebody changed it; peft would follow that and the header's would not.
    """
    scales = (theirs.get("lora_alpha"), theirs.get("alpha_pattern") or {}, bool(theirs.get("use_rslora")))
    if scales != (theirs.get("r"), theirs.get("rank_pattern") or {}, False):  # as they are written, the scale is in B
        raise AdapterFileError(
            f"{where} was changed since it was written: r {theirs.get('r')} with lora_alpha {theirs.get('lora_alpha')}, a scale "
            "that peft would follow and the rest of the file knows nothing of. Put lora_alpha back to r, and set the strength where "
            "the adapter is used (smidgen.set_strength, --strength)."
        )
    changed = [name for name in _ELSEWHERE if theirs.get(name)]
    if own.get("base_lock") and set(theirs.get("target_modules") or ()) != set(read_lock(own["base_lock"]).targets):
        changed.append("target_modules")
    if changed:
        raise AdapterFileError(
            f"{where} was changed since it was written: {' and '.join(changed)}, which peft would follow and the rest of the file knows "
            "nothing of. Put it back from its source."
        )


def own_tensors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors of peft's form as ours: factors packed under their names, heads as they are.

    Raises:
        AdapterFileError: a factor is missing.
    """
    ends = tuple(f".{end}" for end in ENDINGS)
    heads = {key: value for key, value in tensors.items() if not key.endswith(ends)}
    named = {key.removeprefix(WRAP): value for key, value in tensors.items() if key not in heads}
    pairs = {name: both(name, own, where) for name, own in sides(named, ENDINGS, where).items()}
    return packing.pack({name: {"residual_a": a, "residual_b": b} for name, (a, b) in pairs.items()}) | heads


def by_component(content: Content) -> dict[str, dict[Place, Any]]:
    """The layers of each component."""
    found: dict[str, dict[Place, Any]] = {}
    for place, value in content.items():
        found.setdefault(place.component, {})[place] = value
    return found


def subfolder(component: str) -> str:
    """Where a component's adapter is in a folder."""
    return "" if component in _DENOISERS else component


def exactly(names: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Targets that mean ``names`` and no other module: peft takes the end of a name too."""
    if matching(sorted(names), modules) == set(names):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def matching(targets: Collection[str] | str, modules: Collection[str]) -> set[str]:
    """The modules that targets mean to peft: those that a text matches as a whole, or whose name ends in one of a list."""
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    ends = tuple(f".{target}" for target in targets)
    return {name for name in modules if name in targets or name.endswith(ends)}


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """The rank that peft gives a layer."""
    return int(_pattern(config.get("rank_pattern"), layer, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], layer: str, r: int) -> float:
    """alpha / r, as peft computes it for a layer."""
    alpha = _pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", r))
    return float(alpha) / (r**0.5 if config.get("use_rslora") else r)


def _pattern(patterns: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    own = patterns or {}
    return next((value for key, value in own.items() if re.match(rf"(.*\.)?({key})$", layer)), usual)


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(f"{path} holds an adapter of type {kind!r}, and only a plain LoRA is read here.")
    for option in ("use_dora", "lora_bias", "use_qalora"):
        if config.get(option):
            raise AdapterFileError(f"{path} was trained with {option}, so its delta is not a product of two factors.")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise AdapterFileError(f"{path} also trains biases or whole modules, which are no product of two factors.")


def _spread(a: Tensor, groups: int) -> Tensor:
    """The kernels [r, in / groups, kh, kw] of a grouped convolution as peft has them, [groups * r, in, kh, kw]: its first
    convolution sees all channels, so each group's kernels are zero outside its own."""
    if groups == 1:
        return a
    r, width = a.shape[:2]
    out = a.new_zeros(groups, r, groups, width, *a.shape[2:])
    for group in range(groups):
        out[group, :, group] = a
    return out.reshape(groups * r, groups * width, *a.shape[2:])


def _gathered(a: Tensor, place: Place) -> Tensor:
    """Inverse of :func:`_spread`: NaN where no grouped convolution does the same."""
    if place.groups == 1:
        return a
    width = place.shape[1]
    first = a[: len(a) // place.groups, :width]
    return first if torch.equal(_spread(first, place.groups), a) else first * float("nan")
