"""Every fenced block of README and docs: Python and data are run, commands parsed by the real parsers; the slow tests run the pages as
they stand, from top to bottom. How is said in tests/docs/pages.py."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path

import pytest

from docsite.navigation import LATER
from tests.docs.blocks import SHELLS, Block, blocks_of, commands, pages, parse, programs, run_python, run_shell
from tests.docs.pages import PAGES, SKIPPED, Page

BLOCKS = [block for page in pages() for block in blocks_of(page) if str(block) not in SKIPPED]
HERE = sorted({block.page for block in BLOCKS if not PAGES.get(block.page, Page()).elsewhere})
COMMANDS = [block for block in BLOCKS if block.kind in SHELLS]


def row(page: str) -> Page:
    return PAGES.get(page, Page())


def state(block: Block) -> str:
    """run, parsed or skipped: what the tests of this folder, fast and slow, do with a block."""
    if str(block) in SKIPPED:
        return "skipped"
    own = row(block.page)
    if (
        block.kind in SHELLS
        and not own.elsewhere
        and (not own.runs_commands or any(word in block.text for word in own.parsed))
    ):
        return "parsed"
    return "run"


def shorter(block: Block) -> str:
    """A block with what its page's row makes smaller."""
    text = block.text
    for long, short in row(block.page).smaller.items():
        text = text.replace(long, short)
    return text


def lacks(block: Block) -> list[str]:
    """The packages that a block needs and that are not installed here."""
    needs = [name for word, names in row(block.page).needs.items() if word in block.text for name in names]
    return [name for name in needs if find_spec(name) is None]


def go_through(page: str, with_commands: bool, bin_folder: Path | None = None) -> None:
    """Run a page's blocks in the present folder, in order."""
    own, reads = row(page), list(row(page).reads)
    left_out = [block for block in blocks_of(page) if block.kind == "python" and lacks(block)]
    names: dict = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as names["stack"]:
        exec(compile(own.before, f"before {page}", "exec"), names)
        for block in blocks_of(page):
            if str(block) in SKIPPED or block in left_out:
                continue
            if block.kind in SHELLS:
                if with_commands and state(block) == "run":
                    assert bin_folder is not None
                    run_shell(shorter(block), bin_folder)
            elif block.kind == "python":
                if with_commands or not own.slow:
                    run_python(block, shorter(block), {"__name__": "__main__"} if own.apart else names)
            else:
                assert reads, (
                    f"{block}: a block of {block.kind or 'no language'}; say in tests/docs/pages.py what reads it"
                )
                exec(compile(reads.pop(0), f"reader of {block}", "exec"), names | {"text": block.text})
    assert not reads, f"{page} has fewer blocks of data than tests/docs/pages.py reads"
    if left_out:
        pytest.skip("; ".join(f"{block}: {', '.join(lacks(block))} not installed" for block in left_out))


def test_all_blocks_are_accounted_for() -> None:
    states = [state(block) for block in BLOCKS] + ["skipped"] * len(SKIPPED)
    print({name: states.count(name) for name in ("run", "parsed", "skipped")})
    assert len(SKIPPED) <= 5 and all(SKIPPED.values())
    known = {str(block) for page in pages() for block in blocks_of(page)}
    assert set(SKIPPED) <= known and set(PAGES) <= {*pages(), *(f"docs/{name}" for name in LATER)}
    for page, own in PAGES.items():
        if not (Path(__file__).parents[2] / page).exists():
            continue  # a page that is to come
        text = "".join(block.text for block in blocks_of(page))
        lost = [word for word in (*own.parsed, *own.smaller) if word not in text]
        assert not lost, f"{page}: tests/docs/pages.py speaks of {lost}, which no block has"
        assert not own.elsewhere or Path(__file__).parents[2].joinpath(own.elsewhere).read_text().count(Path(page).name)


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_are_taken_by_their_parsers(block: Block, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(block.text):
        parse(words)


@pytest.mark.parametrize("page", [page for page in HERE if not row(page).slow or row(page).reads])
def test_python_and_data(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    go_through(page, with_commands=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in HERE if row(page).slow or row(page).runs_commands])
def test_the_page_as_it_stands(page: str, tmp_path, monkeypatch, users_cache) -> None:
    bin_folder = programs(tmp_path / "bin")
    monkeypatch.chdir(tmp_path)
    go_through(page, with_commands=True, bin_folder=bin_folder)
