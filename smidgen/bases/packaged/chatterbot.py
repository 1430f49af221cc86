"""Small talk and facts, one question with one answer, from the English part of the wheel chatterbot-corpus."""

import re
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_dialogues
from smidgen.bases.packaged.texts import bare

SOURCE = Source(
    registry="pypi",
    package="chatterbot-corpus",
    version="1.3.3",
    url="https://files.pythonhosted.org/packages/77/2a/6b6576acf8a0050f3066cc87ee4401c87840385003c60f46f145d6265b0c/"
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    size=345_706,
)
OMITTED = {"conversations", "health", "tech_support"}
"""Talk that goes on over many turns, and one file that repeats itself."""

SIZES = {"train": 1000, "validation": 100, "test": 200}
"""Shrunk in proportion to what is there."""

_LONGEST = 300


def write(folder: Path) -> None:
    import yaml

    first: dict[str, tuple[str, str]] = {}
    for name, content in contents(SOURCE, r"chatterbot_corpus/data/english/\w+\.yml").items():
        if Path(name).stem in OMITTED:
            continue
        for talk in yaml.safe_load(content)["conversations"]:
            question, answer = (_line(turn) for turn in (*talk, "", "")[:2])
            if answer and len(answer) <= _LONGEST and "```" not in answer:
                first.setdefault(bare(question), (question, answer))
    write_dialogues(folder, draw_splits((row for key, row in first.items() if key), SIZES))


def _line(turn: object) -> str:
    return re.sub(r"\s+", " ", str(turn)).strip()


ENTRY = Packaged(
    name="chatterbot",
    kind="instructions",
    summary="small talk and facts in one turn, of mixed quality; programs are left out",
    licence="BSD-3-Clause",
    attribution="Gunther Cox and contributors (chatterbot-corpus)",
    sources=(SOURCE,),
    write=write,
)
