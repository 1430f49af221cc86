"""Tables of methods side by side, from benchmarks/results. A table is data: rows and columns name the figures of one file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from docsite import ROOT
from smidgen.errors import SmidgenError


@dataclass(frozen=True)
class Row:
    """A row: what it is called, the start of its figures' names, and the method that it is of."""

    title: str
    key: str
    method: str = ""


@dataclass(frozen=True)
class Column:
    """A column: the figure's name with ``{row}`` for the row's, and how it is written."""

    title: str
    figure: str
    form: str = ".2f"


@dataclass(frozen=True)
class Table:
    """A table of one file of results."""

    file: str
    title: str
    told: str  # what was measured; names of figures in braces
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    page: str  # where it is explained, from docs/
    figure: str = ""  # a picture, from docs/


_RANKS = ("r16", "r64", "full")
TABLES = {
    "personalize": Table(
        "personalize",
        "Personalisation of the embedded base",
        "{people} people it has never seen, {seeds} seeds, {steps} steps. Identity: 1 the same person, 0 a stranger.",
        (
            Row("the base alone", "base"),
            Row("`tlora`", "tlora", "tlora"),
            Row("`svfit`", "svfit", "svfit"),
            Row("`loldu`", "loldu", "loldu"),
            Row("`lora`", "lora", "lora"),
            Row("peft's LoRA", "peft_lora"),
            Row("peft's OFT", "peft_oft"),
        ),
        (
            Column("trained numbers", "{row}_numbers", ",.0f"),
            Column("bytes", "{row}_bytes", ",.0f"),
            Column("identity", "{row}_identity"),
            Column("captions followed", "{row}_caption"),
        ),
        "results/personalize.md",
        "results/personalize.png",
    ),
    "control": Table(
        "control",
        "Control by segmentation",
        "{pictures} pictures, {steps} steps, {segmentation_seeds} seeds, scored on {held_out} pictures of other people.",
        (
            Row("the real pictures", "real"),
            Row("the base alone", "base"),
            Row("the hint encoder alone", "hint_alone"),
            Row("peft's LoRA r=4", "lora_r4"),
            Row("peft's OFT b=32", "oft_b32"),
            Row("`tlora_star(2,3)`", "tlora_star_2_3", "tlora_star"),
            Row("`tlora(2,2)`", "tlora_2_2", "tlora"),
            Row("`svfit`, full rank", "svfit_full", "svfit"),
            Row("`loldu`, full rank", "loldu_full", "loldu"),
        ),
        (
            Column("trained numbers", "{row}_numbers", ",.0f"),
            Column("mIoU", "segmentation_{row}_miou", ".3f"),
            Column("share of pixels right", "segmentation_{row}_aacc", ".3f"),
        ),
        "results/control.md",
        "results/control_sheet.png",
    ),
    "step_time": Table(
        "step_time",
        "A training step of one layer",
        "Time over that of peft's LoRA r=8, 1,024 tokens, by width of the layer.",
        (
            Row("the frozen layer", "frozen"),
            *(Row(f"`{m}`, r {r.removeprefix('r')}", f"{m}_{r}", m) for m in ("svfit", "loldu") for r in _RANKS),
            Row("`tlora(1,2)`", "tlora_1_2", "tlora"),
            Row("ring transform alone, rank 1", "transform_1", "tlora"),
        ),
        tuple(Column(f"width {w}", f"w{w}_n1024_{{row}}_over_lora") for w in (384, 768, 1280)),
        "speed.md",
    ),
    "bank": Table(
        "bank",
        "A decoding step of 64 people, each with an adapter",
        "Milliseconds of the base, and what is added to it by the bank and by peft's `adapter_names`.",
        tuple(Row(f"`{m}`", m, m) for m in ("svfit", "loldu", "lora", "tlora")),
        (
            Column("base, ms", "{row}_base_ms", ".0f"),
            Column("bank, + ms", "{row}_bank_over_base_ms", ".1f"),
            Column("`adapter_names`, + ms", "{row}_adapter_names_over_base_ms", ".1f"),
            Column("ratio", "{row}_ratio_of_overheads", ".1f"),
        ),
        "bank.md",
    ),
    "portability": Table(
        "portability",
        "Reload on a re-cast base",
        "Relative error of the rebuilt update, the worst layer; above .15 `load` refuses.",
        tuple(
            Row(f"`{m}`, r {r}, {title}", f"{base}_{m}_r{r}", m)
            for m in ("svfit", "loldu")
            for base, title in (("embedded", "the embedded base"), ("minilm", "MiniLM"))
            for r in ("16", "64", "full")
        ),
        tuple(Column(cast, f"{{row}}_{cast}_max", ".4f") for cast in ("fp16", "bf16", "int8")),
        "speed.md",
    ),
    "export_loss": Table(
        "export_loss",
        "Cut to a LoRA for other programs",
        "The rank that `--rank auto` chooses for at most 5 % loss, and what the adapter does, read back; {seeds} seeds.",
        tuple(
            Row(f"`{m}`, {'images' if kind == 'picture' else 'texts'}", f"{kind}_{m}", m)
            for m in ("oft", "tlora", "tlora_star")
            for kind in ("picture", "text")
        ),
        (Column("rank", "{row}_rank", ".0f"), Column("loss, read back", "{row}_read", ".3f")),
        "results/export_loss.md",
    ),
    "convergence": Table(
        "convergence",
        "Loss by step",
        "MiniLM's last two layers on tweets, {steps} steps of {batch}, {seeds} seeds, {tested} test tweets; the head starts as a converged probe.",
        (
            Row("LoRA r 8", "lora", "lora"),
            Row("`svfit`, full rank", "svfit", "svfit"),
            Row("`loldu`, full rank", "loldu", "loldu"),
            Row("all weights of the two layers", "full"),
        ),
        (
            Column("trained numbers", "{row}_numbers", ",.0f"),
            Column("rate", "{row}_rate", "g"),
            *(Column(f"loss at {step}", f"{{row}}_loss_at_{step}", ".3f") for step in (0, 25, 50, 100, 200, 400)),
            Column("accuracy", "{row}_accuracy", ".3f"),
        ),
        "claims.md#how-fast",
        "results/convergence.png",
    ),
    "decompositions": Table(
        "decompositions",
        "What the factors of real weights are",
        "Medians over the matrices of each base's default targets, brackets: the least and the greatest. LDU: directions of norm one.",
        tuple(Row(base, base) for base in ("minilm", "vit-s14", "smollm2", "embedded", "embedded-flow")),
        (
            Column("matrices", "{row}_matrices", ".0f"),
            Column("share of directions for 99 % of S^2", "{row}_sigma2_share"),
            Column("for 99 % of S", "{row}_sigma_share"),
            Column("held by 64", "{row}_held"),
            Column("cond(L)", "{row}_cond_l_unit", ",.0f"),
            Column("cond(L), the paper's", "{row}_cond_l_raw", ",.0f"),
            Column("cond(U)", "{row}_cond_u_unit", ",.0f"),
            Column("most alike of L", "{row}_cosine_l"),
            Column("size of the paper's directions", "{row}_atom", ".1f"),
            Column("largest over smallest", "{row}_atom_spread", ",.0f"),
        ),
        "claims.md#energy-and-angles",
    ),
    "residual_rank": Table(
        "residual_rank",
        "The residual behind a ring transform",
        "Rank that leaves a tenth of the squared change, and shares of it that are held; means over the matrices.",
        (
            Row("the UNet on one person", "unet", "tlora"),
            Row("made by a ring and rank 4", "made", "tlora"),
        ),
        (
            Column("matrices", "{row}_matrices", ".0f"),
            Column("rank without T", "{row}_rank_alone", ".0f"),
            Column("behind T alone", "{row}_rank_rings_1", ".0f"),
            Column("T makes do with a tenth fewer", "{row}_fewer", ".0%"),
            *(
                Column(title, f"{{row}}_explained_{key}", ".1%")
                for title, key in (
                    ("T alone, ring rank 1", "rings_1"),
                    ("ring rank 2", "rings_2"),
                    ("LoRA r 1", "lora_1"),
                    ("TLoRA*(1,1)", "tlora_star_1_1"),
                    ("LoRA r 4", "lora_4"),
                    ("TLoRA*(1,4)", "tlora_star_1_4"),
                    ("ring residual of rank 4", "ring_4"),
                    ("TLoRA(1,4)", "tlora_1_4"),
                )
            ),
        ),
        "claims.md#the-residual-behind-a-ring",
    ),
    "generator_families": Table(
        "generator_families",
        "What a generator predicts",
        "Identity of {held_out} held-out people after {steps} steps of generator training.",
        (
            *(Row(f"`lora`, r {r}", f"lora-r{r}", "lora") for r in (1, 2, 4)),
            Row("`svfit`", "svfit", "svfit"),
            Row("`loldu`", "loldu", "loldu"),
        ),
        (
            Column("numbers", "{row} numbers", ",.0f"),
            Column("identity", "{row} identity"),
            Column("captions followed", "{row} captions"),
        ),
        "difflora_generator.md",
    ),
}


def table(name: str, bold: str = "", up: str = "") -> str:
    """A table as Markdown, with the rows of the method ``bold`` in bold; ``up`` leads to docs/.

    Raises:
        SmidgenError: no such table, or a figure that its file does not hold in any row.
    """
    if name not in TABLES:
        raise SmidgenError(f"There is no table {name!r}. Known: {', '.join(TABLES)}.")
    made = TABLES[name]
    path = ROOT / "benchmarks" / "results" / f"{made.file}.json"
    if not path.exists() and (ROOT / "benchmarks" / f"{made.file}.py").exists():
        return f"Not measured yet: `make bench NAME={made.file}`."
    record = json.loads(path.read_text())
    figures = record["figures"]
    lines = [made.told.format(**figures), "", "| | " + " | ".join(c.title for c in made.columns) + " |"]
    lines += ["|---|" + "---:|" * len(made.columns)]
    for row in made.rows:
        cells = [_cell(figures, column, row) for column in made.columns]
        if not any(cells):
            raise SmidgenError(f"benchmarks/results/{made.file}.json has no figure of {row.title}.")
        strong = "**" if bold and row.method == bold else ""
        lines.append(
            f"| {strong}{row.title}{strong} | " + " | ".join(f"{strong}{c}{strong}" if c else "" for c in cells) + " |"
        )
    lines += [
        "",
        f"[What it means]({up}{made.page}); `{record['command']}` redoes it (commit {record['commit'][:7]}, {record['machine']}).",
    ]
    if made.figure:
        lines += ["", f"![{made.title}]({up}{made.figure})"]
    return "\n".join(lines)


def of_method(name: str) -> str:
    """Every table that a method stands in, or that there is none."""
    found = [key for key, made in TABLES.items() if name in {row.method for row in made.rows}]
    if not found:
        return "Nothing has been measured of it beside other methods."
    return "\n\n".join(f"### {TABLES[key].title}\n\n{table(key, name, '../')}" for key in found)


def every() -> str:
    """All tables, for one page."""
    return "\n\n".join(f"## {made.title}\n\n{table(key)}" for key, made in TABLES.items())


def _cell(figures: Mapping[str, Any], column: Column, row: Row) -> str:
    name = column.figure.format(row=row.key)
    if name not in figures:
        return ""
    interval = figures.get(f"{name}_interval") or (
        figures.get(f"{row.key} interval") if name.endswith("identity") else None
    )
    value = format(figures[name], column.form)
    return value + (f" [{', '.join(format(end, column.form) for end in interval)}]" if interval else "")
