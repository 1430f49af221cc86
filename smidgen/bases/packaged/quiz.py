"""General knowledge in a word or two (capitals, young animals, opposites, elements), from the quiz of Debian's bsdgames.

A line of the quiz is ``question:answer``; ``[a|b]`` and ``a|b`` are alternatives, ``{...}`` may be left out.
"""

import re
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, debian
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_dialogues

SOURCE = debian(
    "bsdgames",
    "2.17-29+b1",
    "b/bsdgames/bsdgames_2.17-29+b1_amd64.deb",
    "cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10",
    968_844,
)
_FOLDER = "usr/share/games/bsdgames/quiz"
_CAPITAL = ("What is the capital of {}?", 0, 1)
QUESTIONS = {  # file: question, field asked about, field answered
    "europe": _CAPITAL,
    "africa": _CAPITAL,
    "asia": _CAPITAL,
    "america": _CAPITAL,
    "state": _CAPITAL,
    "province": _CAPITAL,
    "babies": ("What is a young {} called?", 1, 0),
    "collectives": ("What is a group of {} called?", 0, 1),
    "sexes": ("What is the female of {}?", 0, 1),
    "posneg": ("What is the opposite of {}?", 0, 1),
    "elements": ("Which element has the symbol {}?", 0, 3),
    "flowers": ("What does the flower {} stand for?", 0, 1),
    "latin": ("What does the Latin word {} mean?", 0, 1),
    "midearth": ("In Middle-earth, what is the capital of {}?", 0, 1),
}
SIZES = {"train": 1000, "validation": 100, "test": 250}
"""Shrunk in proportion to what is there."""


def write(folder: Path) -> None:
    files = contents(SOURCE, rf"{_FOLDER}/({'|'.join(QUESTIONS)})")
    pairs: dict[str, str] = {}
    for name, (question, asked, answered) in QUESTIONS.items():
        for line in files[f"{_FOLDER}/{name}"].decode("latin-1").splitlines():
            fields = [plain(field) for field in line.split(":")]
            if len(fields) > max(asked, answered) and fields[asked] and fields[answered]:
                answer = fields[answered]
                pairs.setdefault(question.format(fields[asked]), f"{answer[0].upper()}{answer[1:]}.")
    write_dialogues(folder, draw_splits(pairs.items(), SIZES))


def plain(field: str) -> str:
    """The first spelling of a field.

    Example:
        >>> plain("Andorra la V[ell|iej]a"), plain("{I }[loose|destroy]"), plain("lion|tiger")
        ('Andorra la Vella', 'loose', 'lion')
    """
    while (shorter := re.sub(r"\{[^{}]*\}", "", field)) != field:
        field = shorter
    field = re.sub(r"\[([^|\]]*)[^\]]*\]", r"\1", field)
    return field.split("|")[0].strip(" \\")


ENTRY = Packaged(
    name="quiz",
    kind="instructions",
    summary="capitals, young animals, opposites, elements and more, answered in a word or two",
    licence="BSD-3-Clause",
    attribution="The Regents of the University of California (quiz); packaged by Debian",
    sources=(SOURCE,),
    write=write,
)
