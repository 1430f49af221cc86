"""A finished adapter folder as files of other programs: its base is loaded, the adapter put on, and written by their rules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

import smidgen
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, as_folder
from smidgen.adapters.checkpoint.formats import FORMATS
from smidgen.adapters.components import component_folders
from smidgen.adapters.export import Exported, export, size
from smidgen.bases.origin import IMAGES, Origin, adapted_tokenizer, load_adapted, read_origin
from smidgen.bases.transformers import source
from smidgen.errors import ConfigError
from smidgen.tasks.control import hint
from smidgen.training.quiet import quiet

logger = logging.getLogger(__name__)


def export_folder(
    adapter: Path,
    to: str,
    out: Path,
    base: str | None = None,
    strength: float = 1.0,
    dtype: str = "float32",
    allow_loss: bool = False,
    overwrite: bool = False,
) -> tuple[Exported, str]:
    """Writes the adapter in a folder in the format ``to``; returns what was written, and lines about it. Its base is the one that
    the folder names, unless another place of it is given as ``base``. With a merged model of texts or images goes what reads them.

    Raises:
        SmidgenError: no exact form of it there, another base, or files in the way.
    """
    folder = as_folder(adapter)
    check_out(to, out, overwrite)
    origin = read_origin(folder)
    if not origin.method:
        raise ConfigError(f"{folder} holds a trained head or a whole model, no adapter that could be exported.")
    if hint.read_config(folder) is not None:
        raise ConfigError(
            f"{folder} follows control pictures by a hint encoder, which no file of another program holds."
        )
    loaded = load_adapted(origin, base)
    base = origin.named(base)
    pipe = getattr(loaded, "pipe", loaded.model)
    if strength != 1.0:
        smidgen.set_strength(pipe, strength)
    about: dict[str, Any] = {"from": folder.resolve().name, **({"strength": strength} if strength != 1.0 else {})}
    with quiet():
        found = export(pipe, out, to, base=base, about=about, dtype=getattr(torch, dtype), allow_loss=allow_loss)
    if to == "merged" and origin.task != IMAGES:
        with new_files(found.folder) as scratch:
            _write_reader(origin, base, scratch)
    own = sum(
        (where / name).stat().st_size
        for where in (folder, *component_folders(folder))
        for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    return found, f"{found}\n{_cost(own, found, folder)}"


def _write_reader(origin: Origin, base: str, folder: Path) -> None:
    """What makes texts or images into the model's input."""
    import transformers

    if origin.task != "image-classification":
        adapted_tokenizer(origin, base).save_pretrained(folder)
        return
    try:
        transformers.AutoImageProcessor.from_pretrained(**source(base)).save_pretrained(folder)
    except (OSError, ValueError):
        logger.warning("%s has no image processor that could go along.", base)


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
