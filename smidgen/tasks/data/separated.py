"""CSV and TSV as records: which separator and which quotes, decided by what makes every record as wide as the first.

The csv module reads; this file chooses its dialect, and what is unusual is said. (csv.Sniffer goes by characters that
repeat: of captions with commas it says that the letter e separates them.)
"""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError
from smidgen.tasks.data.decoding import Unusual

SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
STANDARD: dict[str, Any] = {"strict": True}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (  # tried when the standard does not fit
    ("", {"strict": True, "skipinitialspace": True}),
    ("quotes escaped by a backslash", {"strict": True, "escapechar": "\\", "doublequote": False}),
    ("single quotes around its fields", {"strict": True, "quotechar": "'"}),
)
LITERAL: dict[str, Any] = {"quoting": csv.QUOTE_NONE}


@dataclass(frozen=True)
class Records:
    """Fields of each record that is not blank, and the line each ends at, from 1."""

    fields: list[list[str]]
    lines: list[int]

    @property
    def fitting(self) -> float:
        """The share of records as wide as the first."""
        width = len(self.fields[0])
        return sum(_width(record, width) == width for record in self.fields) / len(self.fields)


def read_separated(path: Path, text: str, warnings: list[str]) -> list[dict[str, str | None]]:
    """Rows by the names of the first line. DataError names file, row, line and column of what does not fit."""
    said, text = _declared(text)
    if not text.strip():
        return []
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with _any_length(len(text)):
        separator = said or _separator(text, usual)
        records, how = _records(path, text, separator)
    notes = [f"{SEPARATORS.get(separator, repr(separator))} between its fields"] if separator != usual else []
    if notes or how:
        warnings.append(f"{path.name} is read with {' and '.join([*notes, *([how] if how else [])])}.")
    return _rows(path, records, warnings)


def plain_records(path: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a file that is CSV by the standard, or TSV without quotes, UTF-8, each record as wide as the first, read one by
    one; the same that :func:`read_separated` finds there. Raises Unusual for any other."""
    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", **LITERAL} if tabs else STANDARD
    with path.open(encoding="utf-8-sig", newline="") as file, _any_length(path.stat().st_size):
        records = (record for record in csv.reader(file, **options) if record)
        try:
            columns = [name.strip() for name in next(records, [])]
            other = any(char in name for name in columns for char in SEPARATORS) and len(columns) == 1
            if not all(columns) or len(set(columns)) < len(columns) or other or _all_in(columns, "'"):
                raise Unusual
            if columns and columns[0].lower().startswith("sep="):
                raise Unusual
            for record in records:
                if len(record) != len(columns) or (tabs and any('"' in field for field in record)):
                    raise Unusual
                yield dict(zip(columns, record, strict=True))
        except csv.Error:
            raise Unusual from None


def _declared(text: str) -> tuple[str, str]:
    """The separator that Excel's first line ``sep=;`` names, and the text after it."""
    first, _, rest = text.partition("\n")
    first = first.strip("\r ")
    return (first[4:], rest) if first.lower().startswith("sep=") and len(first) == 5 else ("", text)


@contextmanager
def _any_length(size: int) -> Iterator[None]:
    """Within, a field may be as long as the file: the csv module's own limit is 131,072."""
    before = csv.field_size_limit(max(size + 1, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _separator(text: str, usual: str) -> str:
    """The one that takes the first record apart and fits most records; the usual one when several do."""
    found: dict[str, float] = {}
    for separator in sorted(SEPARATORS, key=lambda char: char != usual):
        try:
            first: list[str] = next((record for record in _reader(text, separator, {}) if any(record)), [])
            if len(first) > 1:
                found[separator] = _parsed(text, separator, LITERAL if separator == "\t" else {}).fitting
        except csv.Error:
            continue
    return max(found, key=lambda separator: found[separator]) if found else usual


def _records(path: Path, text: str, separator: str) -> tuple[Records, str]:
    """The records, and what is unusual about their quotes."""
    if separator == "\t":
        return _tabbed(text), ""
    failure: csv.Error | None = None
    standard = None
    try:
        standard = _parsed(text, separator, STANDARD)
        if standard.fitting == 1 and not _all_in(standard.fields[0], "'"):
            return standard, ""
    except csv.Error as error:
        failure = error
    for how, options in VARIANTS:
        if '"' in text and options.get("quotechar") == "'":
            continue
        try:
            found = _parsed(text, separator, options)
        except csv.Error:
            continue
        if found.fitting == 1 and len(found.fields[0]) > 1:
            return found, how
    if standard is None:
        raise DataError(
            f"{path} {failure}. Put quotes around text that holds the separator, and double the quotes inside."
        )
    return standard, ""


def _tabbed(text: str) -> Records:
    """Tab-separated records. Quotes are letters, unless they are a writer's: around fields that hold a quote, a tab or a
    line end (as pandas writes them), or around every field."""
    literal = _parsed(text, "\t", LITERAL)
    if '"' not in text:
        return literal
    try:
        quoted = _parsed(text, "\t", STANDARD)
    except csv.Error:
        return literal
    if [len(record) for record in quoted.fields] != [len(record) for record in literal.fields]:
        return quoted if quoted.fitting == 1 else literal
    pairs = [pair for both in zip(quoted.fields, literal.fields, strict=True) for pair in zip(*both, strict=True)]
    unquoted = [value for value, raw in pairs if value != raw]
    everywhere = all(value != raw or _is_number(raw) or not raw for value, raw in pairs)
    needed = all(any(char in value for char in '"\t\r\n') for value in unquoted)
    return quoted if everywhere or needed else literal


def _parsed(text: str, separator: str, options: dict[str, Any]) -> Records:
    reader = _reader(text, separator, options)
    fields, lines = [], []
    try:
        for record in reader:
            if record:
                fields.append(record)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num} is not CSV: {error}") from error
    return Records(fields, lines)


def _reader(text: str, separator: str, options: dict[str, Any]) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, **options)


def _rows(path: Path, records: Records, warnings: list[str]) -> list[dict[str, str | None]]:
    names, rows = records.fields[0], records.fields[1:]
    columns = _columns(path, names, rows)
    found: list[dict[str, str | None]] = []
    short = []
    for number, (record, line) in enumerate(zip(rows, records.lines[1:], strict=True), 1):
        if _width(record, len(names)) > len(names):
            raise DataError(
                f"{path} row {number} (line {line}) has more fields than the {len(names)} columns of its first line: "
                f"after column {columns[-1] if columns else ''!r} there is {record[len(names)][:40]!r}. Put quotes around text that "
                "holds the separator."
            )
        if len(record) < len(names):
            short.append(number)
        padded: list[str | None] = [*record[: len(names)], *[None] * (len(names) - len(record))]
        found.append({name: value for name, value in zip(columns, padded, strict=True) if name})
    if short:
        shown = ", ".join(map(str, short[:8])) + (f" and {len(short) - 8} more" if len(short) > 8 else "")
        have = "1 row has" if len(short) == 1 else f"{len(short):,} rows have"
        warnings.append(f"{path.name}: {have} fewer fields than columns, and the rest of it is empty: row {shown}.")
    return found


def _columns(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The names of the columns; "" for one that has no name and holds nothing (as spreadsheets leave them)."""
    columns = [name.strip() for name in names]
    check_once(columns, f"{path} has")
    for at, name in enumerate(columns):
        if not name and any(len(row) > at and row[at].strip() for row in rows):
            columns[at] = f"column {at + 1}"
    return columns


def check_once(columns: Sequence[str], where: str) -> None:
    """Refuse a name that two columns have: which one was meant?"""
    doubled = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    if doubled:
        at = [str(number) for number, name in enumerate(columns, 1) if name == doubled[0]]
        raise DataError(
            f"{where} the column {doubled[0]!r} {len(at)} times (columns {', '.join(at)}). Rename or remove one."
        )


def _width(record: Sequence[str], columns: int) -> int:
    """How many fields a record has, empty ones beyond the columns not counted."""
    width = len(record)
    while width > columns and not record[width - 1].strip():
        width -= 1
    return width


def _all_in(record: Sequence[str], quote: str) -> bool:
    return all(len(field) > 1 and field[0] == field[-1] == quote for field in record)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
