"""Tables of examples as plain rows: CSV, TSV, JSONL, JSON and Parquet, one file, several, or a folder with splits.

Nothing is interpreted on the way: a CSV's ``NA`` or ``null`` is a word like any other, numbers keep their type where
the file has types. Every row knows where it came from.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, MissingExtraError, did_you_mean
from smidgen.tasks.data.decoding import Unusual, mended, read_text
from smidgen.tasks.data.objects import plain_objects, read_objects
from smidgen.tasks.data.separated import check_once, plain_records, read_separated

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "validation", "test": "test", "testing": "test"}
SPLITS |= {f"{name}set": split for name, split in SPLITS.items()}
SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and ``where`` it stands (file and number, from 1)."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Table:
    """A table's columns, how many rows it has, and a way to read them, which may be gone more than once."""

    columns: list[str]
    count: int
    read: Callable[[], Iterator[Row]]


def read_splits(path: Path, warnings: list[str] | None = None) -> dict[str, list[Row]]:
    """Rows by split (``train``, ``validation``, ``test``, as far as there are) of a file or a folder.

    A folder's files belong to the split their names begin with (``train.csv``, ``dev.jsonl``,
    ``test-00000-of-00002.parquet``); a single file, or a folder of one, is all ``train``. What was guessed or mended is
    appended to ``warnings``. Raises DataError for what is missing, empty or cannot be read.
    """
    if path.is_file():
        return {"train": _some(read_rows(path, warnings), path)}
    if not path.is_dir():
        raise DataError(f"There is no data at {path}.{_near(path)}")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:SHOWN]) or "nothing"
        raise DataError(f"{path} holds no tables; known endings are {', '.join(SUFFIXES)}. It holds: {found}.")
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(split_of(file.stem), []).append(file)
    other = [
        file.name for file in named.pop("", []) if "mismatched" not in file.stem.lower()
    ]  # which has a split's name
    if len(files) == 1:
        named, other = {"train": files}, []
    if "train" not in named:
        names = ", ".join(file.name for file in files[:SHOWN])
        raise DataError(f"{path} has no file whose name begins with train; it holds {names}. Name one file instead.")
    if other and warnings is not None:
        warnings.append(
            counted("table", other, "left out, with names that begin with no split (train, validation, test)")
        )
    return {
        split: [row for file in found for row in _some(read_rows(file, warnings), file)]
        for split, found in named.items()
    }


def split_of(stem: str) -> str:
    """The split a file or folder named ``stem`` belongs to, or "" (MNLI's mismatched files too: they are another task).

    Example:
        >>> split_of("dev"), split_of("test-00000-of-00002"), split_of("trainers")
        ('validation', 'test', '')
    """
    if "mismatched" in stem.lower():
        return ""
    return SPLITS.get(re.split(r"[-_.\d]", stem.lower(), maxsplit=1)[0], "")


def read_rows(path: Path, warnings: list[str] | None = None) -> list[Row]:
    """The rows of one table; what was guessed, mended or left empty is appended to ``warnings``.

    DataError names the file, and the row, line and column where it can.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
        >>> path.write_text("file_name;text\\np0.png;a portrait, smiling\\n")
        42
        >>> warnings = []
        >>> read_rows(path, warnings)[0].values, warnings[0]
        ({'file_name': 'p0.png', 'text': 'a portrait, smiling'}, 'a.csv is read with a semicolon between its fields.')
    """
    readers = {".csv": _separated, ".tsv": _separated, ".jsonl": read_objects, ".json": read_objects}
    readers[".parquet"] = _parquet
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is no table; known endings are {', '.join(SUFFIXES)}.")
    warnings = [] if warnings is None else warnings
    try:
        found = reader(path, warnings)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows, damaged = [], []
    for number, values in enumerate(found, 1):
        where = f"{path.name} row {number}"
        whole, broken = mended(values)
        if broken:
            damaged += [f"{where} column {name!r}" for name, value in values.items() if mended({name: value})[1]]
        rows.append(Row(whole, where))
    if damaged:
        warnings.append(counted("cell", damaged, "with half a character, a broken byte or a NUL, read as U+FFFD"))
    return rows


def open_table(path: Path, warnings: list[str] | None = None) -> Table:
    """A table that is read row by row at each pass, in little memory. One that has to be guessed at or mended, or is no table
    of rows one after the other, is read whole by :func:`read_rows`, which see.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> path.write_text('{"text": "good"}\\n{"text": "bad", "id": 3}\\n')
        43
        >>> table = open_table(path)
        >>> table.columns, table.count, [row.where for row in table.read()]
        (['text', 'id'], 2, ['a.jsonl row 1', 'a.jsonl row 2'])
    """
    readers = {".csv": plain_records, ".tsv": plain_records, ".jsonl": plain_objects, ".json": plain_objects}
    readers[".parquet"] = _parquet_rows
    reader = readers.get(path.suffix.lower())
    if reader is not None:
        columns: dict[str, None] = {}
        count = 0
        try:
            for values in reader(path):
                if mended(values)[1]:
                    raise Unusual
                columns.update(dict.fromkeys(values))
                count += 1
        except (Unusual, OSError, ValueError):  # read_rows knows what to say
            count = 0
        if count > 1:  # a lone object may stand for many rows

            def read() -> Iterator[Row]:
                for number, values in enumerate(reader(path), 1):
                    yield Row(values, f"{path.name} row {number}")

            return Table(list(columns), count, read)
    rows = read_rows(path, warnings)
    return Table(list(dict.fromkeys(key for row in rows for key in row.values)), len(rows), lambda: iter(rows))


def column(rows: Sequence[Row], name: str, flag: str) -> str:
    """``name`` if the rows have such a column; DataError lists those they have. ``flag`` is the setting to change."""
    return known_column(list(dict.fromkeys(key for row in rows for key in row.values)), name, flag)


def known_column(known: Sequence[str], name: str, flag: str) -> str:
    """``name`` if it is one of the ``known`` columns; else as :func:`column`."""
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


def structured(value: Any) -> Any:
    """A list or an object that a cell holds as text, as JSON or as Python writes it; anything else as it is.

    Nothing is run: literals alone are read. Texts side by side, as NumPy writes a list of them, stay text: Python would
    join them.

    Example:
        >>> structured('["x", "y"]'), structured("['x', None]"), structured("['x' 'y']"), structured("[sic]")
        (['x', 'y'], ['x', None], "['x' 'y']", '[sic]')
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        words = [token.type for token in tokenize.generate_tokens(io.StringIO(value.strip()).readline)]
        if any(pair == (tokenize.STRING, tokenize.STRING) for pair in pairwise(words)):
            return value
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value


def _separated(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    return read_separated(path, read_text(path, warnings), warnings)


def _parquet(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    return list(_parquet_rows(path))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("Reading Parquet needs pyarrow: pip install 'smidgen[tasks]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_once(file.schema_arrow.names, f"{path} has")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path} is empty.")
    return rows


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" {path.parent} is not a folder either."
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
