"""Portraits of the embedded world in other poses, and what is known of each exactly: its parts and its landmarks.

The base has seen every portrait upright in the middle. A `Pose` moves, turns and scales the drawing; no caption says
how, so only a control picture can. Parts and landmarks follow from the drawing itself, not from a network.

Example:
    >>> rng = np.random.default_rng(0)
    >>> portrait = sample_portrait(rng)
    >>> portrait.parts().shape, portrait.landmarks().shape
    ((64, 64), (9, 2))
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from smidgen.bases.embedded import world

PARTS = {  # part -> the colour it has in a control picture; a label is a place in this table
    "background": (0, 0, 0), "skin": (230, 120, 60), "clothes": (60, 120, 230), "hair": (240, 220, 60),
    "facial hair": (150, 80, 20), "eyes": (60, 220, 90), "mouth": (230, 50, 140), "glasses": (160, 230, 240),
}  # fmt: skip
LANDMARKS = {  # in the drawing's own 280 x 280 units, y downwards; left and right as seen
    "left eye": (114, 112), "right eye": (166, 112), "nose": (140, 134), "mouth": (140, 157), "chin": (140, 186),
    "left ear": (75, 117), "right ear": (205, 117), "left shoulder": (60, 222), "right shoulder": (220, 222),
}  # fmt: skip
_LAYERS = {  # a layer's name in the drawing -> its part
    "clothes": "clothes", "mouth": "mouth", "nose": "skin", "eyes": "eyes", "eyebrows": "eyes", "top": "hair",
    "facialHair": "facial hair", "accessories": "glasses",
}  # fmt: skip
_CANVAS = 280
_FAINT = 0.3  # layers of a lower opacity are shading, not parts


@dataclass(frozen=True)
class Pose:
    """Where a portrait is: right and down in percent of the picture, turned clockwise in degrees, and its size.

    ``Pose()`` is the portrait as the base knows it.
    """

    right: float = 0.0
    down: float = 2.0
    turn: float = 0.0
    size: float = 1.2

    def placement(self) -> dict[str, float]:
        """As DiceBear's options."""
        return {"translateX": self.right, "translateY": self.down, "rotate": self.turn, "scale": self.size}

    def move(self, points: np.ndarray, pixels: int = world.SIZE) -> np.ndarray:
        """Points [n, 2] of the upright drawing (280 units wide) -> where they are, in pixels (a pixel's centre is at
        .5)."""
        middle, angle = _CANVAS / 2, math.radians(self.turn)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shift = np.array([self.right, self.down]) / 100 * _CANVAS
        return ((points - middle) * self.size @ turn.T + middle + shift) * pixels / _CANVAS


def sample_pose(rng: np.random.Generator) -> Pose:
    """A moderate pose: up to a pixel to each side, 6 degrees, and a twelfth smaller or larger.

    Further than that the base's autoencoder, which has seen upright portraits in the middle only, draws no sharp faces.
    """
    right, down = rng.uniform(-1.6, 1.6, 2)
    return Pose(right, 2 + down, rng.uniform(-6, 6), rng.uniform(1.1, 1.3))


@dataclass(frozen=True)
class Portrait:
    """A person in a scene in a pose."""

    identity: world.Identity
    scene: world.Scene
    pose: Pose = Pose()

    def picture(self, pixels: int = world.SIZE) -> Any:
        """The portrait as an RGB ``PIL.Image``."""
        return world.rasterize(self._drawing(), pixels)

    def parts(self, pixels: int = world.SIZE) -> np.ndarray:
        """Labels [pixels, pixels] (uint8): the part that is on top at the centre of each pixel, no antialiasing."""
        return labels_of(np.asarray(world.rasterize(_flat(self._drawing()), pixels)))

    def landmarks(self, pixels: int = world.SIZE) -> np.ndarray:
        """[9, 2]: x and y of `LANDMARKS` in pixels, also where hair or glasses hide them."""
        return self.pose.move(np.array(list(LANDMARKS.values()), float), pixels)

    def _drawing(self) -> str:
        return world.drawing(self.identity, self.scene, self.pose.placement())


def sample_portrait(rng: np.random.Generator, split: world.Split = "train") -> Portrait:
    """Identity of ``split``, scene and pose, independent of each other."""
    return Portrait(world.sample_identity(rng, split), world.sample_scene(rng), sample_pose(rng))


def labels_of(picture: np.ndarray) -> np.ndarray:
    """Labels [height, width] of a picture in the colours of `PARTS` [height, width, 3]; the nearest colour counts."""
    colors = np.array(list(PARTS.values()), np.int32)
    distance = np.square(picture[..., None, :].astype(np.int32) - colors).sum(-1)
    return distance.argmin(-1).astype(np.uint8)


def colored(labels: np.ndarray) -> np.ndarray:
    """Labels [height, width] as an RGB picture [height, width, 3] in the colours of `PARTS`."""
    return np.array(list(PARTS.values()), np.uint8)[labels]


def _flat(svg: str) -> str:
    """The drawing with every part in its flat colour, without shading and antialiasing.

    A portrait is one rectangle (the background), one body, and layers whose name begins their id.
    """
    head, body = svg.split("</metadata>", 1)
    head = head.replace('shape-rendering="auto"', 'shape-rendering="crispEdges"')
    current, ends = "skin", re.compile(r'<g id="([A-Za-z]+)-|</defs>|<(?:path|rect)\b[^>]*>')

    def recolor(match: re.Match) -> str:
        nonlocal current
        tag = match.group(0)
        if match.group(1):
            current = _LAYERS[match.group(1)]
        elif tag == "</defs>":
            current = "skin"
        elif "fill=" in tag:
            faint = float((re.search(r'fill-opacity="([\d.]+)"', tag) or [0, 1])[1]) < _FAINT
            part = "background" if tag.startswith("<rect") and current == "skin" else current
            tag = re.sub(r' fill-opacity="[\d.]+"', "", tag)
            color = "none" if faint else "#{:02x}{:02x}{:02x}".format(*PARTS[part])
            tag = re.sub(r' fill="[^"]*"', f' fill="{color}"', tag)
        return tag

    return head + "</metadata>" + ends.sub(recolor, body)
