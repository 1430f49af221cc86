"""Photos that hide something of a person: under a hat, in grey or tinted light, cut off at the edge, painted over.

A diffusion that has seen who people under hats are answers a hat with all of them. Hats need a base that draws its own people
(``Portraits.in_a_hat``); everything else is made of the photos that there are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw
from torch import Tensor, cat

from smidgen.bases.protocol import ImageBase
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.people import ENCODED, Photos, by_person
from smidgen.difflora.generator.reading import Framing
from smidgen.difflora.generator.shards import Shards
from smidgen.difflora.zoo.subjects import Subject, read_pictures
from smidgen.tasks.data.images import load_picture
from smidgen.training.randomness import derive

Random = numpy.random.Generator
MADE = 1  # of the drawing below: another number makes kept features anew


def grey(image: Image.Image, rng: Random) -> Image.Image:
    """Luma alone."""
    return image.convert("L").convert("RGB")


def tinted(image: Image.Image, rng: Random) -> Image.Image:
    """Each channel at half to all of its light."""
    return Image.fromarray((numpy.asarray(image) * rng.uniform(0.5, 1.0, 3)).astype(numpy.uint8))


def cut(image: Image.Image, rng: Random) -> Image.Image:
    """Nearer, and off the middle."""
    return Framing(rng.uniform(1.2, 1.7), *rng.uniform(-0.2, 0.2, 2).tolist()).of(image)


def painted(image: Image.Image, rng: Random) -> Image.Image:
    """A rectangle of any colour over it, a quarter to three quarters of the side in each direction."""
    side = image.width
    width, height = (rng.uniform(0.25, 0.75, 2) * side).astype(int).tolist()
    left, top = (rng.uniform(0, 1, 2) * (side - numpy.array([width, height]))).astype(int).tolist()
    image = image.copy()
    ImageDraw.Draw(image).rectangle(
        (left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist())
    )
    return image


WAYS = (grey, tinted, cut, painted)


def hidden_photos(
    folder: Path, people: Sequence[Subject], count: int, base: ImageBase, face: PictureEncoder, image: PictureEncoder
) -> Photos:
    """Features of ``count`` photos of each of ``people`` (of the table in ``folder``) that hide something, every other one under a hat
    where the base draws hats; kept in ``encoded/``. People without a face in any of them have no place in it."""
    hats = getattr(base, "in_a_hat", None)
    made_of = [(person.id, person.digests, person.attributes) for person in people]
    asked = (MADE, face.name, image.name, base.resolution, hats is not None, made_of)
    seen = Shards(folder / ENCODED, "hidden", asked, count * len(people))

    def draw(place: int) -> Image.Image:
        person, turn = people[place // count], place % count
        rng = numpy.random.default_rng(derive(0, "hidden", person.id, turn))
        if hats is not None and person.attributes and turn % 2 == 0:
            return hats(person.attributes, rng)  # type: ignore[no-any-return]
        content: Any = read_pictures(folder, person)
        shown = load_picture(io.BytesIO(content[int(rng.integers(len(content)))]), base.resolution)
        return WAYS[int(rng.integers(len(WAYS)))](shown, rng)

    def look(places: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"face": [], "image": []}
        for start in range(places.start, places.stop, 64):
            drawn = [draw(place) for place in range(start, min(start + 64, places.stop))]
            parts["face"].append(face.encode(drawn))
            parts["image"].append(image.encode(drawn))
        return {name: cat(values) for name, values in parts.items()}

    seen.fill(look)
    return by_person([person.id for person in people], [count] * len(people), seen.whole("face"), seen.whole("image"))
