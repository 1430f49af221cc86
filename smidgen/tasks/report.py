"""What a personalisation says at its end: a table, report.json, and a model card that others can load from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smidgen.bases.families import card_lines
from smidgen.training.checkpoints import replace_file


@dataclass(frozen=True)
class Entry:
    """One line of the table. None means not measured; scores are 1 at best; ``details`` are whatever else a judge
    says."""

    name: str
    trained_numbers: int
    bytes_on_disk: int
    seconds: float | None = None
    identity: float | None = None
    caption: float | None = None
    final_loss: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The result of one personalisation; ``entries`` holds base, adapter, and what it was compared with."""

    method: str
    base: str
    adapter: Path
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verified: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        """The adapter's own line."""
        return self.entries[1]

    def as_json(self) -> str:
        """Everything but local paths."""
        values = {"method": self.method, "base": public_name(self.base), "verified": self.verified}
        values |= {"entries": [asdict(entry) for entry in self.entries]}
        values |= {"warnings": list(self.warnings), "notes": list(self.notes), "settings": dict(self.settings)}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The entries as a table for a terminal or a model card (GitHub Markdown)."""
        head = ["", "numbers trained", "bytes on disk", "seconds", "identity", "captions"]
        return markdown_table(head, [_cells(entry) for entry in self.entries])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns line up; the first ``left`` columns to the left, the others to the right."""
    widths = [max(3, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]
    sides = [str.ljust] * left + [str.rjust] * (len(head) - left)
    lines = [[side(c, w) for side, c, w in zip(sides, row, widths, strict=True)] for row in (head, *rows)]
    rule = ["-" * width if number < left else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def public_name(base: str) -> str:
    """A base's name without the path it lies under: files that travel do not tell about this machine."""
    path = Path(base).expanduser()
    return path.name if path.is_absolute() or path.is_dir() else base


def front_matter(base: str, *tags: str) -> str:
    """The YAML head of the card of an adapter for the text-to-image base that is publicly called ``base``."""
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-to-image
license: other
license_name: same-as-base-model
tags: [smidgen, {", ".join(tags)}, text-to-image, diffusers]
---"""


def model_card(report: Report, prompts: Sequence[str], subject: str) -> str:
    """README.md of an adapter folder. ``subject`` is the words that call the subject up."""
    base, entry = public_name(report.base), report.entry
    loaded, sampling = card_lines(base)
    pipeline = f"DiffusionPipeline.from_pretrained({loaded})"
    examples = "\n".join(f"- `{prompt}`" for prompt in prompts[:4])
    return f"""{front_matter(base, report.method)}

# {subject}: a {report.method} adapter of {entry.bytes_on_disk:,} bytes

{entry.trained_numbers:,} trained numbers put one subject into `{base}`. Made with Smidgen.

![rows: the subject, the base, this adapter](contact_sheet.png)

## Use

Say **{subject}** in the prompt, for example:

{examples}

```python
import smidgen
from diffusers import DiffusionPipeline

pipe = {pipeline}
smidgen.load(pipe.unet, "path/of/this/folder")
prompt = {(prompts[0] if prompts else subject)!r}
pipe(prompt{sampling}).images[0]
```

`smidgen verify FOLDER --base BASE` proves that it is on. The files are ordinary peft (`adapter_config.json`,
`adapter_model.safetensors`); after `import smidgen`, `peft.PeftModel.from_pretrained(unet, folder)` reads them too.

## Measured

{report.table()}

{chr(10).join(report.notes)}

## Licence

The adapter stands under the licence of its base model `{base}`; whoever shares it also needs the right to the pictures
it was trained on. Do not use it to deceive anybody about a real person.
"""


def write_report(folder: Path, report: Report, card: str) -> None:
    """report.json and README.md, each in one step."""
    replace_file(folder / "report.json", report.as_json())
    replace_file(folder / "README.md", card)


def _cells(entry: Entry) -> list[str]:
    scores = [f"{value:.3f}" if value is not None else "-" for value in (entry.identity, entry.caption)]
    seconds = f"{entry.seconds:.0f}" if entry.seconds is not None else "-"
    return [entry.name, f"{entry.trained_numbers:,}", f"{entry.bytes_on_disk:,}", seconds, *scores]
