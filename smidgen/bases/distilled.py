"""Distilled bases: how they are recognised, and the helper that holds their distillation off while an adapter is trained.

A base distilled to few steps (Z-Image-Turbo, FLUX.2 klein, SDXL-Turbo, LCM) was not taught the objective it would be trained in:
what an adapter learns first is to undo the distillation. ai-toolkit's answer is a LoRA that undoes it beforehand, on while another
adapter is trained and off when it is used (ostris' "training adapter" for Z-Image-Turbo).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from smidgen.bases.protocol import ImageBase
from smidgen.errors import ConfigError
from smidgen.training.quiet import quiet

_WORDS = re.compile(r"(?<![a-z])(turbo|lightning|lcm|schnell|hyper|flash|distilled|dmd2?)(?![a-z])", re.IGNORECASE)
_UNDONE = re.compile(r"(?<![a-z])(de|un|non)[-_ ]?(turbo|distill)", re.IGNORECASE)


def distilled(base: ImageBase) -> str | None:
    """What says that ``base`` was distilled to few steps, None where nothing does: its pipeline's ``is_distilled`` (FLUX.2 klein,
    Krea 2), a scheduler that is for distilled ones alone (LCM, TCD), or its name."""
    if getattr(base.pipe, "config", {}).get("is_distilled"):
        return "its model_index.json says is_distilled"
    scheduler = type(getattr(base.pipe, "scheduler", None)).__name__
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return f"its scheduler is a {scheduler}"
    name = Path(base.name).name
    word = _WORDS.search(name)
    if word and not _UNDONE.search(name):
        return f"its name says {word[0]!r}"
    return None


def check_distilled(base: ImageBase, helper: str | None) -> None:
    """ConfigError for a distilled ``base`` with no ``helper``, the file of one or "none" (it is trained as it is)."""
    reason = distilled(base) if helper is None else None
    if reason:
        raise ConfigError(
            f"The base {base.name!r} is distilled to few steps ({reason}): trained as it is, it loses that and blurs. Train on the "
            "base it was made of (Z-Image, FLUX.2-klein-base, SDXL base, ...), whose adapters mostly go on the distilled one; or give "
            "--helper-adapter FILE, a LoRA that undoes the distillation while yours is trained; --helper-adapter none trains it as it is."
        )


class Helper:
    """A frozen LoRA on a base's denoiser, at weight 1 within ``on()`` and off outside: y = W x + s B A x, on what is W's input,
    whatever other adapter lies over it. The base's weights stay what they are, quantised or not."""

    def __init__(self, base: ImageBase, path: str | Path) -> None:
        self.active = False
        for name, (down, up) in _read(base, Path(path)).items():
            module = base.model.get_submodule(name)
            module.register_forward_hook(self._adding(down.to(base.device), up.to(base.device)))

    @contextmanager
    def on(self, active: bool = True) -> Iterator[None]:
        """Within, it is on (or off)."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before

    def _adding(self, down: Tensor, up: Tensor) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            x = inputs[0]
            return output + ((x @ down.to(x.dtype).T) @ up.to(x.dtype).T).to(output.dtype)

        return add


def digest(path: str | Path) -> str:
    """16 letters that follow from a helper's file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"The helper adapter {str(path)!r} cannot be read: {error.strerror}.") from error


def _read(base: ImageBase, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (down [r, in], up [out, r], the scale in it), by diffusers' own reading of the families' spellings."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(f"The helper adapter {str(path)!r} must be a LoRA in a .safetensors file, and there is none.")
    try:
        with quiet():
            found: Any = base.pipe.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"The helper adapter {str(path)!r} is no LoRA that diffusers reads: {error}") from error
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    prefix, modules = f"{base.component}.", dict(base.model.named_modules())
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, down in tensors.items():
        name, mark, _ = key.removeprefix(prefix).rpartition(".lora_A.")
        if not mark:
            continue
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        layer = modules.get(name)
        if (
            up is None
            or not isinstance(layer, nn.Linear)
            or (layer.in_features, layer.out_features) != (down.shape[1], up.shape[0])
        ):
            raise ConfigError(
                f"The helper adapter {str(path)!r} does not fit {base.name!r} at {name!r}: it is another base's."
            )
        alpha = (alphas or {}).get(f"{prefix}{name}.alpha")
        pairs[name] = down.float(), up.float() * (1.0 if alpha is None else float(alpha) / len(down))
    if not pairs or not all(torch.isfinite(part).all() for pair in pairs.values() for part in pair):
        raise ConfigError(
            f"The helper adapter {str(path)!r} holds no LoRA of a {base.component}, or numbers that are not finite."
        )
    return pairs
