"""Short questions about words with WordNet's definitions as answers, from Debian's wordnet-base.

One question a word and one word a meaning, so that no answer lies in two splits. Words are those that occur in WordNet's
own counts of running text, in their first sense; definitions are short and carry no slur.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, debian
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_dialogues

SOURCE = debian(
    "wordnet-base",
    "1:3.0-37",
    "w/wordnet/wordnet-base_3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    6_467_132,
)
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SIZES = {"train": 2000, "validation": 200, "test": 400}
WORDS = range(3, 13)
"""Words a definition may have."""

_FOLDER = "usr/share/wordnet"
_RUDE = re.compile(r"offensive|vulgar|obscen|slur\b|slang|disparag|derogat|ethnic|sexual|prostitut|genital")


def write(folder: Path) -> None:
    files = contents(SOURCE, rf"{_FOLDER}/(data|index)\.({'|'.join(PARTS)})")
    text = {Path(name).name: content.decode("latin-1") for name, content in files.items()}
    words, meanings, rows = set(), set(), []
    for word, part, definition in definitions(text):
        if word not in words and definition not in meanings:
            words.add(word)
            meanings.add(definition)
            rows.append((f'What does the {part} "{word}" mean?', f"{definition[0].upper()}{definition[1:]}."))
    write_dialogues(folder, draw_splits(rows, SIZES))


def definitions(files: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(word, part of speech, definition) of the words that qualify.

    An index line is: word, part, senses, pointer kinds, their symbols, senses, counted senses, offsets of the senses, the
    most frequent first. A data line is: its offset, ..., then `` | `` and the definition with examples in quotes.
    """
    for part, name in PARTS.items():
        glosses = {
            line[:8]: line.partition(" | ")[2]
            for line in files[f"data.{part}"].splitlines()
            if not line.startswith(" ")
        }
        for line in files[f"index.{part}"].splitlines():
            fields = line.split()
            if line.startswith(" ") or not re.fullmatch(r"[a-z]{3,}", fields[0]):
                continue
            senses = int(fields[2])
            if int(fields[-senses - 1]) == 0:
                continue
            definition = _clean(glosses[fields[-senses]])
            if len(definition.split()) in WORDS and not _RUDE.search(definition):
                yield fields[0], name, definition


def _clean(gloss: str) -> str:
    definition = gloss.split('"')[0]
    definition = re.sub(r"\([^)]*\)", "", definition).split(";")[0]
    return re.sub(r"\s+", " ", definition).strip(" ,:-.")


ENTRY = Packaged(
    name="wordnet",
    kind="instructions",
    summary="what 2,600 words mean, in WordNet 3.0's definitions of 3 to 12 words",
    licence="WordNet 3.0 licence (permissive, with notice)",
    attribution="Princeton University, WordNet 3.0, copyright 2006; packaged by Debian",
    sources=(SOURCE,),
    write=write,
)
