"""What a personalisation says at its end: a table, report.json, and a model card that others can load from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.tuner.coverage import Coverage
from smidgen.bases.families import card_lines
from smidgen.tasks.cards import adapter_head, bullets, covered, licence, model_card, table


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
    coverage: Coverage | None = None
    base_config: str | None = None

    @property
    def entry(self) -> Entry:
        """The adapter's own line."""
        return self.entries[1]

    def table(self) -> str:
        """The entries as a table for a terminal or a model card (GitHub Markdown)."""
        head = ["", "numbers trained", "bytes on disk", "seconds", "identity", "captions"]
        return table(head, [_cells(entry) for entry in self.entries])


def card(report: Report, prompts: Sequence[str], subject: str) -> str:
    """README.md of an adapter folder. ``subject`` is the words that call the subject up."""
    base, entry = public_name(report.base), report.entry
    loaded, sampling = card_lines(base, report.base_config and public_name(report.base_config))
    use = f"""Say **{subject}** in the prompt, for example:

{bullets(f"`{prompt}`" for prompt in prompts[:4])}

```python
import smidgen
{loaded}
smidgen.load(pipe, "path/of/this/folder")
prompt = {(prompts[0] if prompts else subject)!r}
pipe(prompt=prompt{sampling}).images[0]
```

`smidgen verify FOLDER --base BASE` proves that it is on. The files are ordinary peft (`adapter_config.json`,
`adapter_model.safetensors`); after `import smidgen`, `peft.PeftModel.from_pretrained(denoiser, folder)` reads them too."""
    return model_card(
        adapter_head(base, "text-to-image", report.method),
        f"{subject}: a {report.method} adapter of {entry.bytes_on_disk:,} bytes",
        f"{entry.trained_numbers:,} trained numbers put one subject into `{base}`. Made with Smidgen.",
        "![rows: the subject, the base, this adapter](contact_sheet.png)",
        ("Use", use),
        ("Measured", "\n\n".join([report.table(), "\n".join(report.notes)])),
        covered(report.coverage),
        licence(base, "pictures", "Do not use it to deceive anybody about a real person."),
    )


def _cells(entry: Entry) -> list[str]:
    scores = [f"{value:.3f}" if value is not None else "-" for value in (entry.identity, entry.caption)]
    seconds = f"{entry.seconds:.0f}" if entry.seconds is not None else "-"
    return [entry.name, f"{entry.trained_numbers:,}", f"{entry.bytes_on_disk:,}", seconds, *scores]
