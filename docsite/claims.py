"""docs/claims.md: what the four papers' abstracts claim, beside our figures. ``python -m docsite.claims`` writes it.

A claim is data, in claims.toml: a few words of the abstract, what they are held against, the figures by name, and rules over these
names. The verdict follows from the rules; a figure that its file does not hold is an error, a benchmark that has not been run is said.
"""

import json
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docsite import DOCS, ROOT, measured
from smidgen.errors import SmidgenError

TABLE = ROOT / "docsite" / "claims.toml"
PAGE = DOCS / "claims.md"
COMMAND = "python -m docsite.claims"
MET, NOT_MET, AGAINST, UNTESTABLE = "met", "not met", "against", "not testable here"
UNMEASURED = "not measured yet"  # its benchmark is there, and has not been run
VERDICTS = (MET, NOT_MET, AGAINST, UNTESTABLE, UNMEASURED)
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
COMPARISONS = DOCS / "results"


@dataclass(frozen=True)
class Paper:
    """A paper: its name here, its number on arXiv with the version that is quoted, and what is to be known before its table."""

    name: str
    arxiv: str
    told: str = ""


@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        paper: a key of the papers' table.
        says: words of the abstract.
        here: what was measured, with expressions over figures in braces, as in an f-string.
        figures: name -> address, ``FILE:KEY`` of a figure in benchmarks/results/FILE.json, or of a comparison in docs/results, where
            KEY is a method of its claim, whose figure is its score less the baseline's. An interval beside it (KEY_interval) is NAME_low and NAME_high.
        met, against: rules over the names; where neither holds the verdict is "not met".
        page: where it is explained, from docs/.
        untestable: why it cannot be decided here; then there are no figures and no rules.
    """

    paper: str
    says: str
    here: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    met: str = ""
    against: str = ""
    page: str = ""
    untestable: str = ""

    def __post_init__(self) -> None:
        parts = (self.here, self.figures, self.met, self.page)
        if any(parts) == bool(self.untestable) or (not self.untestable and not all(parts)):
            raise SmidgenError(
                f"The claim {self.says!r} of {self.paper} has here, figures, met and page, or untestable alone."
            )


@dataclass(frozen=True)
class Section:
    """What was measured for the claims alone: a title, what to know, and a table of docsite/measured.py."""

    title: str
    told: str
    table: str


def sections(table: Path = TABLE) -> list[Section]:
    """The sections behind the papers."""
    return [Section(**section) for section in tomllib.loads(table.read_text())["section"]]


def read(table: Path = TABLE) -> tuple[dict[str, Paper], list[Claim]]:
    """The papers and the claims of a table."""
    found = tomllib.loads(table.read_text())
    papers = {key: Paper(**paper) for key, paper in found["papers"].items()}
    claims = [Claim(**claim) for claim in found["claim"]]
    for claim in claims:
        if claim.paper not in papers:
            raise SmidgenError(f"The claim {claim.says!r} is of {claim.paper!r}; known papers: {', '.join(papers)}.")
    return papers, claims


@dataclass(frozen=True)
class Decided:
    """A claim, its figures by name with the ends of their intervals, the verdict, and the benchmarks that are still to be run."""

    claim: Claim
    figures: Mapping[str, float]
    verdict: str
    unmeasured: tuple[str, ...] = ()


def decide(claim: Claim, results: Path = RESULTS) -> Decided:
    """What the rules of a claim say of its figures.

    Raises:
        SmidgenError: a figure that is not there, a rule with a name that is none, or rules that both hold.
    """
    if claim.untestable:
        return Decided(claim, {}, UNTESTABLE)
    files = dict.fromkeys(address.partition(":")[0] for address in claim.figures.values())
    lacking = [file for file in files if _results(file, results) is None]
    if unknown := [file for file in lacking if not (BENCHMARKS / f"{file}.py").exists()]:
        raise SmidgenError(f"The claim {claim.says!r} needs {unknown[0]}.json, and there is no benchmark of that name.")
    if lacking:
        return Decided(claim, {}, UNMEASURED, tuple(lacking))
    found = _figures(claim, results)
    met, against = (bool(rule) and bool(_worked_out(rule, found, claim)) for rule in (claim.met, claim.against))
    if met and against:
        raise SmidgenError(
            f"The claim {claim.says!r} is met and against: {claim.met!r} and {claim.against!r} both hold."
        )
    return Decided(claim, found, MET if met else AGAINST if against else NOT_MET)


def _figures(claim: Claim, results: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, address in claim.figures.items():
        file, _, key = address.partition(":")
        figures = _results(file, results) or {}
        if key not in figures:
            raise SmidgenError(f"The claim {claim.says!r} needs the figure {key!r}, which {file}.json does not hold.")
        found[name] = figures[key]
        if (ends := figures.get(f"{key}_interval") or figures.get(f"{key} interval")) is not None:
            found[f"{name}_low"], found[f"{name}_high"] = ends
    return found


def _results(file: str, results: Path) -> dict[str, Any] | None:
    """All figures of a benchmark or a comparison; None where it has not been run."""
    if (path := results / f"{file}.json").exists():
        return json.loads(path.read_text())["figures"]  # type: ignore[no-any-return]
    if not (path := COMPARISONS / f"{file}.json").exists():
        return None
    found: dict[str, Any] = {}
    for claim in json.loads(path.read_text())["claims"]:
        told = claim["difference"]
        found |= {claim["method"]: told["mean"], f"{claim['method']}_interval": (told["low"], told["high"])}
    return found


def _worked_out(text: str, found: Mapping[str, float], claim: Claim) -> Any:
    """The value of an expression over figures."""
    try:
        return eval(text, {"__builtins__": {}, "min": min, "max": max}, dict(found))
    except NameError as error:
        raise SmidgenError(f"{text!r} of the claim {claim.says!r}: {error}. Figures: {', '.join(found)}.") from error


def page(
    papers: Mapping[str, Paper],
    claims: list[Claim],
    behind: Sequence[Section] = (),
    results: Path = RESULTS,
) -> str:
    """docs/claims.md."""
    decided = [decide(claim, results) for claim in claims]
    count = Counter(one.verdict for one in decided)
    lines = [
        "# What the papers claim, and what was found",
        "",
        f"Generated by `{COMMAND}` from docsite/claims.toml and benchmarks/results; do not edit. No verdict is written by hand: each follows from",
        "the rule beside it. `_low` and `_high` are the ends of a figure's 95 % interval.",
        "",
        f"Of {len(claims)} claims: " + ", ".join(f"{count[name]} {name}" for name in VERDICTS if count[name]) + ".",
        "",
        "- **met**: our figures meet the rule. **not met**: they neither meet it nor say the opposite. **against**: they say the opposite.",
        "- Our models are small and our pictures drawn; a verdict is about these. What is *not testable here* needs a model, data or a",
        "  program that cannot be had without a network.",
        "- Quoted are a few words of each sentence of the abstracts that claims something. Sentences that only say what is done are left out.",
    ]
    for key, paper in papers.items():
        lines += ["", f"## {paper.name}", ""]
        lines += [f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}). {paper.told}".rstrip(), ""]
        lines += ["| the abstract | here | verdict | rule | source |", "|---|---|---|---|---|"]
        lines += [_line(one) for one in decided if one.claim.paper == key]
    for section in behind:
        lines += ["", f"## {section.title}", "", section.told, "", measured.table(section.table)]
    return "\n".join(lines) + "\n"


def whole() -> str:
    """The page as it is to be."""
    return page(*read(), sections())


def _line(one: Decided) -> str:
    claim = one.claim
    if one.verdict in (UNTESTABLE, UNMEASURED):
        told = claim.untestable or ", ".join(f"`make bench NAME={name}`" for name in one.unmeasured)
        return f'| "{claim.says}" | {told} | {one.verdict} | | |'
    here = _worked_out(f"f{claim.here!r}", one.figures, claim)
    rule = f"met: `{claim.met}`" + (f"; against: `{claim.against}`" if claim.against else "")
    files = ", ".join(dict.fromkeys(address.partition(":")[0] for address in claim.figures.values()))
    return f'| "{claim.says}" | {here} | **{one.verdict}** | {rule} | [{files}]({claim.page}) |'


def main() -> int:
    """Write the page and say what the verdicts are."""
    text = whole()
    PAGE.write_text(text)
    print(f"{PAGE}: {next(line for line in text.splitlines() if line.startswith('Of '))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
