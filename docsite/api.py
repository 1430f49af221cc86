"""A page for each package of the library, from its docstrings, and one with the names of ``import smidgen``."""

from pathlib import Path

import griffe

import smidgen
from docsite import ROOT
from docsite.docstrings import read

LEFT_OUT = ("smidgen.cli", "smidgen.lab")  # commands have their own pages; nothing imports the laboratory


def pages() -> dict[str, str]:
    """The pages by file name."""
    made = {"index.md": names()}
    for folder in sorted(path.parent for path in (ROOT / "smidgen").rglob("__init__.py")):
        package = ".".join(folder.relative_to(ROOT).parts)
        if package != "smidgen" and not f"{package}.".startswith(tuple(f"{name}." for name in LEFT_OUT)):
            made[f"{package}.md"] = page(package, folder)
    return made


def names() -> str:
    """What ``import smidgen`` gives, a line each."""
    loaded = griffe.load("smidgen", search_paths=[str(ROOT)])
    rows = []
    for name in smidgen.__all__:
        module = smidgen._LATER.get(name, "smidgen.errors")
        found = loaded[f"{module.removeprefix('smidgen.')}.{name}"]
        told = read(found.docstring.value.partition("\n")[0], found) if found.docstring else ""
        rows.append(f"| [`{name}`][{module}.{name}] | {told.replace('|', chr(92) + '|')} |")
    told = loaded.docstring.value.partition("\n\n")[2].partition("\n\n")[0] if loaded.docstring else ""
    lines = ["# import smidgen", "", told, "", "| name | what it is |", "|---|---|", *rows, "", "::: smidgen.errors"]
    return "\n".join(lines) + "\n"


def page(package: str, folder: Path) -> str:
    """A package's page: itself, then its modules."""
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    blocks = [f"# {package.removeprefix('smidgen.')}", f"::: {package}\n    options:\n      show_root_heading: false"]
    blocks += [f"::: {package}.{module}" for module in modules]
    return "\n\n".join(blocks) + "\n"
