"""The base model with the adapter in its weights: an ordinary model or pipeline folder that needs neither peft nor Smidgen.

A module that cannot save itself becomes ``model.safetensors`` with its state dict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from smidgen.adapters.atomic import flush, write_file
from smidgen.adapters.checkpoint.files import public_name, read_safetensors
from smidgen.adapters.checkpoint.formats.format import Content, Format, Place, Source
from smidgen.adapters.checkpoint.formats.peft import WRAP, by_component
from smidgen.errors import AdapterFileError

FILE = "model.safetensors"


class Merged(Format):
    name = "merged"
    summary = "the whole model with the adapter in its weights, for everything: any method"
    holds = "weight"
    heads = True

    def write(self, content: Content, source: Source, path: Path) -> None:
        """``source.model`` is the merged model."""
        if hasattr(source.model, "save_pretrained"):
            source.model.save_pretrained(path)
            _hide_paths(path)
        else:
            save_model(source.model, str(path / FILE), source.header)
            flush(path / FILE)

    def check(self, content: Content, source: Source, path: Path) -> int:
        """The folder is loaded by the model's own class, and must hold the merged weights to the bit."""
        for component, places in by_component(content).items():
            there = _reread(source.model, component, path)
            own = _part(
                source.model, component
            ).state_dict()  # in its number format, which the adapter's heads are not in
            heads = {name.removeprefix(WRAP): value for name, value in source.heads.get(component, {}).items()}
            heads = {name: value.to(own[name].dtype) for name, value in heads.items() if name in own}
            for name, wanted in ({_parameter(place): value for place, value in places.items()} | heads).items():
                found = there.get(name)
                if found is None or not torch.equal(found.float(), wanted.float().cpu()):
                    what = "is not there" if found is None else "is not the merged one"
                    raise AdapterFileError(f"{path.name}: {name!r} of the model that was written {what}.")
        return len(content)


def _parameter(place: Place) -> str:
    return place.layer if place.kind == "experts" else f"{place.layer}.weight"


def _part(model: Any, component: str) -> Any:
    return model if isinstance(model, nn.Module) else getattr(model, component)


def _reread(model: Any, component: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a written component by their names in the model."""
    part = _part(model, component)
    if not hasattr(part, "save_pretrained"):
        return read_safetensors(path / FILE)
    where = path if isinstance(model, nn.Module) else path / component
    return dict(type(part).from_pretrained(where).state_dict())


def _hide_paths(folder: Path) -> None:
    """Configs that were written do not tell where the base lay on this machine."""
    for file in [*folder.rglob("config.json"), *folder.glob("model_index.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if named := config.get("_name_or_path"):
            config["_name_or_path"] = public_name(str(named))
            write_file(file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
