"""A tiny random pipeline, a folder of drawn people for it, and small layouts; one thread, runs are compared to the bit."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from tests.training import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return tiny.sd_folder(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """Five people of three pictures, told apart by their colours."""
    root = tmp_path_factory.mktemp("people")
    for person, name in enumerate(("ann", "bob", "cleo", "dan", "eve")):
        (root / name).mkdir()
        for number in range(3):
            image = Image.new("RGB", (20, 20), (50 * person, 90, 200 - 60 * number))
            ImageDraw.Draw(image).ellipse((4, 4, 15 - number, 15), fill=(220, 60 * number, 40 * person))
            image.save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(tiny.CAPTIONS[number])
    return root
