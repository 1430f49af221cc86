"""A generator with its base, loaded: from latents to adapters, their contact sheet and their folders."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smidgen.adapters.checkpoint.files import RECIPE_ENDING, public_name
from smidgen.bases.protocol import ImageBase
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.card import adapter_card
from smidgen.difflora.generator.generator import SHIPPED_FOR, Generator, load_generator, shipped
from smidgen.difflora.generator.reading import Framing, Seen, load_reader
from smidgen.difflora.use import folders
from smidgen.difflora.use.folders import Photo, write_folder
from smidgen.difflora.use.recipes import write_recipe
from smidgen.difflora.weightspace.layout import Layout, is_lora
from smidgen.errors import BaseLockError, ConfigError, DataError
from smidgen.tasks.contact_sheet import Row, contact_sheet
from smidgen.tasks.data.pixels import fit
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.png import about_adapter, write_png
from smidgen.training.randomness import derive
from smidgen.training.ranges import check

MOST = 64  # rows of a contact sheet


@dataclass(frozen=True)
class Sheet:
    """The contact sheet: what is drawn with each adapter, from the same noise in a column."""

    sheet: bool = True  # draw one
    prompt: tuple[str, ...] = ()  # what to draw; none: scenes that suit the base
    num_prompts: int = 6  # of those scenes
    inference_steps: int | None = None  # denoising steps of a picture; None: as the base's kind needs
    guidance_scale: float | None = None  # away from the empty prompt; None: as the base's kind needs
    sheet_seed: int = 0  # of scenes and noise

    def __post_init__(self) -> None:
        check(self)
        if self.num_prompts < 1 or (self.inference_steps is not None and self.inference_steps < 1):
            raise ConfigError(
                f"num_prompts={self.num_prompts}, inference_steps={self.inference_steps}: both start at 1; --no-sheet "
                "draws nothing."
            )

    def scenes(self, base: ImageBase) -> Scenes:
        """What to draw with ``base``."""
        texts = self.prompt or tuple(base.scenes(self.num_prompts, self.sheet_seed))
        seeds = tuple(derive(self.sheet_seed, "sheet", number) for number in range(len(texts)))
        return Scenes(texts, seeds, **base.sampling.chosen(self.inference_steps, self.guidance_scale))


@dataclass(frozen=True)
class Output:
    """Where results go, and what makes them."""

    out: Path  # the folder for the adapter
    generator: Path | None = None  # the generator's folder; None: the one that comes with the package for the base
    base: str | None = None  # embedded, embedded-wide, a pipeline folder, or a hub name; None: as the generator says
    overwrite: bool = False  # write although --out holds files; those of other names stay
    unchecked: bool = False  # go on with photos that the generator cannot read, or that show different people
    sheet: Sheet = field(default_factory=Sheet)


@dataclass(frozen=True)
class Adapter:
    """One adapter: its row [numbers] of ``layout``, how it was made, and what it is called on the sheet. ``name`` is its folder
    below ``--out``, "" for that one itself; None: it is only drawn."""

    row: Tensor
    layout: Layout
    label: str
    name: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Looked:
    """One person's photos as they are read, what a recipe says of each, what a user should know of them, and whether they hide so much
    that each seed is to be another of the people whom they may show."""

    images: list[Image.Image]
    facts: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    hiding: bool = False


@dataclass(frozen=True)
class Result:
    """What was written: folders with the bytes of their adapters, the sheet, seconds of each part, remarks, and of several
    people who was left out and why."""

    folders: dict[Path, int]
    sheet: Path | None
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{folder}: {size:,} bytes" for folder, size in self.folders.items()]
        lines += [f"contact sheet: {self.sheet}"] if self.sheet else []
        lines += [*self.notes, *(f"{name} is left out: {reason}" for name, reason in self.refused.items())]
        lines += [", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())]
        return "\n".join(lines)


class Sampler:
    """A generator and the base its adapters are for, loaded; it keeps the time."""

    def __init__(self, output: Output, generator: Generator | None = None) -> None:
        self.output = output
        self.seconds: dict[str, float] = {}
        with self.timed("loading"):
            self.folder = output.generator or shipped(output.base)
            self.generator = generator or load_generator(self.folder)
            self.pipeline = self._pipeline()
            self.base = public_name(self.pipeline.base.name)
            self.encoders = self.generator.face, self.generator.image  # loaded now
            self.reader = None if generator else load_reader(self.folder, self.generator)

    def _pipeline(self) -> AdaptedPipeline:
        base = self.output.base or self.generator.base
        try:
            return AdaptedPipeline.load(base, self.generator.layout)
        except BaseLockError as error:
            if self.output.generator is not None or base in SHIPPED_FOR:
                raise
            known = " and ".join(SHIPPED_FOR)
            raise BaseLockError(
                f"No generator ships for {base!r}, only for {known}: name one with --generator. {error}"
            ) from error

    def at(self, output: Output) -> Sampler:
        """The same generator and base, which are not loaded again, for another output."""
        other = copy.copy(self)
        other.output, other.seconds = output, {}
        return other

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def look(self, photos: Sequence[Photo]) -> Looked:
        """One person's photos, square and of the base's size, as the generator's reader finds them to be read best.

        Raises:
            DataError: one that the generator cannot read, or two that show different people, unless ``output.unchecked``.
        """
        images = [fit(photo.image, self.pipeline.base.resolution) for photo in photos]
        said = [note for photo in photos for note in photo.notes]
        if self.reader is None:
            return Looked(images, notes=tuple(said))
        hiding = False
        with self.timed("reading"):
            seen = [self.reader.look(self.generator, image) for image in images]
        for photo, one in zip(photos, seen, strict=True):
            self.generator.features([one.image], [str(photo)])  # an error without a face
            if reason := self.reader.refusal(one):
                hint = " With --seeds 0..7 one sees whom it may show." if self.generator.possible else ""
                self._doubt(f"{photo} is no photo that this generator can read: {reason}.{self._wanted}{hint}", said)
                hiding = True
            said += self._read(photo, one)
        if (two := self.reader.two_people(self.generator, seen)) is not None:
            self._doubt(_two_people([photos[at] for at in two], [seen[at] for at in two]), said)
        images = [one.image for one in seen]
        hiding = hiding and self.generator.possible is not None
        if hiding:
            said.append("What the photos do not tell is open: each seed is one of the people whom they may show.")
        return Looked(images, [one.facts for one in seen], tuple(said), hiding)

    @property
    def _wanted(self) -> str:
        reads = getattr(self.generator.face, "reads", "")
        return f" Give {reads}." if reads else ""

    def _doubt(self, sentence: str, said: list[str]) -> None:
        """An error, or with ``output.unchecked`` a remark."""
        if not self.output.unchecked:
            raise DataError(f"{sentence} --unchecked goes on all the same.")
        said.append(f"Unchecked: {sentence}")

    def _read(self, photo: Photo, seen: Seen) -> list[str]:
        """What was read of a photo, how surely, and where."""
        assert self.reader is not None
        told = [f"{photo.path}: {', '.join(seen.told)}"] if seen.told else []
        if seen.framing != Framing():
            told.append(f"{photo.path} is read in another framing, {seen.framing}.")
        if self.reader.unusual(seen):
            told.append(
                f"{photo.path} is unusual for this generator ({seen.features:.1f}; nine in ten held-out photos have at most "
                f"{self.reader.limits.search:.1f}): compare the drawings with it."
            )
        if unsure := self.reader.unsure(seen):
            told.append(f"{photo.path}: not sure of {', '.join(unsure)}; look whether the drawings are right there.")
        return told

    def adapter(self, latent: Tensor, label: str, name: str | None = None, **info: Any) -> Adapter:
        """The adapter of ``latent`` [size] with its recipe; made alone, so that its bits do not depend on others."""
        recipe = {"base": self.base, "generator": self.generator.digest, **info, "latent": latent.tolist()}
        return Adapter(self.generator.rows(latent[None])[0], self.generator.layout, label, name, recipe)

    def finish(
        self, scratch: Path, adapters: Sequence[Adapter], images: Sequence[Image.Image], notes: Sequence[str] = (),
        refused: Mapping[str, str] | None = None, recipe: bool = False,
    ) -> Result:  # fmt: skip
        """Draws the sheet, with the ``images`` that the adapters were made from, and writes the folders into ``scratch``."""
        out, shown = self.output.out, self.output.sheet.sheet
        sheet = self._sheet(adapters[:MOST], images) if shown else None
        if sheet is not None and len(adapters) > MOST:
            notes = [*notes, f"The contact sheet shows the first {MOST} of {len(adapters)} adapters."]
        sizes: dict[Path, int] = {}
        with self.timed("writing"):
            for one in adapters:
                if one.name is None:
                    continue
                if recipe:
                    name = f"{one.name.replace('/', '-') or out.name}{RECIPE_ENDING}"
                    sizes[out / name] = write_recipe(scratch / name, self.generator, torch.tensor(one.recipe["latent"]))
                    continue
                folder = scratch / one.name
                size = write_folder(one.layout, one.row, self.pipeline.base, folder, dict(one.recipe))
                own = shown and not one.name
                card = adapter_card(one.layout, self.base, one.recipe, size, own, is_lora(one.layout))
                (folder / folders.CARD).write_text(card, encoding="utf-8")
                sizes[out / one.name] = size
            if sheet is not None:
                write_png(sheet, scratch / folders.SHEET, self._facts([] if recipe else adapters, scratch))
        return Result(sizes, out / folders.SHEET if shown else None, self.seconds, tuple(notes), refused or {})

    def _facts(self, adapters: Sequence[Adapter], scratch: Path) -> dict[str, Any]:
        """What the sheet says of itself."""
        written = [one for one in adapters if one.name is not None]
        told = [about_adapter(scratch / str(one.name)) | {"name": one.name or self.output.out.name} for one in written]
        shown = {"shows": "the base and each adapter", "base": self.base, "generator": self.generator.digest}
        return shown | {"adapters": told} | self.output.sheet.scenes(self.pipeline.base).facts

    def _sheet(self, adapters: Sequence[Adapter], images: Sequence[Image.Image]) -> Image.Image:
        """What it was made from, then the base and each adapter on the same scenes from the same noise."""
        with self.timed("drawing"):
            scenes = self.output.sheet.scenes(self.pipeline.base)
            base: list[Image.Image] = []
            drawn: dict[int, list[Image.Image]] = {}
            for layout in {one.layout.digest: one.layout for one in adapters}.values():
                own = [number for number, one in enumerate(adapters) if one.layout.digest == layout.digest]
                rows = torch.stack([adapters[number].row for number in own])
                pictures = self.pipeline.draw(rows, scenes, layout, with_base=not base)
                base = base or pictures.pop(0)
                drawn |= dict(zip(own, pictures, strict=True))
        shown = [Row("made from", list(images)[: len(scenes.prompts)])] if images else []
        shown += [Row("base model", base), *(Row(a.label, drawn[number], a.note) for number, a in enumerate(adapters))]
        return contact_sheet(f"{self.output.out.name}: same noise in each column", shown, scenes.prompts)


def _two_people(photos: Sequence[Photo], seen: Sequence[Seen]) -> str:
    words = [one.words for one in seen]
    other = [
        f"{name.replace('_', ' ')} {words[0][name][0]} and {words[1][name][0]}"
        for name in words[0]
        if words[0][name][0] != words[1][name][0]
    ]
    told = f" ({', '.join(other)})" if other else ""
    return f"{photos[0]} and {photos[1]} seem to show different people{told}. Give photos of one person, or --each for an adapter of each."
