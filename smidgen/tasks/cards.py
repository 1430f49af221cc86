"""Markdown pages, written in one place: tables, model cards, and the report.json beside them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.tuner.coverage import Coverage

Part = str | tuple[str, str]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table whose columns line up; the first ``left`` columns to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(head) - left)
    lines = [[side(c, w) for side, c, w in zip(sides, line, widths, strict=True)] for line in lines]
    rule = ["-" * width if number < left else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def page(title: str, *parts: Part) -> str:
    """A page of a title and its parts: paragraphs, and sections (heading, text); a section without text is left out."""
    shown = [part if isinstance(part, str) else f"## {part[0]}\n\n{part[1]}" for part in parts if part and part[-1]]
    return "\n\n".join([f"# {title}", *shown]) + "\n"


def model_card(head: Mapping[str, Any], title: str, *parts: Part) -> str:
    """README.md of a folder that may go to the Hub: its head in YAML, then a page."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**head).to_yaml()}\n---\n\n{page(title, *parts)}"


def adapter_head(base: str, task: str, *tags: str) -> dict[str, Any]:
    """The head of the card of an adapter for ``base``; ``task`` is the Hub's name of what it does."""
    head = {"base_model": public_name(base), "library_name": "peft", "pipeline_tag": task}
    head |= {"license": "other", "license_name": "same-as-base-model"}
    return head | {"tags": ["smidgen", *tags, task, *(["diffusers"] if task == "text-to-image" else [])]}


def licence(base: str, trained_on: str = "", more: str = "") -> Part:
    """The section on the licence of an adapter."""
    right = f"; whoever shares it also needs the right to the {trained_on} it was trained on" if trained_on else ""
    said = f"The adapter stands under the licence of its base model `{public_name(base)}`{right}. {more}"
    return "Licence", said.strip()


def covered(found: Coverage | None) -> Part:
    """The section on the layers that an adapter is on, nothing for what is none."""
    rows = found.rows() if found is not None and found.entries else []
    return "What it covers", table(["layers", "adapted", "share of the base's parameters"], rows) if rows else ""


def write_report(folder: Path, report: Any, card: str) -> None:
    """README.md, and in report.json everything that a report's dataclass holds but the path ``adapter``."""
    values = asdict(report) | {"base": public_name(report.base)}
    if values.get("base_config"):
        values["base_config"] = public_name(values["base_config"])
    del values["adapter"]
    replace_file(folder / "report.json", json.dumps(values, indent=1, ensure_ascii=False, default=sorted) + "\n")
    replace_file(folder / "README.md", card)
