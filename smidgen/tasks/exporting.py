"""A finished adapter folder as files of other programs: its base is loaded, the adapter put on, and written by their rules."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import smidgen
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, as_folder
from smidgen.adapters.checkpoint.formats import FORMATS, Source
from smidgen.adapters.components import component_folders
from smidgen.adapters.export import Exported, export, held_exactly, layers, size
from smidgen.bases.origin import IMAGES, Origin, adapted_tokenizer, load_adapted, read_origin
from smidgen.bases.transformers import source
from smidgen.errors import AdapterFileError, ConfigError
from smidgen.tasks.control import hint
from smidgen.tasks.held_out import image_rows, task_rows
from smidgen.training.quiet import quiet
from smidgen.training.truncation import Truncated, truncate

logger = logging.getLogger(__name__)
PLAIN = "none"  # the calibration that weighs nothing


@dataclass(frozen=True)
class Cut:
    """How a change that is no LoRA is cut to one; see ``training.truncation``. ``calibration`` is a folder of pictures, or data as the
    adapter's recipe reads them, "none", or None: what the base draws with the adapter, or the data that it was trained on."""

    rank: int | str | None = None
    max_error: float | None = None
    max_loss: float | None = None
    calibration: str | None = None

    @property
    def asked(self) -> list[str]:
        """The settings that were given, as flags."""
        return [f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None]


def export_folder(
    adapter: Path,
    to: str,
    out: Path,
    base: str | None = None,
    strength: float = 1.0,
    dtype: str = "float32",
    allow_loss: bool = False,
    overwrite: bool = False,
    cut: Cut = Cut(),
) -> tuple[Exported, str]:
    """Writes the adapter in a folder in the format ``to``; returns what was written, and lines about it. Its base is the one that
    the folder names, unless another place of it is given as ``base``. With a merged model of texts or images goes what reads them.
    What is no LoRA goes into a file of LoRAs as ``cut`` says, judged on latents that the base draws with the adapter, or on data of
    its recipe. A trained head or a whole model, which is no adapter, is written as a merged model alone.

    Raises:
        SmidgenError: no form of it there, too much lost, another base, or files in the way.
    """
    folder = as_folder(adapter)
    check_out(to, out, overwrite)
    origin = read_origin(folder)
    if not origin.method and to != "merged":
        raise ConfigError(
            f"{folder} holds a trained head or a whole model, no adapter that could be exported; `smidgen merge` writes it as a model."
        )
    if hint.read_config(folder) is not None:
        raise ConfigError(
            f"{folder} follows control pictures by a hint encoder, which no file of another program holds."
        )
    loaded: Any = load_adapted(origin, base)
    base = origin.named(base)
    if not origin.method:
        return _write_whole(loaded.model.to(getattr(torch, dtype)), origin, base, out)
    pipe = getattr(loaded, "pipe", loaded.model)
    if strength != 1.0:
        smidgen.set_strength(pipe, strength)
    about: dict[str, Any] = {"from": folder.resolve().name, **({"strength": strength} if strength != 1.0 else {})}
    low = _truncated(loaded, origin, base, to, cut, allow_loss)
    about |= low.loss.facts() if low else {}
    options: dict[str, Any] = {"base": base, "about": about, "approximate": low, "allow_loss": allow_loss}
    with quiet():
        found = export(pipe, out, to, dtype=getattr(torch, dtype), **options)
    if to == "merged" and origin.task != IMAGES:
        with new_files(found.folder) as scratch:
            _write_reader(origin, base, scratch)
    own = sum(
        (where / name).stat().st_size
        for where in (folder, *component_folders(folder))
        for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    return found, "\n".join(map(str, filter(None, [found, low and low.loss, _cost(own, found, folder)])))


def _truncated(loaded: Any, origin: Origin, base: str, to: str, cut: Cut, allow_loss: bool) -> Truncated | None:
    """Low-rank factors of what has no exact form in the format ``to``; None where all has.

    Raises:
        ConfigError: nothing is to be cut, and something was said about how; no rows are known to judge it by.
    """
    model = getattr(loaded, "pipe", loaded.model)
    if FORMATS[to].holds != "lora" or all(held_exactly(FORMATS[to], *own) for own in layers(model).items()):
        if cut.asked:
            raise ConfigError(
                f"This adapter goes into a {to} file as it is, without loss: leave out {' and '.join(cut.asked)}."
            )
        return None
    given = None if cut.calibration == PLAIN else cut.calibration
    if origin.task == IMAGES:
        if component_folders(origin.folder):
            loaded.train_text_encoders()  # prompts are read by the encoders as they are at each pass
        judged, weighing = image_rows(loaded, origin.folder, given, cut.calibration != PLAIN)
    else:
        judged, weighing = task_rows(origin.task, model, origin.folder, base, given, cut.calibration != PLAIN)
    options: dict[str, Any] = {"rank": cut.rank, "max_error": cut.max_error, "max_loss": cut.max_loss}
    if weighing is not None:
        options |= {"calibration": weighing.run, "weighted_by": weighing.words}
    options |= {"search": judged.few, "groups": judged.groups, "judged_on": judged.words}
    return truncate(model, judged.run, allow_loss=allow_loss, **options)


def _write_whole(model: Any, origin: Origin, base: str, out: Path) -> tuple[Exported, str]:
    """A model that was loaded with its trained head or all its trained numbers, as it is.

    Raises:
        AdapterFileError: what was written is read back as something else.
    """
    with quiet(), new_files(out) as scratch:
        FORMATS["merged"].write({}, Source(model=model), scratch)
        there = type(model).from_pretrained(scratch).state_dict()
        for name, value in model.state_dict().items():
            if name not in there or not torch.equal(there[name].float(), value.float().cpu()):
                raise AdapterFileError(f"{out.name}: {name!r} of the model that was written is not the trained one.")
        _write_reader(origin, base, scratch)
        files = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
    found = Exported("merged", out, files, 0)
    return found, f"{out}: {', '.join(files)}, {size(found.bytes)}: a plain model, read back to the bit."


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
    times = found.bytes / own
    more = (
        "about as much" if times < 1.05 else f"{times - 1:.0%} more" if times < 1.95 else f"{times:.0f} times as much"
    )
    return (
        f"{size(own)} became {size(found.bytes)}, {more}, which hold nothing more. Keep {folder}: "
        "it is the small one, and it alone can be trained on, verified and exported again."
    )
