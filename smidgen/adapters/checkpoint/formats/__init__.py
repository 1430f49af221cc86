"""Files of other programs: one file a format, read and written by that program's rules. A new format is a row here."""

from __future__ import annotations

from pathlib import Path

from smidgen.adapters.checkpoint.files import CONFIG_NAME, LORA_NAME
from smidgen.adapters.checkpoint.formats.diffusers import Diffusers
from smidgen.adapters.checkpoint.formats.format import Format, Lora, Place, Rotation, Scales, Source
from smidgen.adapters.checkpoint.formats.full_diff import FullDiff
from smidgen.adapters.checkpoint.formats.gguf import Gguf
from smidgen.adapters.checkpoint.formats.kohya import Kohya
from smidgen.adapters.checkpoint.formats.merged import Merged
from smidgen.adapters.checkpoint.formats.mlx import ADAPTERS_NAME, Mlx
from smidgen.adapters.checkpoint.formats.peft import Peft
from smidgen.adapters.checkpoint.formats.peft_ia3 import PeftIa3
from smidgen.adapters.checkpoint.formats.peft_oft import PeftOft

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (Peft(), Diffusers(), Kohya(), Gguf(), Mlx(), PeftOft(), PeftIa3(), FullDiff(), Merged())
}

__all__ = [
    "ADAPTERS_NAME",
    "FORMATS",
    "Format",
    "Lora",
    "PeftOft",
    "Place",
    "Rotation",
    "Scales",
    "Source",
    "read_lora",
]


def read_lora(path: Path) -> dict[str, Lora]:
    """The plain LoRA of a peft folder or one of mlx-lm, of a file with diffusers' or kohya's keys, of a GGUF file, or of a folder with
    such a file, by the layers' names in it (``unet.``, ``lora_unet_``, ``blk.`` and the like stay).

    Raises:
        AdapterFileError: something else, or damage.
    """
    if path.suffix == ".gguf" and path.is_file():
        return Gguf.read(path)
    if (path / ADAPTERS_NAME).exists():
        return Mlx.read(path)
    if (path / CONFIG_NAME).exists():
        return Peft.read(path)
    return Diffusers.read(path / LORA_NAME if path.is_dir() else path)
