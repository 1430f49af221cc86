"""The difference of each weight, as it is: ``<layer>.diff``, for ComfyUI and LyCORIS. Exact for every method, and as large as the layers.

Layers are named as in kohya's files. diffusers reads no such file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import write_file
from smidgen.adapters.checkpoint.files import read_safetensors
from smidgen.adapters.checkpoint.formats.format import EXACT, Content, Format, Place, Source, check_layers, sides
from smidgen.adapters.checkpoint.formats.kohya import file_name, known_component
from smidgen.errors import AdapterFileError

ENDINGS = {"diff": "change"}


class FullDiff(Format):
    name = "full-diff"
    summary = "one file with the whole difference of each weight, for ComfyUI and LyCORIS: any method, exactly"
    holds = "change"
    file = "{name}.safetensors"

    def refusal(self, place: Place, source: Source) -> str | None:
        if place.kind == "experts":
            return "no reader of such files knows fused experts; --to merged holds them"
        return known_component(place)

    def write(self, content: Content, source: Source, path: Path) -> None:
        tensors = {f"{file_name(place, source)}.diff": change.contiguous() for place, change in content.items()}
        write_file(path, save(tensors, source.header))

    def check(self, content: Content, source: Source, path: Path) -> int:
        """A reader makes the names from the model's and adds what it finds to the weights, which must have its shape."""
        found = sides(read_safetensors(path), ENDINGS, path)
        wanted = {file_name(place, source): place for place in content}
        count = check_layers(found, wanted, path, "ComfyUI")
        for name, place in wanted.items():
            there, here = found[name]["change"], content[place]
            if there.shape != place.shape:
                raise AdapterFileError(f"{path.name}: {name!r} is {tuple(there.shape)}, the weight is {place.shape}.")
            if not (there - here).norm() <= EXACT * here.norm().clamp(min=1e-30):
                raise AdapterFileError(f"{path.name}: the change at {place} is another than the adapter's.")
        return count

    @staticmethod
    def read(path: Path) -> dict[str, Tensor]:
        """The differences in a file, by its layers' names; AdapterFileError for other keys, NaN and damage."""
        found = {name: own["change"].float() for name, own in sides(read_safetensors(path), ENDINGS, path).items()}
        for name, change in found.items():
            if not bool(torch.isfinite(change).all()):
                raise AdapterFileError(f"{path}: {name!r} holds NaN or infinite numbers.")
        return found
