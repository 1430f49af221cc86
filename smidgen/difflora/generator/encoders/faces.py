"""Faces in pictures: detectors that answer boxes and five points, and the crop that recognition models expect.

Two families of detectors are read, told apart by their files: SCRFD (Guo et al. 2021, arXiv 2105.04714; InsightFace's
``det_10g.onnx``, ``scrfd_*_bnkps.onnx``) and YuNet (OpenCV's ``face_detection_yunet_2023mar.onnx``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from smidgen.errors import ConfigError, MissingExtraError

CROP = 112  # pixels on a side of an aligned face
# Where eyes, nose and corners of the mouth lie in it (x, y, left to right in the picture), as ArcFace was trained
TEMPLATE = numpy.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
SIZES = (640, 320)  # pixels a picture is scaled to; the small one finds faces that fill the picture
SURE, OVERLAP = 0.5, 0.4  # least score of a face; overlap of boxes above which they are one face


@dataclass(frozen=True)
class Face:
    """``box`` [4] left, top, right, bottom; ``points`` [5, 2] as in TEMPLATE; both in pixels."""

    box: numpy.ndarray
    points: numpy.ndarray

    @property
    def area(self) -> float:
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


def similarity(points: numpy.ndarray, template: numpy.ndarray = TEMPLATE) -> numpy.ndarray:
    """The turn, scale and shift [2, 3] that takes ``points`` [n, 2] nearest to ``template`` [n, 2] in least squares.

    In the complex plane it is z -> a z + b with a = <z - mean z, w - mean w> / |z - mean z|^2: Umeyama (1991) without
    mirroring, in closed form.

    Raises:
        ValueError: all points are one.

    Example:
        >>> similarity(TEMPLATE * 2).round(6)
        array([[0.5, 0. , 0. ],
               [0. , 0.5, 0. ]])
    """
    z, w = points @ (1, 1j), template @ (1, 1j)
    spread = z - z.mean()
    size = numpy.vdot(spread, spread).real
    if not size > 0:
        raise ValueError("points that are all one have no scale")
    a = numpy.vdot(spread, w - w.mean()) / size
    b = w.mean() - a * z.mean()
    return numpy.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(picture: numpy.ndarray, points: numpy.ndarray) -> numpy.ndarray:
    """The face [112, 112, 3] with these five points, cut out of ``picture`` [height, width, 3]; black beyond its edge."""
    return open_cv().warpAffine(picture, similarity(points), (CROP, CROP), borderValue=0.0)  # type: ignore[no-any-return]


class Detector:
    """Finds faces in pictures [height, width, 3] of RGB bytes."""

    sizes: tuple[int, ...] = SIZES

    def find(self, picture: numpy.ndarray) -> list[Face]:
        """The faces, the largest first; none is an empty list."""
        cv2, (height, width) = open_cv(), picture.shape[:2]
        for size in self.sizes:
            scale = size / max(height, width)
            small = (max(1, round(width * scale)), max(1, round(height * scale)))
            square = numpy.zeros((size, size, 3), numpy.uint8)
            square[: small[1], : small[0]] = cv2.resize(picture, small)
            back = numpy.array([width / small[0], height / small[1]])
            found = [
                Face(face.box * numpy.tile(back, 2), face.points * back)
                for face in self.detect(square)
                if len(numpy.unique(face.points, axis=0)) > 1
            ]
            if found:
                return sorted(found, key=lambda face: -face.area)
        return []

    def detect(self, square: numpy.ndarray) -> list[Face]:
        """Faces in a square picture."""
        raise NotImplementedError


class Scrfd(Detector):
    """Boxes and points as distances from anchors on grids of 8, 16, 32 (64, 128) pixels.

    Outputs: scores of every grid, then distances to the boxes' sides, then to the points, in units of the grid.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        taken = session.get_inputs()[0]
        self.input, fixed = taken.name, taken.shape[2]
        self.sizes = (fixed,) if isinstance(fixed, int) else SIZES
        self.grids = (8, 16, 32) if len(session.get_outputs()) == 9 else (8, 16, 32, 64, 128)

    def detect(self, square: numpy.ndarray) -> list[Face]:
        pixels = (square.astype(numpy.float32).transpose(2, 0, 1)[None] - 127.5) / 128
        outputs = [numpy.asarray(value) for value in self.session.run(None, {self.input: pixels})]
        levels, found = len(self.grids), []
        for level, grid in enumerate(self.grids):
            scores, boxes, points = (outputs[level + levels * part] for part in range(3))
            scores, boxes, points = scores.reshape(-1), boxes.reshape(-1, 4), points.reshape(-1, 5, 2)
            cells = len(square) // grid
            rows, columns = numpy.divmod(numpy.arange(len(scores)) // (len(scores) // cells**2), cells)
            centres = numpy.stack([columns, rows], 1) * grid
            for at in numpy.flatnonzero(scores >= SURE):
                left_top, right_bottom = centres[at] - boxes[at, :2] * grid, centres[at] + boxes[at, 2:] * grid
                face = Face(numpy.concatenate([left_top, right_bottom]), centres[at] + points[at] * grid)
                found.append((float(scores[at]), face))
        return _one_each(found)


class YuNet(Detector):
    """OpenCV's own detector."""

    def __init__(self, path: Path) -> None:
        cv2 = open_cv()
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (SIZES[0], SIZES[0]), SURE, OVERLAP)
        except cv2.error as error:
            raise ConfigError(f"OpenCV {cv2.__version__} cannot read the face detector {path}: {error}") from error

    def detect(self, square: numpy.ndarray) -> list[Face]:
        self.network.setInputSize((len(square), len(square)))
        rows = self.network.detect(square[..., ::-1])[1]  # left, top, width, height, five points, score
        return [
            Face(numpy.concatenate([row[:2], row[:2] + row[2:4]]), row[4:14].reshape(5, 2))
            for row in (rows if rows is not None else ())
        ]


def load_detector(path: Path) -> Detector:
    """The detector in an ONNX file; ConfigError when it is none."""
    session = open_onnx(path)
    outputs = [output.name for output in session.get_outputs()]
    if "cls_8" in outputs:
        return YuNet(path)
    if len(outputs) in (9, 15):
        return Scrfd(session)
    raise ConfigError(
        f"{path} is no face detector with five points: it has {len(outputs)} outputs. SCRFD has 9 or 15 (take a file with "
        "key points, such as det_10g.onnx or scrfd_10g_bnkps.onnx), YuNet has cls_8 and its like."
    )


def open_onnx(path: Path) -> Any:
    """An onnxruntime session on the CPU; errors name the file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("Face models need onnxruntime: pip install 'smidgen[faces]'") from error
    if not path.is_file():
        from smidgen.errors import did_you_mean

        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"There is no file {path}.{did_you_mean(path.name, near)}")
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class below Exception
        raise ConfigError(f"{path} is no ONNX model that onnxruntime reads: {str(error).splitlines()[0]}") from error


def open_cv() -> Any:
    """The module cv2."""
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("Finding faces needs OpenCV: pip install 'smidgen[faces]'") from error
    return cv2


def _one_each(found: list[tuple[float, Face]]) -> list[Face]:
    """The likeliest of boxes that overlap."""
    boxes = [[*face.box[:2], *(face.box[2:] - face.box[:2])] for _, face in found]
    kept = open_cv().dnn.NMSBoxes(boxes, [score for score, _ in found], SURE, OVERLAP) if found else ()
    return [found[at][1] for at in kept]
