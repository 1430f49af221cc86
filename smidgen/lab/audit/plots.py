"""Figures of the memorisation report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smidgen.tasks.png import write_figure

if TYPE_CHECKING:
    from smidgen.lab.audit.memorisation import Memorised


def distance_plot(found: Memorised, path: Path) -> Path:
    """Distances to the nearest training adapter, 5 to 95 % with the median, a panel for each space."""
    figure = _figure(8, 0.6 + 1.1 * len(found.spaces))
    panels = figure.subplots(len(found.spaces), 1, squeeze=False)[:, 0]
    for axes, (space, people) in zip(panels, found.spaces.items(), strict=True):
        for place, (color, one) in enumerate(zip(("C0", "C1", "C2"), people.values(), strict=False)):
            low, middle, high = one.nearest
            axes.plot([low, high], [-place, -place], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot([middle], [-place], "o", color=color)
        axes.set(
            yticks=[-place for place in range(len(people))], yticklabels=list(people), ylim=(0.5 - len(people), 0.5)
        )
        axes.set_title(f"distance to the nearest, {space}", fontsize=8)
        axes.tick_params(labelsize=7)
    return write_figure(figure, path, {"shows": "distances to the nearest training adapter"})


def weights_plot(row: Tensor, others: Tensor, names: Sequence[str], path: Path) -> Path:
    """Numbers [n] of a generated adapter beside those [k, n] of the nearest training ones."""
    figure = _figure(8, 2.4)
    axes = figure.subplots()
    for name, values in zip(names, others, strict=True):
        axes.plot(values.tolist(), linewidth=0.8, label=f"nearest: {name}")
    axes.plot(row.tolist(), ".", color="black", label="generated")
    axes.set_xlabel(f"{len(row)} entries of the deltas, chosen at random", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return write_figure(figure, path, {"shows": "entries of a generated adapter and of the nearest"})


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)
