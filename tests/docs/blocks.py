"""The fenced blocks of README and docs, and how one is run or read."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from smidgen.cli.build import call_of
from smidgen.cli.table import GROUPS, find

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)
SHELLS = ("sh", "bash")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line there, language and text."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README and everything in docs/, as paths from the root."""
    return ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def blocks_of(page: str) -> list[Block]:
    """The blocks of one page."""
    text = (ROOT / page).read_text()
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[2], m[3]) for m in FENCE.finditer(text)]


def run_python(block: Block, text: str, names: dict) -> None:
    """A block in the names of its page; tracebacks show the page's own line numbers."""
    exec(compile("\n" * block.line + text, str(ROOT / block.page), "exec"), names)


def run_shell(text: str, bin_folder: Path) -> str:
    """A block as a user types it, by bash in the present folder; what it printed."""
    words = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-ec", text], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def programs(folder: Path) -> Path:
    """A folder for PATH with this checkout's ``smidgen`` and ``python``, and a ``make`` that does what the rule's ``smidgen`` lines say:
    everything but setting up an environment."""
    scripts = {
        "smidgen": f'exec {sys.executable} -m smidgen "$@"',
        "python": f'exec {sys.executable} "$@"',
        "make": f'/usr/bin/make -n -C {ROOT} "$@" BIN=. | grep "^[A-Z_=0-9a-z ]*./smidgen " | sed "s# ./smidgen # smidgen #" | bash -e',
    }
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\nset -eo pipefail\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell block; comments and continued lines as the shell takes them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def parse(words: list[str]) -> None:
    """One command through the parser of the program that would read it; raises where that would refuse it."""
    program, rest = words[0], words[1:]
    PARSERS[program](rest)


def _smidgen(words: list[str]) -> None:
    group, rest = (words[0], words[1:]) if words[0] in GROUPS else ("", words)
    name, given = find(rest[0], group), rest[1:]
    for flag in ("--config", "--from-adapter"):  # files of the reader's, which are not here
        if flag in given and not Path(given[given.index(flag) + 1]).exists():
            at = given.index(flag)
            with mock.patch("smidgen.tasks.going_on.starting", lambda start, folder: start):
                return _smidgen([*words[: len(words) - len(given)], *given[:at], *given[at + 2 :]])
    call_of(name, given)


def _make(words: list[str]) -> None:
    told = subprocess.run(["make", "-n", "-C", str(ROOT), *words], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for word in words:
        name, _, value = word.partition("=")
        assert name != "NAME" or (ROOT / "benchmarks" / f"{value}.py").is_file(), word


def _pip(words: list[str]) -> None:
    import tomllib

    from pip._internal.commands.install import InstallCommand

    options, arguments = InstallCommand("install", "").parse_args(words[1:])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in [*options.editables, *arguments]:
        for extra in re.findall(r"[\w-]+", word.partition("[")[2]):
            assert extra in extras, word


def _python(words: list[str]) -> None:
    assert words[0] == "-m" and find_spec(words[1]), words
    flags = {word for word in words[2:] if word.startswith("--")}
    assert flags <= set(re.findall(r"--[\w-]+", _help(words[1]))), flags


@cache
def _help(module: str) -> str:
    out = io.StringIO()
    with mock.patch("sys.argv", [module, "--help"]), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    return out.getvalue()


def _accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and given.module and find_spec(given.training_script)
    assert not given.config_file or (ROOT / given.config_file).is_file()
    rest = [word for word in given.training_script_args if word != "..."]
    assert rest[0] in GROUPS or find(rest[0])


PARSERS = {
    "smidgen": _smidgen,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "accelerate": _accelerate,
    ".": lambda words: None,
}
