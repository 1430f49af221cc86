"""How far a drawn picture follows its control: edges, parts and landmarks, as in OFT and TLoRA.

canny     IoU and F1 of edge pixels over all pictures (scikit-learn), and F1 within one pixel
segments  mIoU: intersection over union of each class over all pictures, averaged over the classes that were asked
          for; aACC: share of pixels of the right class (scikit-learn)
points    mean distance of landmarks in pixels
"""

import numpy as np
from numpy.typing import NDArray

from smidgen.errors import DataError, MissingExtraError


def edge_scores(found: NDArray, wanted: NDArray) -> dict[str, float]:
    """Edge maps [picture, height, width] (nonzero is an edge) -> ``iou``, ``f1``, and ``f1_1px``.

    For ``f1_1px`` a pixel is right when the other map has an edge on it or on one of its eight neighbours.
    """
    sklearn = _metrics()
    _same(found, wanted)
    found, wanted = found > 0, wanted > 0
    flat = wanted.ravel(), found.ravel()
    precision = _share(found, _thick(wanted))
    recall = _share(wanted, _thick(found))
    near = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    options = {"zero_division": 0.0}
    iou, f1 = sklearn.jaccard_score(*flat, **options), sklearn.f1_score(*flat, **options)
    return {"iou": float(iou), "f1": float(f1), "f1_1px": near}


def miou(found: NDArray, wanted: NDArray, classes: int) -> float:
    """Mean over the classes in ``wanted`` of intersection over union, counted over all pictures."""
    _same(found, wanted)
    matrix = _metrics().confusion_matrix(wanted.ravel(), found.ravel(), labels=range(classes))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    asked = matrix.sum(1) > 0
    return float((matrix.diagonal()[asked] / union[asked]).mean())


def aacc(found: NDArray, wanted: NDArray) -> float:
    """Share of pixels of the right class."""
    _same(found, wanted)
    return float(_metrics().accuracy_score(wanted.ravel(), found.ravel()))


def landmark_error(found: NDArray, wanted: NDArray) -> float:
    """Mean Euclidean distance of landmarks [picture, landmark, 2], in their own unit (pixels)."""
    _same(found, wanted)
    return float(np.linalg.norm(found - wanted, axis=-1).mean())


def _thick(edges: NDArray) -> NDArray:
    """Edges and their eight neighbours."""
    padded = np.pad(edges, ((0, 0), (1, 1), (1, 1)))
    height, width = edges.shape[1:]
    return np.logical_or.reduce([padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _share(pixels: NDArray, inside: NDArray) -> float:
    return float((pixels & inside).sum() / pixels.sum()) if pixels.any() else 0.0


def _same(found: NDArray, wanted: NDArray) -> None:
    if found.shape != wanted.shape or not found.size:
        raise DataError(
            f"What was drawn {found.shape} and what was asked {wanted.shape} must have one shape, not empty."
        )


def _metrics():
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError("Scoring control needs scikit-learn: pip install 'smidgen[control]'") from error
    return metrics
