"""Where an edit or a blend starts: the latent of photos, or of an adapter folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

import smidgen
from smidgen.adapters.checkpoint.files import is_recipe
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.injection import remove
from smidgen.difflora.generator.generator import SHIPPED_FOR, Generator
from smidgen.difflora.use.folders import read_photos, read_recipe
from smidgen.difflora.use.recipes import open_recipe
from smidgen.difflora.use.sampler import Sampler
from smidgen.difflora.weightspace.layout import Layout, plain_config
from smidgen.errors import DataError

if TYPE_CHECKING:
    from smidgen.adapters.tuner.config import SmidgenConfig


@dataclass(frozen=True)
class Source:
    """A latent [size], the photos behind it if they are at hand, what a recipe says of it, and remarks."""

    latent: Tensor
    info: dict[str, Any]
    images: list[Image.Image]
    notes: tuple[str, ...] = ()


def latent_of(sampler: Sampler, sources: Sequence[Path], seed: int = 0) -> Source:
    """The latent of ``sources``: one adapter folder, or photos of one person.

    An adapter that this generator made has its latent in its recipe. Any other of the same family is encoded, which loses
    what the generator's codec cannot say.

    Raises:
        DataError: several adapters, photos and adapters mixed, an adapter of another generator or family.
    """
    adapters = [path for path in sources if path.is_dir() or is_recipe(path)]
    if not adapters:
        photos = read_photos(sources)
        looked = sampler.look(photos)
        condition = sampler.generator.condition(looked.images, [str(photo) for photo in photos])
        info = {"photos": [photo.digest for photo in photos], "read": looked.facts, "seed": seed}
        return Source(sampler.generator.latents(condition, [seed])[0], info, looked.images, looked.notes)
    if len(sources) > 1:
        raise DataError(f"Give one adapter folder, or photos of one person; got {', '.join(map(str, sources))}.")
    if is_recipe(adapters[0]):
        generator, latent = open_recipe(adapters[0])
        if generator.digest != sampler.generator.digest:
            raise _another(adapters[0], generator.digest, sampler.generator)
        return Source(latent, {"recipe": adapters[0].name}, [])
    recipe = read_recipe(adapters[0])
    return _encoded(sampler, adapters[0]) if recipe is None else _remembered(sampler.generator, adapters[0], recipe)


def base_of(made: Path) -> str | None:
    """The base of the generator that made an adapter folder or a recipe, of those whose generator ships; None: it is not told."""
    recipe = None if is_recipe(made) else read_recipe(made)
    base = open_recipe(made)[0].base if is_recipe(made) else recipe and recipe.get("base")
    return base if base in SHIPPED_FOR else None


def _remembered(generator: Generator, folder: Path, recipe: dict[str, Any]) -> Source:
    if recipe["generator"] != generator.digest:
        raise _another(folder, recipe["generator"], generator)
    latent = torch.tensor(recipe["latent"], dtype=torch.float32)
    if latent.shape != (generator.network.latents,):
        raise DataError(
            f"The recipe in {folder} is damaged: {latent.numel()} latents, not {generator.network.latents}."
        )
    notes = (f"{folder} was refined; this starts from its prediction.",) if recipe.get("refine") else ()
    info = {name: value for name, value in recipe.items() if name not in ("latent", "format", "layout", "smidgen")}
    return Source(latent, info, [], notes)


def _another(path: Path, digest: str, generator: Generator) -> DataError:
    return DataError(
        f"{path} was made by another generator ({digest[:12]}; here {generator.digest[:12]}), whose latents mean nothing to this "
        "one: name that one with --generator."
    )


def _encoded(sampler: Sampler, folder: Path) -> Source:
    """An adapter that no generator made, as the codec sees it."""
    codec, unet, name = sampler.generator.codec, sampler.pipeline.model, "given"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # a second adapter beside the pipeline's is meant
        smidgen.load(unet, folder, name)
    try:
        config: SmidgenConfig = unet.peft_config[name]  # type: ignore[index,assignment]
        if {**plain_config(config), "seed": 0} != {**codec.layout.config, "seed": 0}:
            raise DataError(
                f"{folder} is {config.label()}; the generator makes {smidgen.SmidgenConfig(**codec.layout.config).label()} on its own "
                "targets, and edits those alone."
            )
        tensors = {key: dict(layer.slot(name).trained()) for key, layer in adapted_layers(unet, name).items()}
        row = codec.layout.pack(tensors).detach().cpu()[None]
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            remove(unet, name)
    with torch.no_grad():
        latent = codec.encode(row).flatten()
        lost = difference(codec.layout, row[0], sampler.generator.rows(latent[None])[0])
    note = f"{folder} has no recipe: its latent was encoded, which loses {lost:.0%} of what it does to the weights."
    return Source(latent, {"adapter": folder.name}, [], (note,))


def difference(layout: Layout, one: Tensor, other: Tensor) -> float:
    """|D - D'| / |D| of two rows [numbers]: over the products of low-rank factors, and over all other numbers as they are."""
    products = [
        [row[b.columns].reshape(b.shape) @ row[a.columns].reshape(a.shape) for a, b in layout.factor_pairs()]
        for row in (one, other)
    ]
    inside = {entry.offset for pair in layout.factor_pairs() for entry in pair}
    rest = [[row[entry.columns] for entry in layout.entries if entry.offset not in inside] for row in (one, other)]
    first, second = (
        torch.cat([part.flatten() for part in own + alone]) for own, alone in zip(products, rest, strict=True)
    )
    return float((first - second).norm() / first.norm().clamp(min=1e-12))
