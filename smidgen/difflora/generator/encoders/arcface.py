"""ArcFace and its like (Deng et al. 2019, arXiv 1801.07698): who, from a face aligned by its five points."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from smidgen.difflora.generator.encoders.faces import CROP, Detector, align, load_detector, open_onnx
from smidgen.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
ALIGNED = "aligned"
BESIDE = ("det_*.onnx", "scrfd*.onnx", "face_detection_yunet*.onnx")  # detectors by the names they are published under
BATCH = 32


class ArcFace:
    """``FILE.onnx[,DETECTOR.onnx | ,aligned]``: a recognition model that takes (x - 127.5) / 127.5 of RGB faces of 112
    pixels, as those of InsightFace's packs do (``w600k_r50.onnx``, ``glintr100.onnx``).

    Without a detector the one beside FILE is taken; ``aligned`` says that the pictures are such faces already, with
    nothing to be found. Features have length 1. Of several faces the largest is taken, with a warning.

    Raises:
        ConfigError: no file, a file of something else, no detector.
        MissingExtraError: onnxruntime or OpenCV is not installed.
    """

    def __init__(self, options: str = "") -> None:
        file, _, detector = options.partition(",")
        if not file:
            raise ConfigError(
                "arcface needs a recognition model: arcface:FILE.onnx, or arcface:FILE.onnx,DETECTOR.onnx."
            )
        path = Path(file).expanduser()
        self.session = open_onnx(path)
        self.input, self.batch, self.width = self._shapes(path)
        self.detector: Detector | None = None
        self.name = f"arcface:{_pinned(path)},{ALIGNED}"
        if detector != ALIGNED:
            found = Path(detector).expanduser() if detector else _beside(path)
            self.detector, self.name = load_detector(found), f"arcface:{_pinned(path)},{_pinned(found)}"

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Features [n, width]; NaN where no face is found."""
        faces = [self._face(picture) for picture in pictures]
        crowded = sum(number > 1 for _, number in faces)
        if crowded:
            logger.warning("%d of %d pictures show several faces; the largest is taken.", crowded, len(faces))
        features = torch.full((len(faces), self.width), torch.nan)
        seen = [at for at, (face, _) in enumerate(faces) if face is not None]
        for start in range(0, len(seen), self.batch):
            part = seen[start : start + self.batch]
            pixels = numpy.stack([numpy.asarray(faces[at][0], numpy.float32) for at in part])
            answer = self.session.run(None, {self.input: ((pixels - 127.5) / 127.5).transpose(0, 3, 1, 2)})[0]
            features[part] = torch.nn.functional.normalize(torch.from_numpy(numpy.array(answer, numpy.float32)))
        return features

    def _face(self, picture: Image) -> tuple[numpy.ndarray | None, int]:
        """The face [112, 112, 3] and how many there are."""
        if self.detector is None:
            return numpy.asarray(picture.convert("RGB").resize((CROP, CROP))), 1
        pixels = numpy.asarray(picture.convert("RGB"))
        found = self.detector.find(pixels)
        return (align(pixels, found[0].points), len(found)) if found else (None, 0)

    def _shapes(self, path: Path) -> tuple[str, int, int]:
        """Name of the input, pictures in a batch, width of the features."""
        taken, given = self.session.get_inputs(), self.session.get_outputs()
        shape, out = taken[0].shape, given[0].shape
        sides = (3, CROP, CROP)
        fits = len(shape) == 4 and not any(isinstance(n, int) and n != sides[at] for at, n in enumerate(shape[1:]))
        if len(taken) != 1 or len(given) != 1 or not fits or len(out) != 2 or not isinstance(out[1], int):
            raise ConfigError(
                f"{path} is no recognition model: one takes [n, 3, {CROP}, {CROP}] and answers [n, width], this one takes "
                f"{' and '.join(str(i.shape) for i in taken)} and answers {' and '.join(str(o.shape) for o in given[:3])}."
            )
        return taken[0].name, shape[0] if isinstance(shape[0], int) else BATCH, out[1]


def _beside(path: Path) -> Path:
    """The detector in the folder of a recognition model."""
    found = sorted({other for pattern in BESIDE for other in path.parent.glob(pattern)} - {path})
    if len(found) == 1:
        return found[0]
    there = f"several lie beside it ({', '.join(other.name for other in found)})" if found else "none lies beside it"
    raise ConfigError(
        f"Which face detector goes with {path}? {there[0].upper()}{there[1:]}. Name one, arcface:{path.name},DETECTOR.onnx "
        f"(SCRFD with key points, or YuNet), or arcface:{path.name},{ALIGNED} for pictures that are aligned faces of {CROP} pixels."
    )


def _pinned(path: Path) -> str:
    """A file's name with the start of its hash: caches and generators depend on these very weights."""
    with open(path, "rb") as file:
        return f"{path.name}@{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
