"""The quality-per-byte plot: test loss against bytes, with the front of peft's methods and of ours as steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.errors import MissingExtraError
from smidgen.lab.compare.table import Results, Row
from smidgen.lab.statistics import Point, front, interval
from smidgen.tasks.png import write_figure

COLOURS = {"ours": "#c2410c", "peft": "#1d4ed8"}
NAMES = {"ours": "smidgen", "peft": "peft"}


def draw_plot(results: Results, path: Path) -> None:
    """Write the plot as PNG. Full fine-tuning and the linear probe are lines: the ceiling and the floor of the task."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("The plot needs matplotlib: pip install 'smidgen[tasks]'") from error
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    most = max((row.bytes for row in results.family("ours", "peft")), default=1)
    for family, colour in COLOURS.items():
        rows = results.family(family)
        _steps(axes, [row.point for row in rows], colour, NAMES[family], most)
        for row in rows:
            _point(axes, row, colour, "o" if family == "ours" else "s")
    _labels(axes, results.family("ours", "peft"))
    for row, dashes in zip(results.family("control"), ("--", ":"), strict=False):
        axes.axhline(row.loss, color="0.45", linestyle=dashes, linewidth=1, label=row.method.name)
    axes.set(xscale="log", xlabel="bytes of the stored adapter, without the head")
    axes.set(ylabel="test loss, nats: mean and 95 % interval over seeds")
    axes.set_title(results.experiment.title or results.experiment.name)
    _frame(axes, results)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=9, loc="best")
    write_figure(figure, path, {"shows": "loss against bytes", "experiment": results.experiment.name})


def _frame(axes: Any, results: Results) -> None:
    """Keep to the means: with two or three seeds the widest intervals would flatten everything else."""
    means = [row.loss for row in results.rows if row.losses]
    margin = 0.35 * (max(means) - min(means)) or 0.05
    axes.set_ylim(min(means) - margin, max(means) + margin)


def _steps(axes: Any, points: Sequence[Point], colour: str, name: str, most: int) -> None:
    found = front(points)
    if found:
        sizes = [*(point.bytes for point in found), max(most, found[-1].bytes) * 1.3]
        losses = [float(np.mean(list(point.losses.values()))) for point in found]
        axes.step(sizes, [*losses, losses[-1]], where="post", color=colour, linewidth=1.8, label=f"{name}: front")


def _point(axes: Any, row: Row, colour: str, marker: str) -> None:
    found = interval([float(losses.mean()) for losses in row.losses.values()])
    bar = None if found.low is None else [[found.half], [found.half]]
    style = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 2, "elinewidth": 0.7, "alpha": 0.9}
    axes.errorbar(row.bytes, found.mean, bar, **style)


def _labels(axes: Any, rows: Sequence[Row]) -> None:
    """Names beside their points, above and below in turn so that neighbours stay legible."""
    for number, row in enumerate(sorted(rows, key=lambda row: row.bytes)):
        place = {
            "xytext": (4, 5) if number % 2 == 0 else (4, -11),
            "textcoords": "offset points",
            "fontsize": 7,
            "color": COLOURS[row.method.family],
        }
        axes.annotate(row.name, (row.bytes, row.loss), **place)
