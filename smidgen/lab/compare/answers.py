"""Answers of a method on a test set as short text in a cell: fp32 numbers, deflated, in base 64."""

import base64
import zlib

import numpy as np


def to_text(values: np.ndarray) -> str:
    """Values [example] as text."""
    return base64.b64encode(zlib.compress(np.asarray(values, dtype="<f4").tobytes(), 9)).decode()


def from_text(text: str) -> np.ndarray:
    """Inverse of :func:`to_text`.

    Example:
        >>> from_text(to_text(np.array([0.5, 1.0]))).tolist()
        [0.5, 1.0]
    """
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").astype(np.float64)
