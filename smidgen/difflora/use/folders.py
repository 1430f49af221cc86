"""What goes in and out of the commands: photos as files, adapters as folders with the recipe they were made by.

adapter_config.json, adapter_model.safetensors    the adapter, for smidgen and, a LoRA, for peft alone
pytorch_lora_weights.safetensors                  the same for diffusers and whatever reads its files, where it is a LoRA
recipe.json                                       how it was made, with its latent: what edit and blend start from
README.md, contact_sheet.png
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smidgen.adapters.atomic import new_files, write_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from smidgen.adapters.checkpoint.formats import FORMATS, Lora, Place, Source
from smidgen.bases.protocol import ImageBase
from smidgen.difflora.weightspace.layout import Layout, is_lora, write_adapter
from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data.images import remarks
from smidgen.tasks.data.listing import list_folder
from smidgen.tasks.data.pixels import Decoded, decode
from smidgen.tasks.png import written_by_smidgen

RECIPE, CARD, SHEET = "recipe.json", "README.md", "contact_sheet.png"
FORMAT = 1


@dataclass(frozen=True)
class Photo:
    """A photo as given, upright and RGB, the hash of its file, and what was odd about it."""

    path: Path
    image: Image.Image
    digest: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path} ({self.image.width} x {self.image.height} pixels)"


def read_photos(paths: Sequence[Path]) -> list[Photo]:
    """The photos at ``paths``.

    Raises:
        DataError: there is none, or one is missing, no picture, broken, or larger than ``LARGEST`` pixels, by name.
    """
    if not paths:
        raise DataError("Give at least one photo.")
    return [_read_photo(Path(path)) for path in paths]


def photos_in(paths: Sequence[Path]) -> list[Path]:
    """The photos of one person at ``paths``, each a photo or a folder of them.

    Raises:
        DataError: a folder without a photo, or with folders of photos, who may be several people.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = list_folder(path)
        if deeper := [photo for photo in inside.pictures if photo.parent != path]:
            raise DataError(
                f"{path} holds folders of photos ({deeper[0].parent.name}); name the folder of one person, or give --each for "
                "an adapter of each."
            )
        if not inside.pictures:
            raise DataError(" ".join([f"{path} is a folder that holds no photo.", *inside.warnings()]))
        found += inside.pictures
    return found


def people_in(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Name -> photos, of ``paths`` that are each another person: a photo, a folder of photos, or a folder of such folders.

    Raises:
        DataError: nobody, two of one name, or as :func:`photos_in`.
    """
    found: dict[str, list[Path]] = {}
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        folders = [one for one in inside if one.is_dir() and not one.name.startswith(".")]
        for one in folders or [path]:
            name = one.name if one.is_dir() else one.stem
            if name in found:
                raise DataError(f"Two people are called {name!r} ({found[name][0]} and {one}); rename one.")
            found[name] = photos_in([one])
    if not found:
        raise DataError("Give at least one photo, or a folder of photos.")
    return found


def _read_photo(path: Path) -> Photo:
    if not path.is_file():
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a folder, not a photo" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}.{did_you_mean(path.name, near)}")
    try:
        found = decode(path)
        content = path.read_bytes()
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be read as a photo: {error}.") from error
    if nothing := found.odd & {"transparent", "flat"}:
        raise DataError(
            f"{path} ({found.image.width} x {found.image.height} pixels) shows nobody: it is "
            f"{'transparent throughout' if 'transparent' in nothing else 'of one colour'}."
        )
    return Photo(path, found.image, hashlib.sha256(content).hexdigest(), tuple(_remarks(path, found)))


def _remarks(path: Path, found: Decoded) -> list[str]:
    """What was odd about a photo, for the result's notes."""
    written = [f"{path} was drawn by Smidgen; it is read as any photo."] if written_by_smidgen(path) else []
    return written + [f"{path}: {one}" for one in remarks({path.name: (found.odd, found.image.size)})]


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder whose files are in ``out`` when the block ends well; on an error ``out`` is as it was.

    Raises:
        DataError: ``out`` is a file, or holds anything and ``overwrite`` is not set. Files of other names stay in any case.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(
            f"{out} holds files already; choose another --out, or give --overwrite to replace what is written anew."
        )
    with new_files(out) as scratch:
        yield scratch


def write_folder(layout: Layout, row: Tensor, base: ImageBase, folder: Path, recipe: dict[str, Any]) -> int:
    """Writes ``row`` [numbers] of ``layout`` as an adapter folder with its recipe; returns the adapter's bytes (config and
    weights)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # a second adapter beside the pipeline's is meant
        write_adapter(layout, row, base.model, folder, as_peft=is_lora(layout))
    if is_lora(layout):
        FORMATS["diffusers"].write(loras(layout, row, base.component), Source(), folder / LORA_NAME)
    recipe = {"format": FORMAT, "smidgen": version("smidgen"), "layout": layout.digest} | recipe
    write_file(folder / RECIPE, (json.dumps(recipe, indent=1) + "\n").encode())
    return sum((folder / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe in an adapter folder, None when there is none; DataError when it is damaged or of another format."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        known = recipe["format"], torch.tensor(recipe["latent"], dtype=torch.float32), recipe["generator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}).") from error
    if known[0] != FORMAT:
        raise DataError(f"{path} has format {known[0]}; this version of smidgen reads format {FORMAT}.")
    return dict(recipe)


def loras(layout: Layout, row: Tensor, component: str) -> dict[Place, Lora]:
    """The factors in a LoRA's row [numbers], on that component of the pipeline."""
    return {
        Place(component, a.key, (b.shape[0], a.shape[1])): Lora(
            row[b.columns].reshape(b.shape), row[a.columns].reshape(a.shape), b.scale
        )
        for a, b in layout.factor_pairs()
    }
