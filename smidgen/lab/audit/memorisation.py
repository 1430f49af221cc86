"""Are generated adapters copies of training ones? After arXiv 2506.07998, which found that weight generators replicate or
interpolate the checkpoints they were trained on.

In two spaces, the deltas s B A and their whitened principal components: how near is a generated adapter, of a
held-out photo, to its nearest training adapter, beside how near held-out people's own trained adapters are, and training
adapters among each other? A copy lies nearer than any other person does (and has a small d1 / d2, nearest over second
nearest). The pictures are asked too: do they look more like the nearest training identity than like the person?
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.lab.audit.contenders import Simple
from smidgen.lab.audit.distances import DeltaComponents, comparable, distances, entries, nearest
from smidgen.lab.audit.learned import Predicted
from smidgen.lab.audit.plots import distance_plot, weights_plot
from smidgen.lab.audit.scores import Score
from smidgen.lab.audit.statistics import bootstrap
from smidgen.lab.statistics import Interval
from smidgen.tasks.cards import table

COMPONENTS = 64  # in all n - 1 principal components n training adapters are equally far from each other
OWN = 512  # training photos whose predictions are compared
WEIGHTS = 64  # entries of an adapter's deltas in the picture


@dataclass(frozen=True)
class Spread:
    """Distances to the nearest training adapter, and to it over to the second nearest: 5, 50 and 95 %."""

    nearest: tuple[float, float, float]
    ratio: tuple[float, float, float]
    count: int


@dataclass(frozen=True)
class Memorised:
    """What was found of one generator.

    ``spaces``: space -> who -> how near. ``like_neighbour``: share of people whose pictures look more like the training
    identity nearest in weights than like them, for the generator and for the zoo's own trained adapters.
    """

    name: str
    spaces: Mapping[str, Mapping[str, Spread]]
    like_neighbour: Mapping[str, Interval]
    notes: tuple[str, ...] = ()


def spread(found: Tensor, own: bool = False) -> Spread:
    """Of distances [n, training]; ``own``: n are the training adapters themselves.

    Example:
        >>> spread(torch.tensor([[1.0, 2.0, 4.0]])).ratio
        (0.5, 0.5, 0.5)
    """
    values, _ = nearest(found, 2, own)
    ratios = values[:, 0] / values[:, -1].clamp(min=1e-30)
    return Spread(_percentiles(values[:, 0]), _percentiles(ratios), len(found))


def memorised(simple: Simple, predicted: Predicted, scores: Mapping[str, Sequence[Score]]) -> Memorised:
    """Measures one generator; the zoo's people are those of ``simple``."""
    zoo, layout = simple.zoo, predicted.generator.layout
    assert predicted.made.rows is not None
    generated = predicted.made.rows[0]
    training = simple.training
    held = simple.trained()
    spaces: dict[str, dict[str, Spread]] = {}
    notes = []
    if comparable(layout, zoo.layout):
        among = distances(training, zoo.layout, training, zoo.layout)
        spaces["deltas of the weights"] = {
            "training to training": spread(among, own=True),
            "held-out trained to training": spread(distances(held, zoo.layout, training, zoo.layout)),
            "generated to training": spread(distances(generated, layout, training, zoo.layout)),
        }
        components = DeltaComponents(training, zoo.layout, min(COMPONENTS, len(training) // 4))
        white = [components.whitened(rows, zoo.layout) for rows in (training, held)]
        spaces[f"first {len(components)} principal components of the deltas, whitened"] = {
            "training to training": spread(torch.cdist(white[0], white[0]), own=True),
            "held-out trained to training": spread(torch.cdist(white[1], white[0])),
            "generated to training": spread(torch.cdist(components.whitened(generated, layout), white[0])),
        }
    else:
        notes.append(
            "Its adapters are of another family than the zoo's, so their weights cannot be compared with them."
        )
    mine = predicted.of_photos(simple.photos)[:OWN]
    spaces["the generator's own predictions, deltas"] = {
        "of training photos, among each other": spread(distances(mine, layout, mine, layout), own=True),
        "of held-out photos, to those": spread(distances(generated, layout, mine, layout)),
    }
    wanted = {name: scores[name] for name in (predicted.name, "zoo's trained adapter") if name in scores}
    alike = {name: like_neighbour(lines) for name, lines in wanted.items() if lines[0].neighbour_identity is not None}
    return Memorised(predicted.name, spaces, alike, tuple(notes))


def like_neighbour(lines: Sequence[Score]) -> Interval:
    """Share of people whose pictures are likelier the neighbour than the person."""
    return bootstrap([float((line.neighbour_identity or 0.0) > line.identity) for line in lines])


def write_memorisation(found: Sequence[Memorised], simple: Simple, predicted: Sequence[Predicted], out: Path) -> str:
    """Writes ``memorisation.json`` and its figures into ``out``; returns its part of the report."""
    replace_file(out / "memorisation.json", json.dumps([as_json(one) for one in found], indent=1))
    for number, (one, own) in enumerate(zip(found, predicted, strict=True)):
        distance_plot(one, out / f"memorisation-{number}.png")
        weights_plot(*side_by_side(simple, own), out / f"weights-{number}.png")
    return "\n\n".join(["## Copies?", *(as_markdown(one, number, out) for number, one in enumerate(found))])


def side_by_side(simple: Simple, predicted: Predicted) -> tuple[Tensor, Tensor, list[str]]:
    """Some entries [64] of the deltas of the first sitter's generated adapter, those [3, 64] of the three nearest training
    adapters (of another family: of the nearest predictions for training photos), and their names."""
    assert predicted.made.rows is not None
    row, layout, names = predicted.made.rows[0, :1], predicted.generator.layout, list(simple.rows.ids)
    others, theirs = simple.training, simple.zoo.layout
    if not comparable(layout, theirs):
        others, theirs = predicted.of_photos(simple.photos), layout
        names = [f"prediction for {name}" for name in simple.photos.ids]
    places = nearest(distances(row, layout, others, theirs), 3)[1][0].tolist()
    shown = [entries(rows, own, WEIGHTS) for rows, own in ((row, layout), (others[places], theirs))]
    return shown[0][0], shown[1], [names[place] for place in places]


def as_json(found: Memorised) -> dict[str, Any]:
    """As plain numbers."""
    spaces = {name: {who: vars(one) for who, one in rows.items()} for name, rows in found.spaces.items()}
    alike = {name: vars(value) for name, value in found.like_neighbour.items()}
    return {"generator": found.name, "spaces": spaces, "like_neighbour": alike, "notes": list(found.notes)}


def as_markdown(found: Memorised, number: int, out: Path) -> str:
    """As a table."""
    head = ["space", "who", "nearest 5 / 50 / 95 %", "d1 / d2 5 / 50 / 95 %", "adapters"]
    rows = [
        [space, who, _three(one.nearest), _three(one.ratio), f"{one.count:,}"]
        for space, people in found.spaces.items()
        for who, one in people.items()
    ]
    alike = [
        f"Pictures of {name} that look more like the training identity nearest in weights than like the person: "
        f"{_share(value)} of people."
        for name, value in found.like_neighbour.items()
    ]
    pictures = [
        f"![]({name})" for name in (f"memorisation-{number}.png", f"weights-{number}.png") if (out / name).exists()
    ]
    return "\n\n".join([f"### {found.name}", table(head, rows, left=2), *alike, *found.notes, *pictures])


def _percentiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return low, middle, high


def _three(values: tuple[float, float, float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def _share(value: Interval) -> str:
    low, high = (
        (value.low, value.high) if value.low is not None and value.high is not None else (value.mean, value.mean)
    )
    return f"{100 * value.mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
