"""Trained numbers against the published ones: every count that the papers print.

python -m benchmarks.counts        (half a minute; no weights, no network; also writes docs/counts.md)

A count agrees when it rounds to the printed figure. What the papers print and arithmetic does not give is listed with
both numbers and the reason, never adjusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks._ways_to_count import Count, base_size, by_peft, formula, lora, ours, percent_of_base, ratio
from smidgen.bases.counting import count

COMMAND = "python -m benchmarks.counts"
PAGE = Path(__file__).parent.parent / "docs" / "counts.md"
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "x": 1.0, "%": 1.0}
SELF_ATTENTION = r".*attn1\.(to_q|to_k|to_v|to_out\.0)"
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """One figure of a paper; ``per_matrix`` names a number that may be trained once a matrix besides."""

    paper: str
    label: str
    count: Count
    published: str | None = None
    reason: str = ""
    per_matrix: str = ""


@dataclass(frozen=True)
class Result:
    """A row with its figures; ``verdict`` is agrees, agrees with ..., DISAGREES or not printed."""

    row: Row
    count: float
    published: float | None
    verdict: str

    @property
    def key(self) -> str:
        """Name among the figures."""
        return re.sub(r"[^a-z0-9.()*,+]+", "_", f"{self.row.paper} {self.row.count.model} {self.row.label}".lower())


# ---- the published tables ------------------------------------------------------------------------------------------

BOFT_REASON = (
    "PEFT's convention (m butterfly factors of in/b full b x b blocks, and out scales); what the paper counts is not "
    "known. peft itself falls back to one factor without its CUDA extension"
)
TLORA = (
    Row("tlora", "LoRA r4", lora("sd15", 4), "0.80 M"),
    Row("tlora", "DoRA r4", ours("sd15", "dora", r=4), "0.90 M"),
    Row("tlora", "OFT 32 blocks, output side", ours("sd15", "oft_out", blocks=32), "1.50 M"),
    Row(
        "tlora",
        "OFT 32 blocks, input side",
        ours("sd15", "oft", blocks=32),
        "1.50 M",
        "the paper rotates the output side; `oft`, and peft's OFT, rotate the input side",
    ),
    Row("tlora", "TLoRA*(2,4)", ours("sd15", "tlora*(2,4)"), "0.94 M"),
    Row("tlora", "TLoRA(2,6)", ours("sd15", "tlora(2,6)"), "0.40 M"),
    Row("tlora", "BOFT(2,2)", formula("sd15", "m b in + out", lambda o, i: 2 * 2 * i + o), "2.41 M", BOFT_REASON),
    Row("tlora", "BOFT(4,8)", formula("sd15", "m b in + out", lambda o, i: 4 * 8 * i + o), "20.76 M", BOFT_REASON),
    Row("tlora", "LoRA r1", lora("sdxl", 1), None, "the base of the printed 27 %"),
    Row("tlora", "TLoRA(1,2)", ours("sdxl", "tlora(1,2)"), "0.4 M"),
    Row("tlora", "TLoRA(1,2) of LoRA r1", ratio(ours("sdxl", "tlora(1,2)"), lora("sdxl", 1), 100), "27 %"),
    Row("tlora", "TLoRA*(1,1)", ours("sdxl", "tlora*(1,1)"), None, "the released script's setting"),
    Row("tlora", "TLoRA(1,4)", ours("sdxl", "tlora(1,4)")),
    Row("tlora", "TLoRA(2,6)", ours("sdxl", "tlora(2,6)")),
)

VIT_PERCENT = "printed ten times too large: the printed count is {} % of the printed 85.8 M"
LOLDU = (
    Row("loldu", "LoLDU r768", ours("roberta-base", "loldu", r=768), "0.0184 M"),
    *(Row("loldu", f"LoLDU r{r}", ours("vit-base", "loldu", r=r), f"{24 * r:,}") for r in (1, 8, 16, 32, 64)),
    *(Row("loldu", f"LoLDU r{r}", ours("vit-base", "loldu", r=r), f"{24 * r:,}") for r in (128, 256, 512)),
    Row(
        "loldu",
        "LoLDU r768",
        ours("vit-base", "loldu", r=768),
        "18,456",
        "printed with the trained scale, unlike the other ranks of the same table",
        "a trained scale",
    ),
    Row(
        "loldu",
        "LoLDU r1024",
        ours("llama2-7b", "loldu", r=1024),
        "0.016 M",
        "printed four times less, which is the count of r256",
    ),
    Row(
        "loldu", "LoLDU r256", ours("llama2-7b", "loldu", r=256), "0.016 M", "the rank whose count is printed for r1024"
    ),
    Row("loldu", "LoLDU r32", ours("sd15", "loldu", r=32)),
    Row("loldu", "LoLDU full", ours("sd15", "loldu", r="full")),
    Row("loldu", "LoLDU r32", ours("sdxl", "loldu", r=32)),
    Row("loldu", "LoLDU full", ours("sdxl", "loldu", r="full")),
    Row("loldu", "LoRA r8", lora("roberta-base", 8), "0.3 M"),
    Row("loldu", "VeRA r1024", by_peft("roberta-base", "Vera", r=1024), "0.043 M"),
    Row("loldu", "LoRA r64", lora("llama2-7b", 64), "33.6 M"),
    Row("loldu", "MELoRA = LoRA r1", lora("llama2-7b", 1), "0.5 M"),
    Row("loldu", "FourierFT n3000", by_peft("vit-base", "FourierFT", n_frequency=3000), "72 K"),
    Row("loldu", "FourierFT n10000", by_peft("vit-base", "FourierFT", n_frequency=10000), "239 K", "24 x 10,000"),
    Row("loldu", "LoRA r16", lora("vit-base", 16), "581 K", "24 x 16 x 1,536; targets are those of LoLDU's 24 r"),
    Row("loldu", "PiSSA = LoRA r19", lora("roberta-base", 19), "0.707 M", "36,864 r: no whole rank gives 0.707 M"),
    Row(
        "loldu",
        "LoRA r64 to LoLDU r1024",
        ratio(lora("llama2-7b", 64), ours("llama2-7b", "loldu", r=1024)),
        "2600 x",
        "the best pair of printed counts, 33.6 M / 0.016 M, gives 2100 x",
    ),
    Row(
        "loldu",
        "LoRA r8 to LoLDU r768",
        ratio(lora("roberta-base", 8), ours("roberta-base", "loldu", r=768)),
        "2600 x",
        "the claim does not hold on GLUE either",
    ),
    Row("loldu", "LoRA r16, share", percent_of_base(lora("vit-base", 16)), "6.77 %", VIT_PERCENT.format(0.677)),
    Row(
        "loldu",
        "FourierFT n10000, share",
        percent_of_base(by_peft("vit-base", "FourierFT", n_frequency=10000)),
        "2.79 %",
        VIT_PERCENT.format(0.279),
    ),
    Row(
        "loldu",
        "LoLDU r768, share",
        percent_of_base(ours("vit-base", "loldu", r=768)),
        "0.21 %",
        VIT_PERCENT.format(0.0215),
    ),
)

GATE = "printed for SVFT-Plain, which trains a gate besides (inferred); without it the count rounds to 18.4 K"
NO_RANK = "SVFit's own printed counts are not known"


def _svfit_pair(model: str, claim: str | None, reason: str) -> tuple[Row, ...]:
    full, reference = ours(model, "svfit", r="full"), lora(model, 8)
    return (
        Row("svfit", "SVFit full", full, None, NO_RANK),
        Row("svfit", "LoRA r8", reference, None, "the reference of the ratio"),
        Row("svfit", "LoRA r8 to SVFit full", ratio(reference, full), claim, reason),
    )


SVFIT = (
    *_svfit_pair("roberta-base", "16 x", "holds at full rank against LoRA r8 only"),
    *_svfit_pair("roberta-large", "16 x", "holds at full rank against LoRA r8 only"),
    Row("svfit", "SVFT-Plain", ours("vit-base", "svfit", r="full"), "18.5 K", GATE, "a trained gate"),
    Row("svfit", "SVFT-Plain", ours("vit-large", "svfit", r="full"), "49.2 K"),
    *_svfit_pair("llama2-7b", None, "arithmetic, no printed count"),
    Row("svfit", "SVFT-Plain, 6 linears", ours("deberta-v3-base", "svfit", r="full"), "0.06 M"),
    Row("svfit", "SVFT-Plain, 7 linears", ours("gemma-2b", "svfit", r="full"), "0.19 M"),
    Row("svfit", "SVFit r32", ours("sd15", "svfit", r=32), None, NO_RANK),
    *_svfit_pair("sd15", None, "arithmetic, no printed count"),
    Row("svfit", "SVFit r32", ours("sdxl", "svfit", r=32), None, NO_RANK),
    *_svfit_pair("sdxl", None, "arithmetic, no printed count"),
    Row("svfit", "SVFT-Plain, 7 linears", ours("gemma-7b", "svfit", r="full"), "0.43 M", "printed for five of seven"),
    Row(
        "svfit",
        "SVFT-Plain, 5 linears",
        ours("gemma-7b", "svfit", r="full", target_modules=FIVE),
        "0.43 M",
        "any five: all have width 3072",
    ),
    Row("svfit", "SVFT-Plain, 7 linears", ours("llama3-8b", "svfit", r="full"), "0.48 M", "not reproduced"),
    Row(
        "svfit",
        "SVFT-Plain, 5 linears",
        ours("llama3-8b", "svfit", r="full", target_modules=FIVE),
        "0.48 M",
        "not reproduced with q, k, v, up, down either",
    ),
    Row("svfit", "size called ViT's", base_size("vit-large"), "354 M", "it is RoBERTa-large's size"),
    Row("svfit", "size called ViT's", base_size("roberta-large"), "354 M", "printed for ViT; without the pooler"),
)

_LOKR = {"plus": 280, "r": 4, "target_modules": SELF_ATTENTION}
DIFFLORA = (
    Row(
        "difflora",
        "LoKr 4, both decomposed, 280 alphas",
        by_peft("sdxl", "LoKr", decompose_both=True, **_LOKR),
        "155,160",
        "280 alphas, which peft does not train, are added",
    ),
    Row("difflora", "LoKr 4, first full, 280 alphas", by_peft("sdxl", "LoKr", **_LOKR), None, "280 alphas are added"),
    Row("difflora", "LoRA r1", lora("sdxl", 1)),
    Row("difflora", "LoRA r4", ours("sdxl", "lora", r=4)),
    Row("difflora", "LoRA r8", lora("sdxl", 8), "11.6 M", "HyperLoRA's"),
    Row("difflora", "LoRA r1, to_q to_v", lora("sd15", 1, target_modules=("to_q", "to_v")), "99,648"),
)
ROWS: tuple[Row, ...] = (*TLORA, *LOLDU, *SVFIT, *DIFFLORA)


# ---- verdicts and what is written ------------------------------------------------------------------------------------


def printed(text: str) -> tuple[float, float]:
    """(value, half a unit of the last printed digit) of a figure such as "0.80 M", "18,456", "27 %"."""
    number, _, unit = text.partition(" ")
    decimals = len(number.partition(".")[2])
    return float(number.replace(",", "")) * UNITS[unit], 0.5 * 10.0**-decimals * UNITS[unit]


def judge(row: Row) -> Result:
    """Counts a row and compares it with what is printed."""
    found = row.count.run()
    if row.published is None:
        return Result(row, found, None, "not printed")
    value, slack = printed(row.published)
    if abs(found - value) <= slack:
        return Result(row, found, value, "agrees")
    if row.per_matrix and abs(found + count(row.count.model, "svfit", r=1) - value) <= slack:
        return Result(row, found, value, f"agrees with {row.per_matrix} a matrix")
    return Result(row, found, value, "DISAGREES")


def figures(results: list[Result]) -> dict[str, float]:
    """Flat figures: counts, printed values and 1 or 0 for agreement, by row."""
    out: dict[str, float] = {}
    for result in results:
        out[f"{result.key}.count"] = result.count
        if result.published is not None:
            out[f"{result.key}.published"] = result.published
            out[f"{result.key}.agrees"] = int(result.verdict != "DISAGREES")
    return out


def page(results: list[Result]) -> str:
    """docs/counts.md."""
    wrong = sum(r.verdict == "DISAGREES" for r in results)
    told = sum(r.published is not None for r in results)
    added = sum(r.verdict.startswith("agrees with") for r in results)
    lines = [
        "# Trained numbers against the published ones",
        "",
        f"Generated by `{COMMAND}` (no weights, no network); do not edit. One count by hand:",
        '`smidgen.count("sd15", "tlora(2,6)")`, which takes any peft config too.',
        "",
        f"Of {told} comparisons with a printed figure {told - wrong} agree: our count rounds to what is printed,",
        f"in {added} of them only with one more trained number a matrix. {wrong} do not agree. A printed figure that",
        "can be read in two ways has a row for each. The sizes of DiffLoRA's autoencoders and hypernetworks",
        "are no adapters and are left out.",
    ]
    for paper in dict.fromkeys(r.row.paper for r in results):
        lines += ["", f"## {paper}", "", "| model | config | counted by | our count | published | verdict | reason |"]
        lines += ["|---|---|---|---:|---:|---|---|"]
        lines += [_line(r) for r in results if r.row.paper == paper]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    row, shown = result.row, result.count
    number = f"{shown:,}" if isinstance(shown, int) else f"{shown:,.3f}"
    cells = (row.count.model, row.label, row.count.by, number, row.published or "-", result.verdict, row.reason)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Counts every row, writes results/counts.json and docs/counts.md."""
    from benchmarks._harness import write_result

    results = [judge(row) for row in ROWS]
    PAGE.write_text(page(results))
    print(f"{PAGE}\n{write_result('counts', figures(results), COMMAND)}")


if __name__ == "__main__":
    main()
