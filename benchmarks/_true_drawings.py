"""Measures of drawn people that know no network: pixels beside the true drawings of the embedded world.

rank-1      nearest of all held-out people's true drawings in the same scenes is the person's own
hard set    nearer to the person's own drawings than to those of all people who differ from them in one attribute
hair, skin  CIE76 distance in Lab of the median colour where the true drawing has that colour
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from smidgen.bases.embedded import colors, world

Pictures = Sequence[Sequence[Any]]  # [person][scene]


def array(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


@lru_cache(16_384)
def drawn(person: world.Identity, scene: world.Scene) -> np.ndarray:
    """The true drawing [64, 64, 3] in 0..1."""
    return array(world.render(person, scene))


def rank_1(pictures: Pictures, people: Sequence[world.Identity], scenes: Sequence[world.Scene]) -> list[float]:
    """1.0 for each person whose own true drawings are the nearest of everybody's, else 0.0."""
    truth = np.stack([[drawn(person, scene) for scene in scenes] for person in people])
    found = [((_stack(row) - truth) ** 2).mean((1, 2, 3, 4)).argmin() for row in pictures]
    return [float(nearest == own) for own, nearest in enumerate(found)]


def hard_set(pictures: Pictures, people: Sequence[world.Identity], scenes: Sequence[world.Scene]) -> list[float]:
    """1.0 for each person nearer to their own true drawings than to those of everybody who differs in one attribute."""
    found = []
    for row, person in zip(pictures, people, strict=True):
        seen = _stack(row)

        def far(other: world.Identity, seen: np.ndarray = seen) -> float:
            return float(((seen - _stack([drawn(other, scene) for scene in scenes])) ** 2).mean())

        found.append(float(far(person) < min(far(other) for other in neighbours(person))))
    return found


def neighbours(person: world.Identity) -> list[world.Identity]:
    """Everybody who differs in one attribute, 45 people."""
    words = person.as_dict()
    return [
        world.Identity(**(words | {name: word}))
        for name, known in world.IDENTITY_ATTRIBUTES.items()
        for word in known
        if word != words[name]
    ]


def lab_errors(
    pictures: Pictures, people: Sequence[world.Identity], scenes: Sequence[world.Scene], attribute: str
) -> list[float]:
    """Mean over scenes of the colour's distance in Lab for each person; NaN where no drawing shows it."""
    found = []
    for row, person in zip(pictures, people, strict=True):
        errors = []
        for image, scene in zip(row, scenes, strict=True):
            there = region(person, scene, attribute)
            if there.sum() > 20:
                seen, true = (
                    np.median(colors.lab_of(255 * one[there]), 0) for one in (array(image), drawn(person, scene))
                )
                errors.append(float(np.linalg.norm(seen - true)))
        found.append(float(np.mean(errors)) if errors else float("nan"))
    return found


def region(person: world.Identity, scene: world.Scene, attribute: str) -> np.ndarray:
    """Pixels of the true drawing that change when the attribute's colour does [64, 64]."""
    words, there = person.as_dict(), np.ones((world.SIZE, world.SIZE), bool)
    for word in [word for word in world.IDENTITY_ATTRIBUTES[attribute] if word != words[attribute]][:2]:
        other = drawn(world.Identity(**(words | {attribute: word})), scene)
        there &= np.abs(other - drawn(person, scene)).max(-1) > 0.08
    return there


def _stack(row: Sequence[Any]) -> np.ndarray:
    return np.stack([one if isinstance(one, np.ndarray) else array(one) for one in row])
