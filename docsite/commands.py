"""A page for each command, read from its own ``--help``."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from docsite.text import plain
from smidgen import cli
from smidgen.cli.table import COMMANDS, GROUPS, overview
from smidgen.errors import SmidgenError

COLUMNS = 100  # of these the help has one column of boxes


@dataclass
class Box:
    """A box of options: its title, what is said of it, and flags with what they do."""

    title: str
    text: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)


def pages() -> dict[str, str]:
    """Every command's page by file name, and the overview."""
    made = {f"{name.replace(' ', '-')}.md": page(name) for name in COMMANDS}
    groups = "\n\n".join(f"```text\n{overview(group)}\n```" for group in ("", *GROUPS))
    return {
        "index.md": f"# All commands\n\nWhat `smidgen`, and `smidgen GROUP` for a group, prints.\n\n{groups}\n"
    } | made


def page(name: str) -> str:
    """The page of one command."""
    usage, told, boxes = read(help_of(name))
    lines = [f"# smidgen {name}", "", plain(told), "", "```text", usage, "```", ""]
    for box in boxes:
        rows = [(flag, text) for flag, text in box.rows if not flag.startswith("-h,")]
        if rows:
            lines += [f"## {box.title[:1].upper()}{box.title[1:]}", "", *([plain(box.text), ""] if box.text else [])]
        for flag, text in rows:
            lines += [f"`{flag}`", f":   {plain(text)}", ""]
    return "\n".join(lines)


def help_of(name: str) -> str:
    """What ``smidgen NAME --help`` prints."""
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*name.split(), "--help"])
    return out.getvalue()


def read(text: str) -> tuple[str, str, list[Box]]:
    """Usage, description and boxes of a help text.

    Raises:
        SmidgenError: flags that were found in no box, so that no page lacks one in silence.
    """
    head, *rest = re.split(r"^(?=\W* (?:positional arguments|options)\b)", text, maxsplit=1, flags=re.M)
    usage, _, told = head.strip().partition("\n\n")
    boxes = list(_boxes("".join(rest)))
    lost = set(re.findall(r"^[│ ] (--[a-z][\w.-]*)", "".join(rest), re.M))
    lost -= {flag for box in boxes for row, _ in box.rows for flag in row.replace(",", "").split()}
    if lost or not any(box.title == "options" for box in boxes):
        raise SmidgenError(f"A help text was not understood; in no box: {', '.join(sorted(lost)) or 'everything'}.")
    return usage, told, boxes


def _boxes(body: str) -> Iterator[Box]:
    """The boxes; their frames are lines or, where the output takes no such signs, spaces and hyphens."""
    box: Box | None = None
    for line in body.splitlines():
        inner = line[2:].rstrip().removesuffix("│").rstrip()
        title = re.fullmatch(r"\W*? ([a-z][\w.-]*(?: [a-z][\w.-]*)*) ?[─\s╮]*", line)
        if title and (line[0] in "╭ " and line[1:2] != " ") and (title[1].endswith(("options", "arguments"))):
            if box:
                yield box
            box = Box(title[1])
        elif not inner.strip("─-╰╯│ "):
            if box and box.rows and all(not told for _, told in box.rows) and inner.strip():
                box.text, box.rows = " ".join(flag for flag, _ in box.rows), []
        elif box and not inner.startswith(" "):
            flag, _, told = inner.partition("  ")
            box.rows.append((flag.strip(), told.strip()))
        elif box and box.rows:
            flag, told = box.rows[-1]
            box.rows[-1] = (flag, f"{told} {inner.strip()}".strip())
    if box:
        yield box
