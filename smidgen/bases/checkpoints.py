"""Models on disk as tensors read one by one, and the layers they belong to: nothing is loaded as a whole.

A checkpoint is a transformers folder, a component of a diffusers pipeline, or a single safetensors file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.checkpoint.formats import Place, Source
from smidgen.adapters.checkpoint.formats.kohya import file_name
from smidgen.adapters.checkpoint.lazy import Changed, LazyTensors, Renamed
from smidgen.bases import families, packaged, transformers
from smidgen.bases.embedded import FOLDERS
from smidgen.bases.packaged import debug
from smidgen.bases.pipelines import import_diffusers
from smidgen.errors import AdapterFileError, ConfigError, did_you_mean
from smidgen.training.quiet import quiet

_MOST_CONFIG = 2**22
_DIFFERENCE = ".diff"
_ORIGINAL = "model.diffusion_model."  # the names of Stable Diffusion's own files


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its tensors by the names in its files, and its ``config.json`` ({} for a file alone)."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def model_class(self) -> Any:
        """The class that the config names, None for a file alone."""
        if "_class_name" in self.config:
            return getattr(import_diffusers(), self.config["_class_name"], None)
        if names := self.config.get("architectures"):
            import transformers as library

            return getattr(library, names[0], None)
        return None

    def skeleton(self) -> nn.Module | None:
        """The model without numbers; None for a file alone, and where the class cannot be made so."""
        cls = self.model_class()
        if cls is None:
            return None
        try:
            with quiet(), torch.device("meta"):
                if "_class_name" in self.config:
                    return cls.from_config(dict(self.config))  # type: ignore[no-any-return]
                return cls(transformers.load_config(str(self.path)))  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, KeyError):
            return None

    def load(self) -> tuple[Any, list[str]]:
        """(the model in fp32, names of parameters that the files lack)."""
        cls = self.model_class()
        if cls is None:
            raise ConfigError(f"{self.path} does not say of which class its model is, so it cannot be run.")
        with transformers.hub_errors(str(self.path)), quiet():
            if "_class_name" in self.config:
                return cls.from_pretrained(self.path).eval().float(), []
            model, info = cls.from_pretrained(self.path, dtype=torch.float32, output_loading_info=True)
        return model.eval(), list(info["missing_keys"])


def read_checkpoint(name: str) -> dict[str, Checkpoint]:
    """The components of a model by name, ``""`` for one that has none: a packaged or embedded name, a folder, or a file.

    Raises:
        ConfigError, AdapterFileError: nothing is there, or nothing that can be read tensor by tensor.
    """
    path = _located(name)
    if path.is_file():
        tensors = LazyTensors([path])
        if any(key.startswith(_ORIGINAL) for key in tensors):
            raise ConfigError(
                f"{path} has the names of Stable Diffusion's own files, which no adapter goes by: make folders of both first "
                "(StableDiffusionPipeline.from_single_file(...).save_pretrained(...))."
            )
        return {"": Checkpoint(path, tensors, {})}
    if (path / "model_index.json").is_file():
        parts = {
            part: _component(path / part)
            for part in _json(path / "model_index.json")
            if (path / part / "config.json").is_file() and any((path / part).glob("*.safetensors"))
        }
        if not parts:
            raise ConfigError(f"{path} holds no component with safetensors files.")
        return parts
    if (path / "config.json").is_file():
        return {"": _component(path)}
    raise ConfigError(f"{path} is no model: it has neither a config.json nor a model_index.json.")


def read_finetuned(name: str, base: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The components of a fine-tuned model: as :func:`read_checkpoint`, or a base with a file of whole differences added to it
    (``smidgen export --to full-diff``).

    Raises:
        ConfigError, AdapterFileError: as :func:`read_checkpoint`; differences of layers that the base has not.
    """
    path = Path(name).expanduser()
    differences = LazyTensors([path]) if path.is_file() and path.suffix == ".safetensors" else {}
    if not differences or not all(key.endswith(_DIFFERENCE) for key in differences):
        return read_checkpoint(name)
    known = _by_file_name(base)
    found: dict[str, dict[str, str]] = {}
    for key in differences:
        layer = key.removesuffix(_DIFFERENCE)
        place = known.get(layer) or known.get(re.sub("^(lycoris_)[^_]+_", r"\1", layer))
        if place is None:
            raise AdapterFileError(
                f"{path} changes {layer!r}, which the base does not have.{did_you_mean(layer, known)}"
            )
        found.setdefault(place[0], {})[place[1]] = key
    return {part: Checkpoint(path, Changed(base[part].tensors, differences, own), {}) for part, own in found.items()}


def _by_file_name(base: Mapping[str, Checkpoint]) -> dict[str, tuple[str, str]]:
    """kohya's name of a layer -> (component, its weight). A bare encoder's file lacks the first word of a model with a head's, or
    the other way round."""
    source, found = Source(components=tuple(base)), dict[str, tuple[str, str]]()
    weights = [(part, key) for part, one in base.items() for key in one.tensors if key.endswith(".weight")]
    for start in ("", "."):
        for part, key in weights:
            layer = key.removesuffix(".weight")
            layer = layer.partition(start)[2] if start else layer
            found.setdefault(file_name(Place(part, layer, ()), source), (part, key))
    return found


def named_alike(tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint by the names of a model: a bare encoder lacks the prefix that a model with a head has, or the
    other way round."""
    starts = {"", *(f"{name.partition('.')[0]}." for name in names)}
    ends = {"", *(f"{key.partition('.')[0]}." for key in tensors)}

    def found(cut: str, put: str) -> dict[str, str]:
        keys = {name: put + name.removeprefix(cut) for name in names if name.startswith(cut)}
        return {name: key for name, key in keys.items() if key in tensors}

    best = max((found(cut, put) for cut in starts for put in ends if not (cut and put)), key=len)
    return Renamed(tensors, best | {name: name for name in names if name in tensors})


def _located(name: str) -> Path:
    if name in FOLDERS:
        return Path(families.locate(name))
    if name in debug.NAMES or name in packaged.MODELS:
        return Path(transformers.locate(name))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no safetensors file; pickles are never read.")
    if not path.exists():
        known = ", ".join([*FOLDERS, *packaged.MODELS])
        raise ConfigError(
            f"There is no model at {name}: give a folder, a safetensors file, or one of {known}. A model of the hub is fetched "
            f"by `hf download {name}`, which prints its folder."
        )
    return path


def _component(folder: Path) -> Checkpoint:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(_json(indexes[0]).get("weight_map", {}).values()))
    else:
        every = sorted(file.name for file in folder.glob("*.safetensors"))
        usual = [name for name in ("model.safetensors", "diffusion_pytorch_model.safetensors") if name in every]
        names = usual[:1] or every[:1]
    if not names:
        raise ConfigError(f"{folder} holds no safetensors file; pickles are never read.")
    return Checkpoint(folder, LazyTensors([folder / name for name in names]), _json(folder / "config.json"))


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MOST_CONFIG:
            raise ValueError("it is too large")
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}).") from error
