"""Control pictures: what a picture's edges, parts or landmarks look like as a picture a hint encoder reads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from smidgen.errors import ConfigError, MissingExtraError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

Control = Literal["canny", "segmentation", "landmarks", "other"]
CONTROLS = ("canny", "segmentation", "landmarks", "other")
CANNY = (50, 100)  # hysteresis thresholds on the grey picture
DOT = 1 / 32  # radius of a landmark's dot in picture widths


def check(control: str) -> str:
    """``control`` if it is one; ConfigError with the nearest names otherwise."""
    if control not in CONTROLS:
        raise ConfigError(f"There is no control {control!r}.{did_you_mean(control, CONTROLS)} Known: {CONTROLS}.")
    return control


def edges(image: "Image") -> NDArray[np.uint8]:
    """Canny edges of a picture: 255 on an edge, else 0 [height, width]."""
    grey = np.asarray(image.convert("L"))
    return np.asarray(_cv2().Canny(grey, *CANNY), np.uint8)


def edge_picture(image: "Image") -> "Image":
    """The picture's edges, white on black."""
    from PIL import Image

    return Image.fromarray(edges(image)).convert("RGB")


def dot_picture(points: Sequence[Sequence[float]] | NDArray, size: int) -> "Image":
    """Landmarks [n, 2] (pixels) as dots on black, each of its own hue, those out of sight left out."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size))
    pen, radius = ImageDraw.Draw(picture), DOT * size
    for number, (x, y) in enumerate(points):
        box = (x - radius, y - radius, x + radius - 1, y + radius - 1)
        pen.ellipse(box, fill=_hue(number, len(points)))
    return picture


def points_of(picture: "Image", count: int) -> NDArray[np.float64]:
    """The landmarks [count, 2] that ``dot_picture`` drew, by their hues, to half a pixel; NaN for those not seen."""
    from PIL import ImageColor

    pixels, points = np.asarray(picture.convert("RGB")), np.full((count, 2), np.nan)
    for number in range(count):
        rows, columns = np.nonzero((pixels == ImageColor.getrgb(_hue(number, count))).all(-1))
        if len(rows):
            points[number] = columns.mean() + 0.5, rows.mean() + 0.5
    return points


def _hue(number: int, count: int) -> str:
    return f"hsl({360 * number // count}, 100%, 50%)"


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("Edges need OpenCV: pip install 'smidgen[control]'") from error
    return cv2
