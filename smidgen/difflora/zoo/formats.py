"""LoRA files of others: peft folders, diffusers' ``pytorch_lora_weights.safetensors`` and kohya's ``lora_unet_*`` files.

Each is read as target -> (B [rows, r], A [r, cols], scale), with targets named as modules of the base. Only safetensors
and JSON are opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smidgen.adapters import diffusers_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, read_config, read_tensors
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.bases.protocol import ImageBase
from smidgen.errors import AdapterFileError, DataError, did_you_mean

DIFFUSERS_NAME = diffusers_file.NAME
TEXT = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_SIDES = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora.down.weight": "a", "lora.up.weight": "b",
    "lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha",
}  # fmt: skip
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


class Factors(NamedTuple):
    """A LoRA at one target: its delta is scale * b @ a."""

    b: Tensor
    a: Tensor
    scale: float


def find(folder: Path) -> dict[str, Path]:
    """Name -> adapter folder or file of everything below ``folder`` that looks like a LoRA; names are relative paths.

    Raises:
        DataError: there is nothing, or only pickles.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of adapters.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        owner = path.parent if (path.parent / CONFIG_NAME).exists() or path.name == DIFFUSERS_NAME else path
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

    def check(self, target: str, factors: Factors, where: Path) -> None:
        """AdapterFileError unless the factors fit the module and are finite."""
        module = self.modules[target]
        _, rows, cols, _ = kind_of(module).geometry(module)  # type: ignore[union-attr]
        b, a, _ = factors
        if (b.shape[0], a.shape[1]) != (rows, cols) or b.shape[1] != a.shape[0]:
            raise AdapterFileError(
                f"{where}: {target!r} has factors {tuple(b.shape)} and {tuple(a.shape)}, the base's layer is "
                f"{rows} x {cols}: the adapter was made for another base."
            )
        if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
            raise AdapterFileError(f"{where}: {target!r} holds NaN or infinite numbers.")


def read_lora(path: Path, names: Names, ignore_text_encoder: bool = False) -> dict[str, Factors]:
    """Target -> factors of one adapter.

    Raises:
        AdapterFileError: not a plain LoRA, keys nobody knows, factors that do not fit the base, damage.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    usual: float | None = None
    if (path / CONFIG_NAME).exists():
        config = read_config(path)
        _check_peft(config, path)
        tensors = {key.removeprefix("base_model.model."): value for key, value in read_tensors(path).items()}
    else:
        config = None
        tensors, usual = _read_file(path / DIFFUSERS_NAME if path.is_dir() else path)
    text = [key for key in tensors if key.startswith(TEXT)]
    if text and not ignore_text_encoder:
        raise AdapterFileError(
            f"{path} also changes the text encoder ({len(text)} tensors, e.g. {text[0]!r}), which a zoo does not hold; "
            "--ignore-text-encoder imports the rest."
        )
    for key in tensors.keys() - set(text):
        name, side = _split(key, path)
        parts.setdefault(names.target(name, path), {})[side] = tensors[key]
    found = {}
    for target in sorted(parts):
        own = parts[target]
        if not {"a", "b"} <= own.keys():
            raise AdapterFileError(f"{path}: {target!r} has only {sorted(own)}; a LoRA has two factors.")
        a, b = own["a"].float().flatten(1), own["b"].float().flatten(1)
        alpha = float(own["alpha"]) if "alpha" in own else usual
        scale = _peft_scale(config, target, len(a)) if config is not None else (alpha or len(a)) / len(a)
        found[target] = Factors(b, a, scale)
        names.check(target, found[target], path)
    if not found:
        raise AdapterFileError(f"{path} holds no LoRA of the denoiser.")
    return found


def _check_peft(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(f"{path} holds an adapter of type {kind!r}; `zoo import` takes plain LoRA.")
    for option in ("use_dora", "lora_bias", "use_qalora"):
        if config.get(option):
            raise AdapterFileError(f"{path} was trained with {option}, so its delta is not a product of two factors.")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise AdapterFileError(f"{path} also trains biases or whole modules, which a zoo does not hold.")


def _peft_scale(config: Mapping[str, Any], target: str, r: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", target)), config.get("lora_alpha", r))
    return float(alpha) / (r**0.5 if config.get("use_rslora") else r)


def _read_file(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """Tensors of a file, and the alpha that diffusers wrote into its header, if it did."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path} is truncated or not a safetensors file ({error}).") from error
    own = {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in described.items()}
    for option in ("use_dora", "use_rslora", "alpha_pattern"):
        if own.get(option):
            raise AdapterFileError(f"{path} was trained with {option}; save it through peft, whose folders say it all.")
    alpha = own.get("lora_alpha")
    return tensors, None if alpha is None else float(alpha)


def _split(key: str, where: Path) -> tuple[str, str]:
    """(module name as the file has it, "a", "b" or "alpha") of a key."""
    old = _PROCESSOR.fullmatch(key)
    if old:
        return f"{_plain(old[1])}.{old[2]}", "a" if old[3] == "down" else "b"
    for ending, side in _SIDES.items():
        if key.endswith(f".{ending}"):
            return _plain(key.removesuffix(f".{ending}")), side
    kinds = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
    named = next((f" It is {kind}." for word, kind in kinds.items() if word in key), "")
    raise AdapterFileError(f"{where} has the key {key!r}, which is no part of a plain LoRA.{named}")


def _plain(name: str) -> str:
    for prefix in ("unet.", "transformer.", "lora_unet_", "lora_transformer_"):
        name = name.removeprefix(prefix)
    return name
