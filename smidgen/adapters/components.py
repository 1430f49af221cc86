"""A model's parts that may carry adapters: the model itself, or the components of a diffusers pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from smidgen.adapters.checkpoint.files import CONFIG_NAME
from smidgen.adapters.tuner.shards import unwrapped
from smidgen.errors import SmidgenError

# Names of a pipeline's components, as diffusers has them.
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|image_encoder|vae|controlnet|prior|decoder)(_\w+)?")


class Components(nn.Module):
    """A denoiser and other components of its pipeline as one module, to be trained together; called, it is the denoiser.
    Adapters are saved of it as of the pipeline: each of the ``others`` in a sub-folder of its name.

    Example:
        >>> both = Components(nn.Linear(2, 2), {"text_encoder": nn.Linear(3, 3)})
        >>> list(parts(both))
        ['', 'text_encoder']
    """

    def __init__(self, denoiser: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.denoiser, self.others = denoiser, nn.ModuleDict(others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)


def parts(model: Any) -> dict[str, nn.Module]:
    """The modules that may carry adapters, by the sub-folder of their files: ``""`` is the model itself, or the UNet or
    transformer of a diffusers pipeline, whose other components follow under their own names."""
    if isinstance(model, nn.Module):
        inner = unwrapped(model)
        return {"": inner.denoiser, **inner.others} if isinstance(inner, Components) else {"": inner}
    modules = {n: m for n, m in getattr(model, "components", {}).items() if isinstance(m, nn.Module)}
    for name in ("unet", "transformer"):
        if name in modules:
            return {"": modules.pop(name)} | modules
    raise SmidgenError(
        f"Expected a torch module or a diffusers pipeline with a unet or transformer, got a {type(model).__name__}."
    )


def denoiser(model: Any) -> nn.Module:
    """The module that adapters go on: the model itself, or the UNet or transformer of a diffusers pipeline."""
    return parts(model)[""]


def component_folders(folder: Path) -> list[Path]:
    """Sub-folders with adapters of a pipeline's components; folders of other names are not ours to read."""
    files = folder.glob(f"*/{CONFIG_NAME}") if folder.is_dir() else ()
    return sorted(file.parent for file in files if _COMPONENT.fullmatch(file.parent.name))


def part_folders(path: Path) -> dict[str, Path]:
    """An adapter of a model, or of all the parts of a pipeline that a folder holds something for, by sub-folder: as :func:`parts`."""
    others = component_folders(path)
    own = {"": path} if not others or (path / CONFIG_NAME).is_file() else {}
    return own | {folder.name: folder for folder in others}
