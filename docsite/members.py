"""What a method's page says of its formula, options and learning rates: the table of methods and the members' docstrings."""

import inspect
import re

from docsite.text import escaped
from smidgen.adapters.methods import KINDS, SIDES, Method, known_methods, learning_rates, member_options


def method(name: str) -> str:
    """Formula, count, paper, defaults, options and rates of one method."""
    found = next(m for m in known_methods() if m.name == name)
    lines = [f"{found.summary[:1].upper()}{found.summary[1:].rstrip('.')}.", "", *_facts(found), "", "## Formula", ""]
    for side, member in found.members.items():
        told = inspect.getdoc(inspect.getmodule(SIDES[side][member])) or ""
        lines += [f"### {side.capitalize()}: {member}", "", escaped(told), ""]
    lines += ["## Options", ""]
    for side, member in found.members.items():
        lines += [*_options(side, member), ""]
    sides = [side for side in ("residual", "transform", "output") if side in found.members]
    named = sides if len(sides) > 1 else ["rate"]
    lines += [
        "## Learning rates to start from",
        "",
        f"| kind of task | {' | '.join(named)} |",
        "|---" * (1 + len(named)) + "|",
    ]
    for kind in KINDS:
        rates = learning_rates(name, kind)
        lines.append(f"| {kind} | {' | '.join(f'{rates.of(side):g}' for side in sides)} |")
    return "\n".join(lines)


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
    told = inspect.getdoc(SIDES[side][member]) or ""
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
