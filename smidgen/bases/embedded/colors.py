"""Colours as numbers: sRGB to CIE L*a*b* (D65) and back, and the distance between two.

A distance of 2 is just seen, of 8 a plainly different shade, of 30 another colour (CIE 1976, delta E*ab).

Example:
    >>> lab("#3f6fd8").round()
    array([ 49.,  19., -59.])
    >>> hexadecimal(lab("#3f6fd8"))
    '#3f6fd8'
"""

import re
from functools import lru_cache

import numpy as np

from smidgen.errors import DataError

XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = XYZ.sum(1)  # D65, so that white has no hue
EDGE = 6 / 29
HEXADECIMAL = re.compile(r"#[0-9a-f]{6}")


def rgb(color: str) -> np.ndarray:
    """``"#rrggbb"`` as three numbers 0 to 255.

    Raises:
        DataError: it is written in another way.
    """
    if not isinstance(color, str) or not HEXADECIMAL.fullmatch(color):
        raise DataError(f"{color!r} is no colour; write it as '#3f6fd8', six small hexadecimal digits.")
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def lab_of(colors: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] in 0..255 -> L*, a*, b* [..., 3]."""
    part = np.asarray(colors, float) / 255
    linear = np.where(part > 0.04045, ((part + 0.055) / 1.055) ** 2.4, part / 12.92)
    ratio = linear @ XYZ.T / WHITE
    f = np.where(ratio > EDGE**3, np.cbrt(ratio), ratio / (3 * EDGE**2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def rgb_of(values: np.ndarray) -> np.ndarray:
    """L*, a*, b* [..., 3] -> sRGB [..., 3] in 0..255, not clipped: outside of it, no screen shows the colour."""
    values = np.asarray(values, float)
    middle = (values[..., 0] + 16) / 116
    f = np.stack([middle + values[..., 1] / 500, middle, middle - values[..., 2] / 200], -1)
    linear = np.where(f > EDGE, f**3, 3 * EDGE**2 * (f - 4 / 29)) * WHITE @ np.linalg.inv(XYZ).T
    bent = np.where(linear > 0.0031308, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return bent * 255


@lru_cache(4096)
def lab(color: str) -> np.ndarray:
    """``"#rrggbb"`` as L*, a*, b*, read-only."""
    values = lab_of(rgb(color))
    values.setflags(write=False)
    return values


def hexadecimal(values: np.ndarray) -> str:
    """L*, a*, b* as the nearest ``"#rrggbb"`` there is."""
    return "#{:02x}{:02x}{:02x}".format(*rgb_of(values).round().clip(0, 255).astype(int))


def shown(values: np.ndarray) -> bool:
    """Whether a screen shows L*, a*, b* as it is."""
    channels = rgb_of(values)
    return bool((channels > -0.5).all() and (channels < 255.5).all())


def nearest(color: np.ndarray, named: dict[str, str]) -> tuple[str, float]:
    """The word of `named` whose colour is nearest to L*, a*, b*, and how far it is."""
    distances = {word: float(np.linalg.norm(lab(value) - color)) for word, value in named.items()}
    word = min(distances, key=distances.__getitem__)
    return word, distances[word]
