"""Contact sheets: rows of pictures under labelled columns, and the loss plot. Pillow alone, so no fonts to install."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from smidgen.tasks.png import write_figure

GAP, LABEL = 6, 118  # pixels between pictures; width of the row labels
INK, FAINT, PAPER = "#222222", "#777777", "#ffffff"


@dataclass(frozen=True)
class Row:
    """One labelled row of a sheet. ``note`` is a second, fainter line under the label."""

    label: str
    images: Sequence[Image.Image]
    note: str = ""


def contact_sheet(title: str, rows: Sequence[Row], columns: Sequence[str] = (), cell: int = 0) -> Image.Image:
    """A sheet of ``rows``, with ``columns`` written over the rows after the first (the subject's own pictures).

    ``cell`` is the longer side of a picture on the sheet in pixels (0: small pictures doubled, large ones shrunk to 256).
    """
    side = cell or _cell([image for row in rows for image in row.images])
    across = max(len(row.images) for row in rows)
    heads = [_wrapped(column, side) for column in columns]
    head = 16 * max((text.count("\n") + 1 for text in heads), default=0) + (GAP if heads else 0)
    width = LABEL + across * (side + GAP) + GAP
    sheet = Image.new("RGB", (width, 34 + head + len(rows) * (side + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 8), title, fill=INK, font=_font(15))
    top = 34
    for number, row in enumerate(rows):
        if number == min(1, len(rows) - 1) and heads:
            for column, text in enumerate(heads):
                pen.multiline_text((_left(column, side), top), text, fill=FAINT, font=_font(11), spacing=2)
            top += head
        _draw_row(sheet, pen, row, top, side)
        top += side + GAP
    return sheet


def loss_plot(curves: dict[str, Sequence[float]], path: Path, window: int = 25) -> Path:
    """Plot loss against step for each named run: every step faintly, the mean of ``window`` steps over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, losses) in enumerate(curves.items()):
        color, steps = f"C{number}", range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(losses, window), color=color, label=name)
    axes.set(xlabel="step", ylabel="loss", title=f"training loss (bold: mean of {window} steps)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return write_figure(figure, path, {"shows": "training loss", "runs": list(curves)})


def _draw_row(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, top: int, side: int) -> None:
    label = _wrapped(row.label, LABEL - GAP)
    pen.multiline_text((GAP, top + 4), label, fill=INK, font=_font(13), spacing=2)
    below = top + 4 + 17 * (label.count("\n") + 1) + 2
    pen.multiline_text((GAP, below), _wrapped(row.note, LABEL - GAP), fill=FAINT, font=_font(11), spacing=2)
    for column, image in enumerate(row.images):
        longer = max(image.size)
        filter = Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS
        width, height = (max(1, round(own * side / longer)) for own in image.size)
        place = _left(column, side) + (side - width) // 2, top + (side - height) // 2
        sheet.paste(image.convert("RGB").resize((width, height), filter), place)


def _left(column: int, side: int) -> int:
    return LABEL + column * (side + GAP)


def _cell(images: Sequence[Image.Image]) -> int:
    size = max(max(image.size) for image in images)
    return size * max(1, 128 // size) if size <= 128 else min(size, 256)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, max(8, int(width / 5.9)))) if text else ""


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    return ImageFont.load_default(size)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]
