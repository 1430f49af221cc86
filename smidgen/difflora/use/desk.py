"""The desk that the commands work at: a generator and its base, loaded; what is made there is drawn and written as folders."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smidgen.difflora.generator.card import adapter_card
from smidgen.difflora.generator.generator import SHIPPED, load_generator
from smidgen.difflora.use import folders
from smidgen.difflora.use.carrier import Carrier, Sheet
from smidgen.difflora.use.folders import Photo, write_folder
from smidgen.difflora.weightspace.layout import Layout
from smidgen.tasks.contact_sheet import Row, contact_sheet, save_image
from smidgen.tasks.data.images import fit
from smidgen.tasks.report import public_name


@dataclass(frozen=True)
class Work:
    """Where results go, and what makes them."""

    out: Path  # the folder for the adapter
    generator: Path | None = None  # the generator's folder; None: the one that comes with the package
    base: str | None = None  # embedded, a pipeline folder, or a hub name; None: as the generator says
    overwrite: bool = False  # write although --out holds files; those of other names stay
    sheet: Sheet = field(default_factory=Sheet)


@dataclass(frozen=True)
class Made:
    """One adapter: its row [numbers] of ``layout``, how it was made, and what it is called on the sheet. ``name`` is its folder
    below ``--out``, "" for that one itself; None: it is only drawn."""

    row: Tensor
    layout: Layout
    label: str
    name: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What was written: folders with the bytes of their adapters, the sheet, seconds of each part, and remarks."""

    folders: dict[Path, int]
    sheet: Path | None
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{folder}: {size:,} bytes" for folder, size in self.folders.items()]
        lines += [f"contact sheet: {self.sheet}"] if self.sheet else []
        lines += [*self.notes, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())]
        return "\n".join(lines)


class Desk:
    """A generator and the base its adapters are for, loaded; it keeps the time."""

    def __init__(self, work: Work) -> None:
        self.seconds: dict[str, float] = {}
        with self.timed("loading"):
            self.folder = work.generator or SHIPPED
            self.generator = load_generator(self.folder)
            self.carrier = Carrier(work.base or self.generator.base, self.generator.layout)
            self.base = public_name(self.carrier.base.name)
            self.encoders = self.generator.face, self.generator.image

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def fitted(self, photos: Sequence[Photo]) -> list[Image.Image]:
        """Photos as the base and the encoders see them: square, of the base's size."""
        return [fit(photo.image, self.carrier.base.resolution) for photo in photos]

    def row(self, latent: Tensor) -> Tensor:
        """The adapter [1, numbers] of one latent [size]; one at a time, so that its bits do not depend on others."""
        return self.generator.rows(latent[None])

    def made(self, latent: Tensor, label: str, name: str | None = None, **told: Any) -> Made:
        """The adapter of ``latent`` with its recipe."""
        recipe = {"base": self.base, "generator": self.generator.digest, **told, "latent": latent.tolist()}
        return Made(self.row(latent)[0], self.generator.layout, label, name, recipe)


def finish(
    work: Work,
    desk: Desk,
    scratch: Path,
    made: Sequence[Made],
    images: Sequence[Image.Image],
    notes: Sequence[str] = (),
) -> Outcome:
    """Draws the sheet and writes the folders into ``scratch``."""
    sheet = _sheet(work, desk, made, images) if work.sheet.sheet else None
    sizes: dict[Path, int] = {}
    with desk.timed("writing"):
        for one in made:
            if one.name is None:
                continue
            folder = scratch / one.name
            size = write_folder(one.layout, one.row, desk.carrier.unet, folder, dict(one.recipe))
            own = sheet is not None and not one.name
            card = adapter_card(one.layout, desk.base, one.recipe, size, own, folders.is_lora(one.layout))
            (folder / folders.CARD).write_text(card, encoding="utf-8")
            sizes[work.out / one.name] = size
        if sheet is not None:
            save_image(sheet, scratch / folders.SHEET)
    return Outcome(sizes, work.out / folders.SHEET if sheet else None, desk.seconds, tuple(notes))


def _sheet(work: Work, desk: Desk, made: Sequence[Made], images: Sequence[Image.Image]) -> Image.Image:
    """What it was made from, then the base and each adapter on the same scenes from the same noise."""
    with desk.timed("drawing"):
        scenes = desk.carrier.scenes(work.sheet)
        base: list[Image.Image] = []
        drawn: dict[int, list[Image.Image]] = {}
        for layout in {one.layout.digest: one.layout for one in made}.values():
            own = [number for number, one in enumerate(made) if one.layout.digest == layout.digest]
            rows = torch.stack([made[number].row for number in own])
            pictures = desk.carrier.draw(rows, work.sheet, layout, with_base=not base)
            base = base or pictures.pop(0)
            drawn |= dict(zip(own, pictures, strict=True))
    shown = [Row("made from", list(images)[: len(scenes)])] if images else []
    shown += [Row("base model", base), *(Row(one.label, drawn[number], one.note) for number, one in enumerate(made))]
    return contact_sheet(f"{work.out.name}: same noise in each column", shown, scenes)
