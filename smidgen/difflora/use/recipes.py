"""A person in 256 bytes: the latent in 16 bits and the fingerprint of the generator that makes the adapter of it.

    write_recipe(Path("ann.recipe"), generator, latent)
    smidgen.load(unet, "ann.recipe")        # also Bank.put, smidgen load, edit and blend

The file is a safetensors file. The generator is looked for in the package and in the folders that ``SMIDGEN_GENERATORS`` names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import smidgen
from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.files import check_file
from smidgen.difflora.generator.generator import JSON, SHIPPED_FOR, Generator, load_generator
from smidgen.difflora.weightspace.layout import is_lora
from smidgen.errors import AdapterFileError, DataError

if TYPE_CHECKING:
    from smidgen.adapters.tuner.config import SmidgenConfig

FINGERPRINT, SUM = (
    16,
    7,
)  # hexadecimal digits of the generator's digest, and of the latent's: with 64 latents 256 bytes in all
FOLDERS = "SMIDGEN_GENERATORS"
_MOST = 1 << 20  # bytes of a recipe


def write_recipe(path: Path, generator: Generator, latent: Tensor) -> int:
    """Writes the recipe of ``latent`` [size]; returns its bytes, 256 for 64 latents.

    Raises:
        DataError: the generator's adapters are no LoRA: they need the base's own factors, so that a recipe alone makes none.
    """
    if not is_lora(generator.layout):
        kind = generator.layout.config.get("method") or generator.layout.config.get("residual")
        raise DataError(f"Recipes are for generators of LoRA, and this one makes {kind}: leave out --recipe.")
    z = latent.detach().half().contiguous()
    content = save({"z": z}, {"generator": f"{generator.digest[:FINGERPRINT]}.{_sum(z)}"})
    replace_file(path, content)
    return len(content)


def open_recipe(path: str | os.PathLike[str]) -> tuple[Generator, Tensor]:
    """The generator of a recipe, and its latent [size].

    Raises:
        AdapterFileError: it is missing or damaged.
        DataError: its generator is not at hand.
    """
    path = Path(path)
    if check_file(path) > _MOST:
        raise AdapterFileError(f"{path} is no recipe: it has {path.stat().st_size:,} bytes.")
    try:
        with safe_open(path, "pt") as file:
            told, latent = (file.metadata() or {})["generator"], file.get_tensor("z")
            fingerprint, _, total = told.partition(".")
            if total != _sum(latent):
                raise ValueError("its numbers are not those that were written")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise AdapterFileError(f"{path} is no recipe, or damaged ({error}); copy it again from its source.") from error
    generator = _at_hand(path, fingerprint)
    if latent.shape != (generator.network.latents,):
        raise AdapterFileError(
            f"{path} has a latent of {tuple(latent.shape)}; its generator takes {generator.network.latents}."
        )
    return generator, latent.float()


def adapter_of(path: str | os.PathLike[str]) -> tuple[SmidgenConfig, dict[str, Tensor]]:
    """(config, tensors) of the adapter that a recipe stands for, as a folder of it holds them.

    Raises:
        AdapterFileError, DataError: as :func:`open_recipe`.
    """
    generator, latent = open_recipe(path)
    layout = generator.layout
    own = smidgen.SmidgenConfig(**layout.config)
    own.base_lock = layout.base["lock"]
    return own, packing.pack(layout.unpack(generator.rows(latent[None])[0]))


def _sum(latent: Tensor) -> str:
    return hashlib.sha256(latent.half().numpy().tobytes()).hexdigest()[:SUM]


def _at_hand(path: Path, fingerprint: str) -> Generator:
    known = []
    for folder in _folders():
        found = _loaded(folder, (folder / "generator.json").stat().st_mtime_ns)
        if found.digest.startswith(fingerprint):
            return found
        known.append(f"{folder} ({found.digest[:FINGERPRINT]})")
    raise DataError(
        f"{path} needs the generator {fingerprint}, and at hand are {', '.join(known)}. Name the folder of that one in {FOLDERS}."
    )


def _folders() -> Iterator[Path]:
    yield from (folder for folder in SHIPPED_FOR.values() if (folder / JSON).is_file())
    for name in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        if not (Path(name) / "generator.json").is_file():
            raise DataError(f"{FOLDERS} names {name}, which holds no generator.json.")
        yield Path(name)


@lru_cache(8)
def _loaded(folder: Path, changed: Any) -> Generator:
    return load_generator(folder)
