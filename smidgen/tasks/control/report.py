"""What a control training says at its end: a table, report.json, and a model card that others can draw from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.tuner.coverage import Coverage
from smidgen.tasks.cards import adapter_head, covered, licence, model_card, table

NAMES = {"iou": "edge IoU", "f1": "edge F1", "f1_1px": "edge F1 within 1 px", "miou": "mIoU", "aacc": "aACC"}
NAMES |= {"landmarks": "landmark error, px"}
NOT_SCORED = (
    "Parts and landmarks can be scored on the embedded base only, whose reader ships with Smidgen; other bases need a "
    "reader of your own, see docs/control.md."
)


@dataclass(frozen=True)
class Line:
    """One line of the table: who drew, how far the control was followed, and what was trained for it."""

    name: str
    scores: Mapping[str, float]
    numbers: int = 0
    hint_numbers: int = 0
    bytes_on_disk: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class ControlReport:
    """The result of one control training; ``lines`` holds the real pictures, the base and the adapter."""

    method: str
    base: str
    control: str
    adapter: Path
    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    coverage: Coverage | None = None

    def table(self) -> str:
        """The lines as a table for a terminal or a model card (GitHub Markdown)."""
        measured = list(self.lines[-1].scores)
        head = ["", "adapter's numbers", "hint encoder's", "bytes on disk", *(NAMES[name] for name in measured)]
        rows = []
        for line in self.lines:
            sizes = [f"{value:,}" for value in (line.numbers, line.hint_numbers, line.bytes_on_disk)]
            rows.append([line.name, *sizes, *(f"{line.scores[name]:.3f}" for name in measured)])
        return table(head, rows)


def card(report: ControlReport, prompt: str) -> str:
    """README.md of an adapter folder that follows control pictures."""
    base = public_name(report.base)
    use = f"""`smidgen generate FOLDER --base {base} --control PICTURE --prompt "{prompt}"`

```python
from pathlib import Path
from smidgen.tasks.drawing import generate

generate(Path("path/of/this/folder"), [{prompt!r}], base={base!r}, control=Path("control.png"))
```

The hint encoder is saved with the adapter; `hint_config.json` says how it is built."""
    notes = [*report.notes, *([] if report.lines[-1].scores else [NOT_SCORED])]
    return model_card(
        adapter_head(base, "text-to-image", "control", report.control),
        f"{report.control} control: a {report.method} adapter with its hint encoder",
        f"It makes `{base}` follow control pictures ({report.control}). Made with Smidgen.",
        "![rows: control picture, real picture, base without control, this adapter](contact_sheet.png)",
        ("Use", use),
        ("Measured on pictures kept from training", "\n\n".join([report.table(), "\n".join(notes)])),
        covered(report.coverage),
        licence(base, "pictures"),
    )
