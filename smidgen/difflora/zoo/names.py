"""LoRA files of others for a zoo: where they lie, and which modules of the base the names in them mean."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from smidgen.adapters.checkpoint.files import CONFIG_NAME, LORA_NAME
from smidgen.adapters.checkpoint.formats import Lora
from smidgen.adapters.checkpoint.formats import read_lora as read
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.bases.protocol import ImageBase
from smidgen.errors import AdapterFileError, DataError, did_you_mean

TEXT = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_PREFIXES = ("unet.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_")


def find(folder: Path) -> dict[str, Path]:
    """Name -> adapter folder or file of everything below ``folder`` that looks like a LoRA; names are relative paths.

    Raises:
        DataError: there is nothing, or only pickles.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of adapters.")
    if pipelines := sorted(folder.rglob("model_index.json")):
        raise DataError(
            f"{pipelines[0].parent} is a whole pipeline, no LoRA: `smidgen extract BASE {pipelines[0].parent} --out ADAPTER` makes an "
            "adapter of what was merged into it, and a lora one can be imported here by `smidgen export --to diffusers`."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        owner = path.parent if (path.parent / CONFIG_NAME).exists() or path.name == LORA_NAME else path
        inside = owner.relative_to(folder)
        name = str(inside.with_suffix("") if owner == path else inside)
        found.setdefault(folder.name if name == "." else name, owner)
    if not found:
        pickles = [path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pth")]
        more = f" {pickles[0]} is a pickle, which can run code and is never read." if pickles else ""
        raise DataError(f"{folder} holds no safetensors files.{more}")
    return found


class Names:
    """The adaptable modules of a base by every name LoRA files call them."""

    def __init__(self, base: ImageBase) -> None:
        model: nn.Module = base.model
        self.modules = {name: module for name, module in model.named_modules() if name and kind_of(module) is not None}
        self._aliases = {name.replace(".", "_"): name for name in self.modules}
        self._aliases |= {old: name for name in self.modules if (old := base.alias(name))}

    def target(self, name: str, where: Path) -> str:
        """The module that ``name`` means; AdapterFileError when the base has none."""
        for known in (name, f"{name}.0", self._aliases.get(name.replace(".", "_"))):
            if known in self.modules:
                return known  # type: ignore[return-value]
        hint = did_you_mean(name, [*self.modules, *self._aliases])
        raise AdapterFileError(f"{where} has numbers for {name!r}, which the base does not have.{hint}")

    def check(self, target: str, lora: Lora, where: Path) -> None:
        """AdapterFileError unless the factors fit the module and are finite."""
        module = self.modules[target]
        _, rows, cols, _ = kind_of(module).geometry(module)  # type: ignore[union-attr]
        b, a = lora.b, lora.a
        if (b.shape[0], a.shape[1]) != (rows, cols) or b.shape[1] != a.shape[0]:
            raise AdapterFileError(
                f"{where}: {target!r} has factors {tuple(b.shape)} and {tuple(a.shape)}, the base's layer is "
                f"{rows} x {cols}: the adapter was made for another base."
            )
        if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
            raise AdapterFileError(f"{where}: {target!r} holds NaN or infinite numbers.")


def read_lora(path: Path, names: Names, ignore_text_encoder: bool = False) -> dict[str, Lora]:
    """Target -> factors of one adapter.

    Raises:
        AdapterFileError: not a plain LoRA, keys nobody knows, factors that do not fit the base, damage.
    """
    loras = read(path)
    text = [name for name in loras if name.startswith(TEXT)]
    if text and not ignore_text_encoder:
        raise AdapterFileError(
            f"{path} also changes the text encoder ({len(text)} layers, e.g. {text[0]!r}), which a zoo does not hold; "
            "--ignore-text-encoder imports the rest."
        )
    found = {names.target(_plain(name), path): lora for name, lora in loras.items() if name not in text}
    for target, lora in found.items():
        names.check(target, lora, path)
    if not found:
        raise AdapterFileError(f"{path} holds no LoRA of the denoiser.")
    return dict(sorted(found.items()))


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
