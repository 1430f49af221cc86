"""The documentation site: what is generated, where pages stand, and that the checks of finished pages find what is wrong."""

import re

import pytest

from docsite import DOCS, checks, commands, measured, staging
from docsite.navigation import LATER, SECTIONS, navigation
from smidgen.adapters.methods import known_methods
from smidgen.cli.table import COMMANDS
from smidgen.errors import SmidgenError

GENERATED = ("index.md", "changelog.md", "commands/", "api/")


@pytest.fixture
def pages(tmp_path):
    """Empty pages at every place."""
    names = [name for section in SECTIONS.values() for name in section]
    there = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    for name in [*there, *(f"{name}index.md" if name.endswith("/") and name != "methods/" else name for name in names)]:
        if not name.endswith("/") and (name not in LATER or name in there):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("# A page\n")
    return tmp_path


def test_every_page_has_a_place(pages) -> None:
    found = navigation(pages)
    named = [
        name
        for section in found
        for inside in section.values()
        for name in ([inside] if isinstance(inside, str) else inside)
    ]
    assert len(named) == len(set(named)) and {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= set(named)
    outside = {name for section in SECTIONS.values() for name in section if not (DOCS / name).exists()}
    assert outside <= {*GENERATED, *LATER}


def test_a_place_without_a_page_and_a_page_without_a_place_are_errors(pages) -> None:
    (pages / "bank.md").rename(pages / "bench.md")
    with pytest.raises(SmidgenError, match=r"pages that are not there: bank.md"):
        navigation(pages)
    (pages / "bank.md").write_text("# Back\n")
    with pytest.raises(SmidgenError, match=r"without a place in the navigation .*: bench.md"):
        navigation(pages)


def test_every_command_has_a_page_with_all_its_flags() -> None:
    made = commands.pages()
    assert len(made) == len(COMMANDS) + 1
    for name in COMMANDS:
        wanted = set(re.findall(r"^[│ ] (--[a-z][\w.-]*)", commands.help_of(name), re.M))
        page = made[f"{name.replace(' ', '-')}.md"]
        assert wanted <= set(re.findall(r"--[a-z][\w.-]*", " ".join(re.findall(r"^`(.*)`$", page, re.M)))), name


def test_a_help_text_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(SmidgenError, match="in no box: everything"):
        commands.read("usage: smidgen x\n\nDoes x.\n")


@pytest.mark.parametrize("name", [m.name for m in known_methods()])
def test_every_method_has_a_page(name: str) -> None:
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert {f"method {name}", f"measured {name}"} == {" ".join(found) for found in staging.MARK.findall(page)}
    filled = staging.filled(page)
    assert "## Formula" in filled and "## When to use it" in filled and "| kind of task |" in filled


def test_tables_say_what_the_results_say() -> None:
    assert "| **`svfit`** | **5,376** | **22,535** | **0.80 [0.75, 0.84]** |" in measured.table("personalize", "svfit")
    assert all(made.title in measured.every() for made in measured.TABLES.values())
    readme = (DOCS.parent / "README.md").read_text()
    lines = measured.table("personalize").splitlines()
    shown = [
        line.partition("|")[2].partition("|")[2] for line in lines if re.match(r"\| (`(tlora|svfit|loldu)`|peft)", line)
    ]
    assert len(shown) == 5 and [cells for cells in shown if cells not in readme] == []
    with pytest.raises(SmidgenError, match="There is no table 'nothing'"):
        measured.table("nothing")
    with pytest.raises(SmidgenError, match="Nothing fills the mark"):
        staging.filled("<!-- build: nothing at all -->")


@pytest.mark.parametrize("body, fault", [
    ('<a href="gone.html">x</a>', "leads to gone.html, which is not there"),
    ('<a href="other.html#gone">x</a>', "leads to other.html#gone, a page without that heading"),
    ('<a href="#gone">x</a>', "leads to #gone, a page without that heading"),
    ('<img src="gone.png">', "leads to gone.png, which is not there"),
    ('<img src="https://example.org/a.png">', "fetches https://example.org/a.png"),
    ('<script src="//cdn.example.org/a.js"></script>', "fetches //cdn.example.org/a.js"),
    ('<link rel="stylesheet" href="https://fonts.example.org/a">', "fetches https://fonts.example.org/a"),
    ("<p>checkpoint-<step></p>", "<step> is no tag of HTML"),
    ("<p>three things:\n- one\n- two</p>", "markup in a paragraph"),
    ("<p>a table:\n| a | b |\n|---|---|</p>", "markup in a paragraph"),
    ('<p>|a - b| and <code>x</code> <a href="other.html#there">x</a> <a href="https://example.org">out</a></p>', ""),
])  # fmt: skip
def test_faults_of_pages_are_found(body: str, fault: str, tmp_path) -> None:
    (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "other.html").write_text('<html><body><h2 id="there">x</h2></body></html>')
    found = checks.faults(tmp_path)
    assert (len(found) == 1 and fault in found[0]) if fault else not found


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch) -> None:
    pytest.importorskip("zensical", reason="make docs installs it")
    from docsite.__main__ import main

    assert main(tmp_path / "docs") == 0
    page = (tmp_path / "docs" / "site" / "api" / "smidgen.adapters.html").read_text()
    assert 'class="gp">&gt;&gt;&gt; </span>' in page  # `Example:` became code with prompts
    assert "Raises:" in page and ":func:" not in page
