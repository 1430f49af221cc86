"""Tables of examples as plain rows: CSV, TSV, JSONL, JSON and Parquet, one file, several, or a folder with splits.

Nothing is interpreted on the way: a CSV's ``NA`` or ``null`` is a word like any other, numbers keep their type where
the file has types. Every row knows where it came from.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, MissingExtraError, did_you_mean

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "validation", "test": "test"}
SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and ``where`` it stands (file and number, from 1)."""

    values: dict[str, Any]
    where: str


def read_splits(path: Path) -> dict[str, list[Row]]:
    """Rows by split (``train``, ``validation``, ``test``, as far as there are) of a file or a folder.

    A folder's files belong to the split their names begin with (``train.csv``, ``dev.jsonl``,
    ``test-00000-of-00002.parquet``); a single file, or a folder of one, is all ``train``. Raises DataError for what is
    missing, empty or cannot be read.
    """
    if path.is_file():
        return {"train": _some(read_rows(path), path)}
    if not path.is_dir():
        raise DataError(f"There is no data at {path}.{_near(path)}")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:SHOWN]) or "nothing"
        raise DataError(f"{path} holds no tables; known endings are {', '.join(SUFFIXES)}. It holds: {found}.")
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(split_of(file.stem), []).append(file)
    named.pop("", None)
    if len(files) == 1:
        named = {"train": files}
    if "train" not in named:
        names = ", ".join(file.name for file in files[:SHOWN])
        raise DataError(f"{path} has no file whose name begins with train; it holds {names}. Name one file instead.")
    return {split: [row for file in found for row in _some(read_rows(file), file)] for split, found in named.items()}


def split_of(stem: str) -> str:
    """The split a file or folder named ``stem`` belongs to, or "" (MNLI's mismatched files too: they are another task).

    Example:
        >>> split_of("dev"), split_of("test-00000-of-00002"), split_of("trainers")
        ('validation', 'test', '')
    """
    if "mismatched" in stem.lower():
        return ""
    return SPLITS.get(re.split(r"[-_.]", stem.lower(), maxsplit=1)[0], "")


def read_rows(path: Path) -> list[Row]:
    """The rows of one table. DataError names the file, and the line where it can."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is no table; known endings are {', '.join(SUFFIXES)}.")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def column(rows: Sequence[Row], name: str, flag: str) -> str:
    """``name`` if the rows have such a column; DataError lists those they have. ``flag`` is the setting to change."""
    known = list(dict.fromkeys(key for row in rows for key in row.values))
    if name not in known:
        raise DataError(
            f"The data has no column {name!r}.{did_you_mean(name, known)} Its columns are {', '.join(known)}; name "
            f"one with --{flag}."
        )
    return name


def counted(noun: str, names: Iterable[str], what: str) -> str:
    """A warning that counts what it is about and names the first few.

    Example:
        >>> counted("row", ["a.csv row 3"], "without a label and left out")
        '1 row without a label and left out: a.csv row 3.'
    """
    found = list(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{len(found):,} {noun}{'s' if len(found) != 1 else ''} {what}: {', '.join(found[:SHOWN])}{more}."


def _csv(path: Path) -> list[Row]:
    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=not tabs, **options)
        try:
            for number, values in enumerate(reader, 1):
                if None in values:
                    raise DataError(
                        f"{path} row {number} (line {reader.line_num}) has more fields than the {len(values) - 1} "
                        "columns of its first line. Put quotes around text that holds the separator."
                    )
                rows.append(Row(values, f"{path.name} row {number}"))
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not CSV: {error}.") from error
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
        rows.append(Row(_object(values, f"{path} line {number}"), f"{path.name} row {number}"))
    return rows


def _json(path: Path) -> list[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, not a {type(values).__name__}.")
    named = [(f"{path.name} row {number}", value) for number, value in enumerate(values, 1)]
    return [Row(_object(value, where), where) for where, value in named]


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("Reading Parquet needs pyarrow: pip install 'smidgen[tasks]'") from error
    try:
        found = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    return [Row(values, f"{path.name} row {number}") for number, values in enumerate(found, 1)]


def _object(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where} must be an object with named values, not {json.dumps(values)[:60]}.")
    return values


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path} is empty.")
    return rows


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" {path.parent} is not a folder either."
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
