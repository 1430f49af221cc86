"""The pages in one folder: those of docs/, README and CHANGELOG, with their marks filled, and those that are generated.

A mark is a line ``<!-- build: NAME WORDS -->``. It shows nothing where the page is read in the repository.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from docsite import DOCS, ROOT, commands, measured, members
from smidgen.errors import SmidgenError

FILLERS = {"method": members.method, "measured": measured.of_method, "tables": measured.every}
MARK = re.compile(r"^<!-- build: (\w+) ?(.*?) -->$", re.M)
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")


def stage(pages: Path) -> None:
    """Everything that Zensical reads, in ``pages``."""
    from docsite import api  # needs griffe, which the extra docs brings

    shutil.copytree(DOCS, pages)
    for page in [*pages.rglob("*.md")]:
        page.write_text(_with_files(filled(page.read_text()), DOCS / page.relative_to(pages), page, pages))
    for source, name in (("README.md", "index.md"), ("CHANGELOG.md", "changelog.md")):
        text = (ROOT / source).read_text().replace("](docs/", "](")
        (pages / name).write_text(_with_files(text, ROOT / "docs" / name, pages / name, pages))
    for folder, made in (("commands", commands.pages()), ("api", api.pages()), ("decisions", decisions(pages))):
        (pages / folder).mkdir(exist_ok=True)
        for name, text in made.items():
            (pages / folder / name).write_text(text)
    shutil.copytree(ROOT / "docsite" / "assets", pages / "assets")


def decisions(pages: Path) -> dict[str, str]:
    """The list of decisions."""
    files = sorted(pages.joinpath("decisions").glob("*.md"))
    titles = [(path.read_text().partition("\n")[0].removeprefix("# "), path.name) for path in files]
    told = "What was decided, why, and what else was tried: for what is not obvious from the code."
    return {
        "index.md": "\n".join(
            ["# Decisions", "", told, "", *(f"- [{t}]({name})".replace(". ", "\\. ", 1) for t, name in titles), ""]
        )
    }


def filled(text: str) -> str:
    """A page with its marks filled.

    Raises:
        SmidgenError: a mark that nothing fills.
    """

    def fill(found: re.Match[str]) -> str:
        name, words = found[1], found[2].split()
        if name not in FILLERS:
            raise SmidgenError(f"Nothing fills the mark {found[0]!r}. Known: {', '.join(FILLERS)}.")
        return FILLERS[name](*words)

    return MARK.sub(fill, text)


def _with_files(text: str, source: Path, page: Path, pages: Path) -> str:
    """Files of the repository outside docs/ that a page links to come along, and the links lead to them."""

    def follow(found: re.Match[str]) -> str:
        start, target, anchor = found[1], found[2], found[3] or ""
        if target.endswith("/") and "://" not in target:
            return f"{start}{target}index.md{anchor})"
        file = (source.parent / target).resolve()
        if "://" in target or not file.is_file() or DOCS in file.parents or ROOT not in file.parents:
            return found[0]
        copy = pages / "files" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        return f"{start}{os.path.relpath(copy, page.parent)}{anchor})"

    return _LINK.sub(follow, text)


def configure(work: Path, navigation: list[dict[str, Any]]) -> None:
    """docsite/site.yml with what only a build knows, as the file that Zensical reads."""
    settings = yaml.safe_load((ROOT / "docsite" / "site.yml").read_text())
    settings |= {"nav": navigation, "docs_dir": "pages", "site_dir": "site"}
    settings["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    (work / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
