"""How a generator's directions are learnt: from its own latents of people with known attributes, and from drawn pictures.

Where the generator's own face encoder can read the attribute, the length of a slider is set on pictures: directions that read well
in the weights under-deliver in what is drawn. The judge that scores adapters takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.directions import Direction, Space, fit_space
from smidgen.difflora.generator.generator import Generator
from smidgen.difflora.generator.people import Photos, photos_of
from smidgen.difflora.use.sampler import Sheet
from smidgen.difflora.zoo.subjects import TABLE, read_subjects
from smidgen.errors import DataError
from smidgen.tasks import cards

LENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # tried in calibration
ENOUGH = 0.9  # of how surely the word is read from pictures of people who have it,
AT_LEAST = 0.5  # or of this, if it is hardly read from theirs


def learn(
    generator: Generator,
    pipeline: AdaptedPipeline,
    folder: Path,
    most: int = 1000,
    drawn: bool = True,
    progress: bool = True,
) -> Space:
    """The latent space as at most ``most`` training people of the zoo or table in ``folder`` show it.

    ``drawn``: sliders are calibrated on drawn pictures, where the generator's face encoder can read attributes.

    Raises:
        DataError: there is no table of people, or no attributes in it.
    """
    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no {TABLE}; --people names a zoo, or the folder people/ of a generator's training."
        )
    people = [person for person in read_subjects(folder) if person.split == "train" and person.attributes][:most]
    if not people:
        raise DataError(f"Nobody in {folder / TABLE} has attributes, so there is nothing to learn directions of.")
    photos = photos_of(folder, people, generator.face, generator.image, pipeline.base.resolution, progress)
    known = {person.id: person.attributes for person in people}
    latents, attributes = latents_of(generator, photos), [known[name] for name in photos.ids]
    space = fit_space(latents, attributes)
    if drawn and hasattr(generator.face, "read"):
        space = calibrate(generator, pipeline, space, latents, attributes, progress=progress)
    return space


def latents_of(generator: Generator, photos: Photos, batch: int = 64) -> Tensor:
    """The generator's latents [people, size], each from all usable photos of one person."""
    counts = torch.tensor([len(own) for own in photos.usable])
    latents = torch.zeros(len(photos), generator.network.latents)
    for count in counts.unique().tolist():
        for people in (counts == count).nonzero().flatten().split(batch):
            seen = photos.batch([photos.usable[person] for person in people.tolist()])
            with torch.no_grad():
                condition = generator.network.mixing(seen["face"], seen["image"])
                latents[people] = generator.latents(condition, [0] * len(people))
    return latents


def calibrate(
    generator: Generator,
    pipeline: AdaptedPipeline,
    space: Space,
    latents: Tensor,
    attributes: Sequence[Mapping[str, str]],
    people: int = 6,
    steps: int = 10,
    progress: bool = True,
) -> Space:
    """The same space, its directions as long as it takes to see the word.

    For some ``people`` without the word, pictures are drawn at each of ``LENGTHS`` and read by the generator's own face
    encoder. The least length is taken at which the word is read ``ENOUGH`` times as surely as from pictures of people who have
    it (``AT_LEAST`` if it is hardly read there); where none gets there, the one that comes nearest. Words of attributes that
    the encoder does not know stay as they are.
    """
    from tqdm.auto import tqdm

    reader: Any = generator.face
    scenes = Sheet(num_prompts=1, inference_steps=steps).scenes(pipeline.base)
    found = []
    for direction in tqdm(space.directions, desc="directions", unit="word", disable=not progress, dynamic_ncols=True):
        mine = torch.tensor([own.get(direction.attribute) == direction.word for own in attributes])
        without, having = ((mine == there).nonzero().flatten()[:people] for there in (False, True))
        way = space.toward(latents[without], direction.name)
        moved = [space.moved(latents[without], length * way) for length in (0.0, *LENGTHS)]
        pictures = [own[0] for own in pipeline.draw(generator.rows(torch.cat([latents[having], *moved])), scenes)]
        read = reader.read(pictures)
        if direction.word in read.get(direction.attribute, {}):
            direction = _calibrated(direction, read, len(having), len(without))
        found.append(direction)
    return replace(space, directions=tuple(found))


def _calibrated(direction: Direction, read: Mapping[str, Mapping[str, Tensor]], having: int, without: int) -> Direction:
    """``read`` holds pictures of ``having`` people with the word, and of those without it at 0 and at each length."""
    own, *at = read[direction.attribute][direction.word].split([having, *[without] * (len(LENGTHS) + 1)])
    sure = torch.stack([part.mean() for part in at])
    enough = (sure[1:] >= ENOUGH * own.mean().clamp(min=AT_LEAST)).nonzero().flatten().tolist()
    best = enough[0] + 1 if enough else int(sure[1:].argmax()) + 1
    others = [_words(shares, having, without) for name, shares in read.items() if name != direction.attribute]
    kept = float(torch.stack([(words[best] == words[0]).float().mean() for words in others]).mean()) if others else None
    length, (before, after) = LENGTHS[best - 1], (float(sure[0]), float(sure[best]))
    return replace(
        direction,
        length=length,
        before=before,
        read=after,
        own=float(own.mean()),
        kept=kept,
    )


def _words(shares: Mapping[str, Tensor], having: int, without: int) -> Tensor:
    """The likeliest word of each picture of the people without the word, as its number [lengths, people]."""
    return torch.stack(list(shares.values())).argmax(0)[having:].unflatten(0, (-1, without))


def table(directions: Sequence[Direction]) -> str:
    """The sliders and what calibration saw, as a table for a terminal."""
    head = ["slider", "people", "length", "read at 0", "read at 1", "read of people with it", "others kept"]
    rows = [
        [
            d.name,
            str(d.people),
            f"{d.length:g}",
            *("" if v is None else f"{v:.2f}" for v in (d.before, d.read, d.own, d.kept)),
        ]
        for d in directions
    ]
    return cards.table(head, rows)
