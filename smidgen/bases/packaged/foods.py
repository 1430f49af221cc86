"""Amazon reviews of fine foods, great or other, from Debian's r-cran-modeldata, read without R.

An R package keeps its data lazily: an index (``Rdata.rdx``, a gzipped serialised list) says where in ``Rdata.rdb`` each
object lies: four bytes of length, then its serialisation as a zlib stream, or after a ``Z`` as raw LZMA2.
"""

import gzip
import lzma
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

from smidgen.bases.packaged.entry import Packaged, debian
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, needs_extra, write_table
from smidgen.bases.packaged.texts import bare, distinct

SOURCE = debian(
    "r-cran-modeldata",
    "1.1.0-1",
    "r/r-cran-modeldata/r-cran-modeldata_1.1.0-1_all.deb",
    "66c2e08bb4bf695d972b1e72ea44d5af9ada3c42841793d3871017f7b896bf95",
    4_253_384,
)
SIZES = {"train": 3400, "validation": 500}
_DATA = "usr/lib/R/site-library/modeldata/data/Rdata"
_BREAK = re.compile(r"(<br />)+")
_SAME = 120
"""Letters two reviews must share from their start to be the same."""


def write(folder: Path) -> None:
    """The package's own test rows stay the test split; its training rows give the other two."""
    train, test = (distinct(rows, _SAME) for rows in read_reviews())
    tested = {bare(text, _SAME) for text, _ in test}
    rest = [row for row in train if bare(row[0], _SAME) not in tested]
    write_table(folder, {**draw_splits(rest, SIZES), "test": test})


def read_reviews() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(review, great or other) of the package's training and test data."""
    try:
        import rdata
    except ImportError as error:
        raise needs_extra("Reading foods", "rdata") from error
    files = contents(SOURCE, rf"{_DATA}\.rd[xb]")

    def convert(content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes of R that have no twin in Python, none of which is wanted
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    index = convert(gzip.decompress(files[f"{_DATA}.rdx"]))["variables"]
    tables = []
    for name in ("training_data", "testing_data"):
        start, length = (int(number) for number in index[name])
        table = convert(_unpacked(files[f"{_DATA}.rdb"][start + 4 : start + length]))
        tables.append(
            [(_BREAK.sub(" ", text), str(label)) for text, label in zip(table["review"], table["score"], strict=True)]
        )
    return tables[0], tables[1]


def _unpacked(content: bytes) -> bytes:
    if not content.startswith(b"Z"):
        return zlib.decompress(content)
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]).decompress(
        content[1:]
    )


ENTRY = Packaged(
    name="foods",
    kind="text",
    summary="Amazon reviews of fine foods, great (five stars) or other",
    licence="MIT",
    attribution="Max Kuhn and RStudio (modeldata), after McAuley and Leskovec (2013); packaged by Debian",
    sources=(SOURCE,),
    write=write,
)
