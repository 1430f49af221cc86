"""What a method's page says of its formula, options and learning rates: the table of methods and the members' docstrings."""

import inspect
import re

from docsite.text import escaped
from smidgen.adapters.methods import KINDS, Method, known_methods, learning_rates, member_options
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS


def method(name: str) -> str:
    """Formula, count, paper, defaults, options and rates of one method."""
    found = next(m for m in known_methods() if m.name == name)
    lines = [f"{found.summary[:1].upper()}{found.summary[1:].rstrip('.')}.", "", *_facts(found), "", "## Formula", ""]
    for side, member in _members(found):
        told = inspect.getdoc(inspect.getmodule((TRANSFORMS if side == "transform" else RESIDUALS)[member])) or ""
        lines += [f"### {side.capitalize()}: {member}", "", escaped(told), ""]
    lines += ["## Options", ""]
    for side, member in _members(found):
        lines += [*_options(side, member), ""]
    rates = [(kind, learning_rates(name, kind)) for kind in KINDS]
    both = bool(found.transform and found.residual)
    lines += [
        "## Learning rates to start from",
        "",
        "| kind of task | rate |" if not both else "| kind of task | residual | transform |",
        "|---|---|" if not both else "|---|---|---|",
    ]
    lines += [
        f"| {kind} | {r.residual if found.residual else r.transform:g} |" + (f" {r.transform:g} |" if both else "")
        for kind, r in rates
    ]
    return "\n".join(lines)


def _members(found: Method) -> list[tuple[str, str]]:
    return [(side, name) for side, name in (("transform", found.transform), ("residual", found.residual)) if name]


def _facts(found: Method) -> list[str]:
    paper = re.fullmatch(r"arXiv ([\d.]+)", found.paper)
    made = {
        "Paper": f"[{found.paper}](https://arxiv.org/abs/{paper[1]})" if paper else "",
        "Trained numbers of a matrix (out x in)": f"`{found.formula}`" if found.formula else "",
        "Defaults": "`" + ", ".join(f"{k}={v!r}" for k, v in found.defaults.items()) + "`" if found.defaults else "",
    }
    return [f"- {key}: {value}" for key, value in made.items() if value]


def _options(side: str, member: str) -> list[str]:
    """The options of a member with their defaults, and what its docstring says of them."""
    table = TRANSFORMS if side == "transform" else RESIDUALS
    told = inspect.getdoc(table[member]) or ""
    said = dict(re.findall(r"^    ([\w, ]+): ((?:.|\n(?= {8}))+)", told.partition("Args:\n")[2], re.M))
    texts = {name.strip(): " ".join(text.split()) for names, text in said.items() for name in names.split(",")}
    rows = [
        line
        for name, option in member_options(side, member).items()
        for line in (f"`{name}={option.default!r}`", f":   {_linked(texts.get(name, 'as in the formula'))}", "")
    ]
    return [f"Of the {side} `{member}`:", "", *rows] if rows else []


def _linked(text: str) -> str:
    return re.sub(r":(?:func|class):`([\w.]+)`", r"[`\1`][\1]", escaped(text))
