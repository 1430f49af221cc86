"""What an audit found, as a table, as JSON and as a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from smidgen.adapters.atomic import replace_file
from smidgen.lab.audit.scores import SHOWN, Score
from smidgen.lab.audit.settings import EvaluateConfig
from smidgen.lab.audit.statistics import bootstrap, paired, ratio
from smidgen.lab.statistics import Interval
from smidgen.tasks import cards
from smidgen.tasks.contact_sheet import Row, contact_sheet
from smidgen.tasks.png import write_png
from smidgen.training.settings import to_dict

if TYPE_CHECKING:
    from PIL.Image import Image

BASE, REAL, PERSONAL = "base model", "real photo", "trained on the same photo"
HEAD = (
    "contender", "identity", "DiffLoRA minus it", "of trained on the photo", "caption", "traits", "diversity", "moved",
    "unrelated", "seconds", "numbers", "bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A contender's figures: intervals are over people, ``caption`` is in points above the base, ``ahead`` the first
    generator's identity minus this one's, ``share`` this one's identity over that of the adapter trained on the photo."""

    name: str
    identity: Interval
    ahead: Interval | None
    share: Interval | None
    caption: Interval | None
    traits: float | None
    diversity: float | None
    moved: float | None
    unrelated: float | None
    seconds: float
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """An audit: who was judged by whom, and the lines of every contender in the order of the table."""

    zoo: Path
    config: EvaluateConfig
    judge: str
    first: str
    scores: Mapping[str, Sequence[Score]]
    shown: Mapping[str, Sequence[Image]]
    notes: tuple[str, ...] = ()

    @property
    def people(self) -> list[str]:
        return [line.person for line in next(iter(self.scores.values()))]

    def lines(self) -> list[Line]:
        """The table."""
        return [self._line(name) for name in self.scores]

    def values(self, name: str, figure: str = "identity") -> list[float]:
        """A contender's figure, person by person; empty when it has none."""
        found = [getattr(line, figure) for line in self.scores[name]]
        return [] if any(value is None for value in found) else found

    def __str__(self) -> str:
        return table(self.lines())

    def _line(self, name: str) -> Line:
        own, first = self.values(name), self.values(self.first)
        captions, base = self.values(name, "caption"), self.values(BASE, "caption")
        personal = self.values(PERSONAL) if PERSONAL in self.scores else []
        one = self.scores[name][0]
        means = {
            f: mean(v) if (v := self.values(name, f)) else None for f in ("traits", "diversity", "moved", "unrelated")
        }
        return Line(
            name,
            bootstrap(own),
            paired(first, own) if name != self.first else None,
            ratio(own, personal) if personal and name not in (PERSONAL, REAL) else None,
            paired([100 * value for value in captions], [100 * value for value in base]) if captions else None,
            **means,
            seconds=one.seconds,
            numbers=one.numbers,
            bytes=one.bytes,
        )


def write_report(report: Report, out: Path) -> Report:
    """Writes ``report.json``, ``report.md`` and ``contact_sheet.png`` into ``out``, each in one step; returns the report."""
    replace_file(out / "report.json", json.dumps(as_json(report), indent=1))
    replace_file(out / "report.md", as_markdown(report))
    facts = {"shows": "the same scene with every contender", "generator": report.first, "zoo": report.zoo.name}
    write_png(sheet(report), out / "contact_sheet.png", facts)
    return report


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain numbers."""
    lines = [
        {name: vars(value) if isinstance(value, Interval) else value for name, value in vars(line).items()}
        for line in report.lines()
    ]
    told = {"zoo": report.zoo.name, "judge": report.judge, "people": len(report.people), "generator": report.first}
    settings = {name: value for name, value in to_dict(report.config).items() if name != "out"}
    return told | {"settings": settings, "contenders": lines, "notes": list(report.notes)}


def as_markdown(report: Report) -> str:
    """The table with what has to be known to read it."""
    config, drawing = report.config, report.config.drawing
    return cards.page(
        f"Audit of {report.first}",
        f"{len(report.people)} held-out people of `{report.zoo.name}`, {config.photos} photo each, {drawing.scenes} scenes of "
        f"{drawing.inference_steps} steps at guidance {drawing.guidance_scale:g}, the same noise for all; judged by "
        f"{report.judge} against the person's other pictures. Brackets: 95 % bootstrap over people.",
        table(report.lines()),
        "caption: points above the base. diversity, moved, unrelated: mean change of pixels in % of their range, between "
        "adapters of different seeds, against the base on the scenes, and against the base on prompts that name no "
        "person. seconds: of one processor core, for one adapter.",
        *report.notes,
        "![the same scene with every contender](contact_sheet.png)",
    )


def table(lines: Sequence[Line]) -> str:
    """Lines as a Markdown table."""
    rows = []
    for line in lines:
        percents = [_percent(value) for value in (line.diversity, line.moved, line.unrelated)]
        cost = [f"{line.seconds:.3g}", f"{line.numbers:,}", f"{line.bytes:,}"] if line.numbers else ["-", "-", "-"]
        traits = "-" if line.traits is None else f"{line.traits:.2f}"
        shown = (_told(line.identity), _told(line.ahead), _told(line.share, 2), _told(line.caption, 1), traits)
        rows.append((line.name, *shown, *percents, *cost))
    return cards.table(HEAD, rows)


def sheet(report: Report) -> Image:
    """One scene of the first people with every contender, a row each."""
    rows = [
        Row(name, list(report.shown[name]), f"identity {mean(report.values(name)[:SHOWN]):.2f}" if name != REAL else "")
        for name in report.scores
    ]
    return contact_sheet("the same scene and noise for all", rows, report.people[:SHOWN])


def _told(value: Interval | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
