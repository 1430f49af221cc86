"""What the default targets reach, and whether an adapter on them works, on one tiny model of each architecture.

python -m benchmarks.coverage       (a minute or two; no weights, no network)

Real classes, tiny configs, random weights (``tiny_models``). Each is adapted with LoRA on its default targets, those with
fused experts also on these by name, and held against: start (output equal to the base's, bit for bit), effect (numbers
moved away from the start move the output), file (saved, loaded into a fresh model, same output), merge (same output).
Writes results/coverage.json and docs/coverage.md.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import smidgen
from benchmarks import tiny_models
from smidgen import testing
from smidgen.adapters.example_inputs import examples
from smidgen.adapters.passes import _distance, numbers
from smidgen.adapters.tuner.coverage import Coverage, coverage
from smidgen.adapters.tuner.experts import stacks

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
COMMAND = "make bench NAME=coverage"
CHECKS = ("start", "effect", "file", "merge")


@dataclass
class Row:
    """What was found for one architecture: names of targets, what they reach, and which checks held."""

    name: str
    targets: list[str] = field(default_factory=list)
    reach: Coverage = field(default_factory=Coverage)
    held: dict[str, bool] = field(default_factory=dict)
    error: str = ""

    @property
    def fine(self) -> bool:
        """Whether every check held."""
        return not self.error and all(self.held.get(check, False) for check in CHECKS)

    def blocks(self) -> str:
        """How many blocks hold an adapted layer, list by list, those with less than a twentieth left out."""
        shown = [s for s in self.reach.stacks if s.share >= 0.05 and (s.touched or not s.convolves)]
        return ", ".join(f"{s.touched}/{s.blocks}" for s in shown) or "-"


def forward(name: str, model: nn.Module) -> Callable[[], list[Tensor]]:
    """A forward pass of a tiny model that gives its output's numbers, the same random numbers on every call."""
    if name in tiny_models.INPUTS:
        inputs = tiny_models.INPUTS[name]()
        runs = [lambda: model(**inputs)]
    else:
        runs = [example.run for example in examples(model)]
    last: Exception | None = None
    for run in runs:

        @torch.no_grad()
        def call(run: Callable[[], object] = run) -> list[Tensor]:
            torch.manual_seed(0)
            return numbers(run())

        try:
            call()
        except Exception as error:  # an example that does not fit this model; the next may
            last = last or error
            continue
        return call
    raise last or ValueError(f"no inputs are known for a {type(model).__name__}")


def examine(name: str, targets: list[str] | None = None, method: str = "lora") -> Row:
    """Adapts a tiny model on its default targets, or on those named, and checks what an adapter must keep."""
    row = Row(name)
    try:
        model = tiny_models.build(name).requires_grad_(False)  # torch takes other paths for a layer that trains
        base = forward(name, model)()
        smidgen.adapt(model, method, r=2, target_modules=targets)
        row.targets = sorted(model.peft_config["default"].target_modules)  # type: ignore[index,union-attr]
        row.reach = coverage(model, "default")
        row.held["start"] = all(torch.equal(a, b) for a, b in zip(forward(name, model)(), base, strict=True))
        testing.perturb(model, size=0.3)
        moved = forward(name, model)()
        row.held["effect"] = _distance(moved, base) > 1e-6
        with tempfile.TemporaryDirectory() as folder:
            smidgen.save(model, folder)
            loaded = smidgen.load(tiny_models.build(name), folder)
            row.held["file"] = _distance(forward(name, loaded)(), moved) < 1e-4
        row.held["merge"] = _distance(forward(name, smidgen.merge(model))(), moved) < 1e-4
    except Exception as error:  # stated in the table
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def examine_experts(names: list[str]) -> list[Row]:
    """The same for models with fused experts, on these alone."""
    rows = []
    for name in names:
        model = tiny_models.build(name)
        if found := stacks(model):
            owners = sorted({stack.rpartition(".")[0].rpartition(".")[2] for stack in found})
            rows.append(examine(name, owners))
    return rows


def shortened(targets: list[str], most: int = 8) -> str:
    """Names of targets for a table; full names are given by one of each kind."""
    ends = sorted({t if t.count(".") < 3 else f"...{t.rpartition('.')[2]}" for t in targets})
    return ", ".join(f"`{t}`" for t in ends[:most]) + (f" and {len(ends) - most} more" if len(ends) > most else "")


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | targets | layers | share | blocks | start | effect | file | merge |",
        "|---|---|---:|---:|---|---|---|---|---|",
    ]
    for row in rows:
        marks = ["yes" if row.held.get(check) else "**no**" for check in CHECKS]
        reach = f"{row.reach.layers} of {row.reach.there} | {row.reach.share:.0%} | {row.blocks()}"
        lines.append(f"| {row.name} | {shortened(row.targets)} | {reach} | {' | '.join(marks)} |")
    return lines


def page(tables: dict[str, list[Row]]) -> str:
    """docs/coverage.md."""
    rows = [row for table in tables.values() for row in table]
    wrong = [row for row in rows if not row.fine]
    text, pictures, experts = (len(tables[title]) for title in tables)
    lines = [
        "# What the default targets reach",
        "",
        f"Generated by `{COMMAND}` (real classes, tiny configs, random weights; no network); do not edit.",
        "How the targets are chosen is in [methods](methods.md#default-targets).",
        "",
        f"{text} architectures of transformers, {pictures} of diffusers and {experts} with fused experts named: {len(rows) - len(wrong)} of {len(rows)} hold every",
        "check. *start*: the adapted model's output is the frozen base's, bit for bit. *effect*: numbers moved away from the start move the",
        "output. *file*: saved, loaded into a fresh model, the same output. *merge*: merged, the same output.",
        "*layers*: adapted, of those that could be. *share*: of the model's parameters in adapted layers; embeddings weigh more in these",
        "tiny models than in real ones. *blocks*: blocks that hold an adapted layer, for each list of repeated blocks with a twentieth of",
        "the parameters or more; lists of convolutions beside attention (a UNet's residual blocks) and towers that are left out",
        "show as they are.",
    ]
    lines += ["", "What does not hold:", ""] if wrong else []
    lines += [f"* {row.name}: {row.error or ', '.join(c for c in CHECKS if not row.held.get(c))}" for row in wrong]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", *_table(table)]
    return "\n".join(lines) + "\n"


def figures(tables: dict[str, list[Row]]) -> dict[str, float]:
    """Flat figures: share, layers and checks held, by table and model."""
    out: dict[str, float] = {}
    for title, rows in tables.items():
        kind = title.partition(" ")[0].lower()
        out[f"{kind}.models"], out[f"{kind}.fine"] = len(rows), sum(row.fine for row in rows)
        for row in rows:
            out[f"{kind}.{row.name}.share"] = round(row.reach.share, 4)
            out[f"{kind}.{row.name}.layers"] = row.reach.layers
            out[f"{kind}.{row.name}.checks"] = sum(row.held.values())
    return out


def main() -> None:
    """Examines every architecture, writes results/coverage.json and docs/coverage.md."""
    from benchmarks._harness import write_result

    warnings.simplefilter("ignore")
    logging.getLogger("smidgen").setLevel(logging.ERROR)
    tables = {
        "Transformers": [examine(name) for name in tiny_models.TRANSFORMERS],
        "Diffusers": [examine(name) for name in tiny_models.DIFFUSERS],
        "Experts, by name": examine_experts(list(tiny_models.TRANSFORMERS)),
    }
    PAGE.write_text(page(tables))
    for row in (row for rows in tables.values() for row in rows if not row.fine):
        print(row.name, row.held, row.error)
    print(f"{PAGE}\n{write_result('coverage', figures(tables), COMMAND)}")


if __name__ == "__main__":
    main()
