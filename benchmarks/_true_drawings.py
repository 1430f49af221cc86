"""Measures of drawn people that know no network: pixels beside the true drawings of the embedded world, or of the wide one.

rank-1      nearest of all held-out people's true drawings in the same scenes is the person's own
hard set    nearer to the person's own drawings than to those of all people who differ from them in one attribute
hair, skin  CIE76 distance in Lab of the median colour where the true drawing has that colour
halo        mean CIE76 distance from the true drawing where that shows the background

``scenes`` are the same for everybody, or a list for each person.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from smidgen.bases.embedded import colors, wide, world

Pictures = Sequence[Sequence[Any]]  # [person][scene]
APART = 20.0  # of Lab, from which another named colour makes another person of the wide world


def array(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


@lru_cache(32_768)
def drawn(person: world.Identity, scene: world.Scene) -> np.ndarray:
    """The true drawing [64, 64, 3] in 0..1."""
    return array(_world(person).render(person, scene))


def _world(person: Any) -> Any:
    return wide if isinstance(person, wide.Identity) else world


def rank_1(pictures: Pictures, people: Sequence[Any], scenes: Sequence[Any]) -> list[float]:
    """1.0 for each person whose own true drawings are the nearest of everybody's, else 0.0."""
    found = []
    for own, (row, shown) in enumerate(zip(pictures, _for_each(scenes, people), strict=True)):
        truth = np.stack([[drawn(person, scene) for scene in shown] for person in people])
        found.append(float(((_stack(row) - truth) ** 2).mean((1, 2, 3, 4)).argmin() == own))
    return found


def hard_set(
    pictures: Pictures, people: Sequence[Any], scenes: Sequence[Any], attributes: Sequence[str] | None = None
) -> list[float]:
    """1.0 for each person nearer to their own true drawings than to those of everybody who differs in one attribute, or in one of
    ``attributes``."""
    found = []
    for row, person, shown in zip(pictures, people, _for_each(scenes, people), strict=True):
        seen = _stack(row)

        def far(other: Any, seen: np.ndarray = seen, shown: Sequence[Any] = shown) -> float:
            return float(((seen - _stack([drawn(other, scene) for scene in shown])) ** 2).mean())

        found.append(float(far(person) < min(far(other) for other in neighbours(person, attributes))))
    return found


def neighbours(person: Any, attributes: Sequence[str] | None = None) -> list[Any]:
    """Everybody who differs in one attribute: 45 people of the embedded world. In the wide one, whoever has another named colour far
    enough from one's own, and no other eyebrows, which few pixels show."""
    words, kind, attributes_of = person.as_dict(), type(person), _world(person).IDENTITY_ATTRIBUTES
    chosen = attributes or [name for name in attributes_of if name != "brows"]
    if words["hair"] == "bald" and words["facial_hair"] == "none":
        chosen = [name for name in chosen if name != "hair_color"]
    return [
        kind(**(words | {name: word}))
        for name in chosen
        for word in attributes_of[name]
        if word != words[name] and _apart(person, name, word)
    ]


def _apart(person: Any, name: str, word: str) -> bool:
    """Whether the word is another colour than the person's; always, where it is none or the world has no free ones."""
    if not isinstance(person, wide.Identity) or name not in wide.FREE:
        return True
    own, other = (colors.lab(str(one)) for one in (wide.color_of(person, name), wide.ATTRIBUTES[name][word]))
    return float(np.linalg.norm(own - other)) >= APART


def _for_each(scenes: Sequence[Any], people: Sequence[Any]) -> Sequence[Sequence[Any]]:
    return scenes if isinstance(scenes[0], list | tuple) else [scenes] * len(people)


def lab_errors(pictures: Pictures, people: Sequence[Any], scenes: Sequence[Any], attribute: str) -> list[float]:
    """Mean over scenes of the colour's distance in Lab for each person; NaN where no drawing shows it."""
    found = []
    for row, person, own in zip(pictures, people, _for_each(scenes, people), strict=True):
        errors = []
        for image, scene in zip(row, own, strict=True):
            there = region(person, scene, attribute)
            if there.sum() > 20:
                seen, true = (
                    np.median(colors.lab_of(255 * one[there]), 0) for one in (_pixels(image), drawn(person, scene))
                )
                errors.append(float(np.linalg.norm(seen - true)))
        found.append(float(np.mean(errors)) if errors else float("nan"))
    return found


@lru_cache(4096)
def region(person: Any, scene: Any, attribute: str) -> np.ndarray:
    """Pixels of the true drawing that change when the attribute's colour does [64, 64]."""
    words, there = person.as_dict(), np.ones((world.SIZE, world.SIZE), bool)
    others = [word for word in _world(person).IDENTITY_ATTRIBUTES[attribute] if word != words[attribute]]
    if isinstance(person, wide.Identity):  # a free colour may be next to a named one
        others = [word for word in others if _apart(person, attribute, word)]
    for word in others[:2]:
        other = drawn(type(person)(**(words | {attribute: word})), scene)
        there &= np.abs(other - drawn(person, scene)).max(-1) > 0.08
    return there


def halos(pictures: Pictures, people: Sequence[Any], scenes: Sequence[Any]) -> list[float]:
    """Mean over scenes of the mean distance in Lab from the true drawing, where that shows the background."""
    found = []
    for row, person, own in zip(pictures, people, _for_each(scenes, people), strict=True):
        errors = []
        for image, scene in zip(row, own, strict=True):
            true, behind = drawn(person, scene), background(person, scene)
            errors.append(_lab_distance(_pixels(image), true)[behind].mean())
        found.append(float(np.mean(errors)))
    return found


@lru_cache(4096)
def background(person: Any, scene: Any) -> np.ndarray:
    """Pixels of the true drawing that the background's colour alone decides [64, 64]."""
    words = scene.as_dict()
    others = [word for word in world.BACKGROUND if word != words["background"]][:2]
    there = np.ones((world.SIZE, world.SIZE), bool)
    for word in others:
        changed = np.abs(drawn(person, type(scene)(**(words | {"background": word}))) - drawn(person, scene)).max(-1)
        there &= changed > 0.08
    return there


def _lab_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.linalg.norm(colors.lab_of(255 * one) - colors.lab_of(255 * other), axis=-1)  # type: ignore[no-any-return]


def _pixels(image: Any) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else array(image)


def _stack(row: Sequence[Any]) -> np.ndarray:
    return np.stack([_pixels(one) for one in row])
