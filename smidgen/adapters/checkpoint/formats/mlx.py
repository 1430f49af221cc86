"""A folder for mlx-lm: ``adapters.safetensors`` with ``<layer>.lora_a`` [cols, r] and ``lora_b`` [r, rows], and ``adapter_config.json``.

mlx-lm puts a LoRA of one rank and one scale on the layers that ``keys`` names, in each of the last ``num_layers`` blocks, and then looks
for their numbers. So the rank is the largest, smaller ones are filled up with zeros, and the scale is in b. What the file has no numbers
for keeps a b of zero, which is the base.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from smidgen.adapters.atomic import write_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, read_config, read_safetensors
from smidgen.adapters.checkpoint.formats.format import (
    Content,
    Format,
    Lora,
    Place,
    Source,
    both,
    check_change,
    check_layers,
    sides,
)  # fmt: skip
from smidgen.adapters.checkpoint.formats.gguf import no_language_model
from smidgen.errors import AdapterFileError

ADAPTERS_NAME = "adapters.safetensors"
ENDINGS = {"lora_a": "a", "lora_b": "b"}
_IN_A_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Mlx(Format):
    name = "mlx"
    summary = "a folder of mlx-lm's LoRA of a language model"
    holds = "lora"
    task = "CAUSAL_LM"

    def refusal(self, place: Place, source: Source) -> str | None:
        if why := no_language_model(place, source, "mlx-lm"):
            return why
        if not _IN_A_BLOCK.fullmatch(place.layer):
            return "mlx-lm looks for LoRAs in the blocks alone (model.layers.N); --to merged holds it"
        return None

    def write(self, content: Content, source: Source, path: Path) -> None:
        blocks = source.model.config.num_hidden_layers
        rank = max(lora.r for lora in content.values())
        matches = [_IN_A_BLOCK.fullmatch(place.layer) for place in content]
        at, keys = zip(*((int(m[1]), m[2]) for m in matches if m), strict=True)
        config = {
            "fine_tune_type": "lora",
            "model": source.base,
            "num_layers": blocks - min(at),
            "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(set(keys))},
        }
        tensors: dict[str, Tensor] = {}
        for place, lora in content.items():
            own = padded(lora, rank)
            tensors |= {f"{place.layer}.lora_a": own.a.T.contiguous(), f"{place.layer}.lora_b": own.b.T.contiguous()}
        write_file(path / ADAPTERS_NAME, save(tensors, source.header))
        write_file(path / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())

    def check(self, content: Content, source: Source, path: Path) -> int:
        """mlx-lm makes the layers by its config, and refuses numbers for others and of another shape."""
        config, found = read_config(path), _factors(path)
        rank, scale, keys, first = _parameters(config, path, source.model.config.num_hidden_layers)
        wanted = {place.layer: place for place in content}
        count = check_layers(found, wanted, path, "mlx-lm")
        for name, place in wanted.items():
            made = _IN_A_BLOCK.fullmatch(name)
            if made is None or int(made[1]) < first or made[2] not in keys:
                raise AdapterFileError(
                    f"{path.name}: mlx-lm makes no LoRA at {name!r} by num_layers and keys of the config."
                )
            a, b = _pair(name, found[name], path)
            if len(a) != rank:
                raise AdapterFileError(f"{path.name}: {name!r} has rank {len(a)}, the config says {rank}.")
            check_change(place, Lora(b, a, scale), padded(content[place], rank), path)
        return count

    @staticmethod
    def read(folder: Path) -> dict[str, Lora]:
        """The LoRA in a folder by its layers' names.

        Raises:
            AdapterFileError: another kind of adapter, damage.
        """
        _, scale, _, _ = _parameters(read_config(folder), folder, 0)
        pairs = {name: _pair(name, own, folder) for name, own in _factors(folder).items()}
        return {name: Lora(b, a, scale) for name, (a, b) in pairs.items()}


def padded(lora: Lora, rank: int) -> Lora:
    """The same change with factors of a larger rank, and the scale in b."""
    more = rank - lora.r
    return Lora(pad(lora.b * lora.scale, (0, more)), pad(lora.a, (0, 0, 0, more)))


def _factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return sides(read_safetensors(folder / ADAPTERS_NAME), ENDINGS, folder)


def _pair(name: str, own: dict[str, Tensor], folder: Path) -> tuple[Tensor, Tensor]:
    """(a [r, cols], b [rows, r]) of mlx-lm's factors, which stand the other way."""
    a, b = both(name, own, folder)
    return a.T, b.T


def _parameters(config: dict[str, Any], folder: Path, blocks: int) -> tuple[int, float, set[str], int]:
    """(rank, scale, names in a block, first block) of a config.

    Raises:
        AdapterFileError: it is of no LoRA, or says not enough.
    """
    kind, own = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        raise AdapterFileError(f"{folder.name} holds mlx-lm's {kind!r}, and only a plain LoRA is read here.")
    try:
        rank, scale, layers = int(own["rank"]), float(own["scale"]), int(config["num_layers"])  # type: ignore[index]
        float(own["dropout"])  # type: ignore[index]
        return rank, scale, set(own.get("keys") or ()), blocks - layers if layers > 0 else 0  # type: ignore[union-attr]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(
            f"{folder.name}: mlx-lm's config wants num_layers and lora_parameters with rank, scale and dropout."
        ) from error
