"""Pipeline folders laid over each other: a base that shares parts with another ships only what it has besides.

A file of an upper folder replaces the one below; of two safetensors files of one name, the upper one's tensors replace and add. What
ships in int8 is spread to fp16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smidgen.adapters.atomic import replace_file, replace_folder
from smidgen.bases.packaged.fetch import cache_root

if TYPE_CHECKING:
    from torch import Tensor

SCALE = ".int8_scale"  # name of a tensor's scales: its own and this
INDEX = "model_index.json"  # names a base's parts
LEFT = "README.md"  # of a lower folder: each base has a card of its own


def put_together(name: str, folders: Sequence[Path]) -> Path:
    """The folder that ``folders`` make, the first at the bottom; made once in ``$SMIDGEN_CACHE/bases``, else
    ``~/.cache/smidgen/bases``, and again when one of them has changed."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in _files(folder):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    target = cache_root().parent / "bases" / f"{name}-{digest.hexdigest()[:16]}"
    if not (target / INDEX).exists():
        with replace_folder(target) as scratch:
            lay(folders, scratch)
    return target


def lay(folders: Sequence[Path], out: Path) -> None:
    """Write what ``folders`` make, the first at the bottom, into the folder ``out``; only parts that the topmost
    ``INDEX`` names."""
    from safetensors.torch import load_file, save

    index = json.loads((folders[-1] / INDEX).read_text())
    parts = {name for name, value in index.items() if isinstance(value, list)}
    for folder in folders:
        for path in _files(folder):
            place = path.relative_to(folder)
            below = folder != folders[-1]
            if below and (str(place) == LEFT or (len(place.parts) > 1 and place.parts[0] not in parts)):
                continue
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors" and (out / place).exists():
                replace_file(out / place, save(load_file(out / place) | tensors_of(path), {"format": "pt"}))
            else:
                shutil.copyfile(path, out / place)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, those in int8 spread to fp16."""
    from safetensors.torch import load_file

    return spread(load_file(path))


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, those that `in_int8` made in fp16 again."""
    for name in [name for name in tensors if name.endswith(SCALE)]:
        scale, of = tensors.pop(name), name.removesuffix(SCALE)
        tensors[of] = (tensors[of].float() * scale.float()).half()
    return tensors


def in_int8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `spread` makes whole again: matrices and kernels in int8, each row by its largest value / 127; vectors as they are."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            found[name] = tensor
            continue
        scale = tensor.float().abs().amax(tuple(range(1, tensor.ndim)), keepdim=True).clamp_min(1e-4) / 127
        found[name] = (tensor.float() / scale.half().float()).round().clamp(-127, 127).to(torch.int8)
        found[name + SCALE] = scale.half()
    return found


def upper(lower: Path, whole: Path, out: Path) -> None:
    """The inverse: write into ``out`` what ``whole`` has and ``lower`` has not, bit for bit, and ``INDEX``."""
    import torch
    from safetensors.torch import load_file, save

    for path in _files(whole):
        place = path.relative_to(whole)
        other = lower / place
        if place.name != INDEX and other.exists() and other.read_bytes() == path.read_bytes():
            continue
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and other.exists():
            mine, theirs = load_file(path), load_file(other)
            own = {n: t for n, t in mine.items() if n not in theirs or not torch.equal(t, theirs[n])}
            if own:
                replace_file(out / place, save(own, {"format": "pt"}))
        else:
            shutil.copyfile(path, out / place)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
