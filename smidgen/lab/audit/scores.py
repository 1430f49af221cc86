"""The audit's scores on disk: a line for each contender and sitter, so that what was drawn is not drawn again.

scores.parquet     contender, key (hash of all that decides the line), person, scores, cost
shown/KEY.png      the first sitters' first scene, for the contact sheet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.zoo.tables import read_parquet, to_parquet
from smidgen.errors import DataError
from smidgen.tasks.png import write_png

if TYPE_CHECKING:
    from PIL.Image import Image

TABLE = "scores.parquet"
SHOWN = 8  # sitters on the contact sheet


@dataclass(frozen=True)
class Score:
    """One contender's adapters of one sitter, means over scenes and chance.

    ``identity``, ``caption``, ``traits`` are the judge's; ``moved`` and ``unrelated`` are how far pixels are from the
    base's pictures from the same noise (scenes, unrelated prompts) and ``diversity`` how far from each other those of
    different seeds are, as shares of the pixels' range. ``neighbour`` is the training identity nearest in weights and
    ``neighbour_identity`` how much the pictures look like it. ``seconds`` are processor seconds for one adapter.
    """

    contender: str
    key: str
    person: str
    identity: float
    caption: float | None = None
    traits: float | None = None
    moved: float | None = None
    unrelated: float | None = None
    diversity: float | None = None
    neighbour: str = ""
    neighbour_identity: float | None = None
    seconds: float = 0.0
    numbers: int = 0
    bytes: int = 0


class Scores:
    """All lines in ``folder``; those of a contender are written at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: dict[str, list[Score]] = {}
        if (folder / TABLE).exists():
            columns = read_parquet(folder / TABLE)
            if set(columns) != set(Score.__dataclass_fields__):
                raise DataError(f"{folder / TABLE} has other columns than this version writes; choose another --out.")
            for values in zip(*columns.values(), strict=True):
                line = Score(**dict(zip(columns, values, strict=True)))
                self.lines.setdefault(line.key, []).append(line)

    def add(self, lines: Sequence[Score], pictures: Sequence[Image]) -> None:
        """Writes a contender's lines, and one picture of each of the first sitters."""
        write_png(beside_each_other(pictures[:SHOWN]), self.picture(lines[0].key), {"shows": "what a contender drew"})
        self.lines[lines[0].key] = list(lines)
        everything = [line for own in self.lines.values() for line in own]
        replace_file(self.folder / TABLE, to_parquet(everything))

    def has(self, key: str) -> bool:
        """Whether a contender was scored under exactly these conditions."""
        return key in self.lines and self.picture(key).exists()

    def picture(self, key: str) -> Path:
        return self.folder / "shown" / f"{key}.png"

    def shown(self, key: str) -> list[Image]:
        """The pictures that were kept for the contact sheet."""
        from PIL import Image

        with Image.open(self.picture(key)) as strip:
            side, whole = strip.height, strip.convert("RGB")
        return [whole.crop((left, 0, left + side, side)) for left in range(0, whole.width, side)]


def key_of(*decides: Any) -> str:
    """A short hash of everything that decides a contender's lines."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def beside_each_other(pictures: Sequence[Image]) -> Image:
    """Pictures of one size in a strip."""
    from PIL import Image

    side = pictures[0].height
    strip = Image.new("RGB", (side * len(pictures), side))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (side * number, 0))
    return strip
