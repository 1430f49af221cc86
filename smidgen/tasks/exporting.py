"""A finished adapter folder as files of other programs: its base is loaded, the adapter put on, and written by their rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import smidgen
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, as_folder
from smidgen.adapters.checkpoint.formats import FORMATS
from smidgen.adapters.components import component_folders
from smidgen.adapters.export import Exported, export, size
from smidgen.bases.families import load_base
from smidgen.errors import ConfigError


def export_folder(
    adapter: Path,
    to: str,
    out: Path,
    base: str = "embedded",
    strength: float = 1.0,
    dtype: str = "float32",
    allow_loss: bool = False,
    overwrite: bool = False,
) -> tuple[Exported, str]:
    """Writes the adapter in a folder in the format ``to``; returns what was written, and lines about it.

    Raises:
        SmidgenError: no exact form of it there, another base, or files in the way.
    """
    folder = as_folder(adapter)
    check_out(to, out, overwrite)
    pipe = load_base(base).pipe
    smidgen.load(pipe, folder)
    if strength != 1.0:
        smidgen.set_strength(pipe, strength)
    about: dict[str, Any] = {"from": folder.resolve().name, **({"strength": strength} if strength != 1.0 else {})}
    found = export(pipe, out, to, base=base, about=about, dtype=getattr(torch, dtype), allow_loss=allow_loss)
    own = sum(
        (where / name).stat().st_size
        for where in (folder, *component_folders(folder))
        for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    return found, f"{found}\n{_cost(own, found, folder)}"


def check_out(to: str, out: Path, overwrite: bool) -> None:
    """Nothing that is there is written over unasked.

    Raises:
        ConfigError: naming what is in the way.
    """
    path = FORMATS[to].place(out)
    there = path.exists() and (path.is_file() or any(path.iterdir()))
    if there and not overwrite:
        what = "is there already" if path.is_file() else "holds files already"
        raise ConfigError(f"{path} {what}; give another --out, or --overwrite to write over it.")


def _cost(own: int, found: Exported, folder: Path) -> str:
    """What leaving the small file costs."""
    if found.bytes <= own:
        return f"{size(own)} became {size(found.bytes)}. Keep {folder}: it alone can be trained on, verified and exported again."
    return (
        f"{size(own)} became {size(found.bytes)}, {found.bytes / own:.0f} times as much, which hold nothing more. Keep {folder}: "
        "it is the small one, and it alone can be trained on, verified and exported again."
    )
