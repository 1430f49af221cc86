"""The PNG files that Smidgen writes. Each carries a mark, so that no reader of training data ever takes it for a picture
of the subject. What is drawn to be trained on (``smidgen subject``, ``smidgen pairs``, packaged data) carries none."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.adapters.atomic import replace_file

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "Software"  # the PNG keyword of who wrote a file
OURS = f"smidgen {version('smidgen')}"


def write_png(image: Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Write ``image`` as a PNG in one step, with the mark and the further ``text`` chunks (keyword -> text)."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, value in {MARK: OURS, **(text or {})}.items():
        info.add_text(key, value.encode("utf-8", "replace").decode())
    image.save(buffer, "PNG", pnginfo=info)
    replace_file(path, buffer.getvalue())
    return path


def write_figure(figure: Any, path: Path) -> Path:
    """Write a Matplotlib ``figure`` as a PNG in one step, with the mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={MARK: OURS})
    replace_file(path, buffer.getvalue())
    return path


def is_ours(image: Image) -> bool:
    """Whether an opened picture carries the mark."""
    return str(image.info.get(MARK, "")).startswith("smidgen")
