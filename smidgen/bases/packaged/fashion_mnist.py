"""Photos of clothes at 28 pixels, Zalando's Fashion-MNIST, from Debian's dataset-fashion-mnist."""

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from smidgen.bases.packaged.entry import Packaged, debian
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, grey_png, write_pictures

SOURCE = debian(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30_900_652,
)
SIDE = 28
SIZES = {"train": 10_000, "validation": 2_000}
LABELS = (
    "T-shirt-top",  # T-shirt/top in the package; a label is a folder's name here
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DATA = "usr/share/datasets/fashion-mnist"


def write(folder: Path) -> None:
    """The package's own test photos stay the test split; its training photos give the other two. A file's name is the
    photo's number in the package."""
    files = contents(SOURCE, rf"{_DATA}/(train|t10k)-.*\.gz")
    train, test = (_photos(files, part) for part in ("train", "t10k"))
    splits = {**draw_splits(train.keys() - test.keys(), SIZES), "test": list(test)}
    known = train | test
    write_pictures(
        folder,
        {split: [(*known[grey], grey_png(grey, SIDE)) for grey in drawn] for split, drawn in splits.items()},
    )


def _photos(files: Mapping[str, bytes], part: str) -> dict[bytes, tuple[str, str]]:
    """Label and name of each photo, by its pixels."""
    grey, labels = (
        np.frombuffer(
            gzip.decompress(files[f"{_DATA}/{part}-{what}-idx{axes}-ubyte.gz"]), np.uint8, offset=4 + 4 * axes
        )
        for what, axes in (("images", 3), ("labels", 1))
    )
    photos = grey.reshape(len(labels), SIDE * SIDE)
    return {
        photo.tobytes(): (LABELS[label], f"{i:05d}")
        for i, (photo, label) in enumerate(zip(photos, labels, strict=True))
    }


ENTRY = Packaged(
    name="fashion-mnist",
    kind="pictures",
    summary="22,000 photos of clothes from Fashion-MNIST, 28 pixels, grey, all 10,000 of its test among them",
    licence="MIT",
    attribution="Han Xiao, Kashif Rasul and Roland Vollgraf, Zalando SE (Fashion-MNIST, 2017); packaged by Debian",
    sources=(SOURCE,),
    write=write,
)
