"""Tables that describe pictures, ``metadata.jsonl`` and its like: a row a picture, which ``file_name`` names.

Every mistake is an error with file, row and column, or a warning that counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data.listing import Listing
from smidgen.tasks.data.pixels import known_endings, why_unread
from smidgen.tasks.data.tables import Row, counted, read_rows, structured
from smidgen.tasks.png import written_by_smidgen

LONGEST = 255  # bytes of a file's name that every system takes
FILE, TEXT, CONTROL = "file_name", "text", "control_file_name"
SAME_AS_TEXT = ("caption", "captions", "prompt", "description")


@dataclass(frozen=True)
class Entry:
    """A picture's row: the file, the values by column, and where the row stands."""

    path: Path
    values: dict[str, Any]
    where: str


def read_entries(found: Listing, table: Path, warnings: list[str]) -> list[Entry]:
    """The rows of ``table`` with the files they name, each once.

    Raises:
        DataError: no rows, no column ``file_name``, a row without one, a file that is not there, not below the folder or
            no picture.
    """
    rows = read_rows(table, warnings)
    if not rows:
        raise DataError(f"{table} is empty.")
    columns = columns_of(rows)
    if FILE not in columns:
        raise DataError(f"{table} has no column {FILE!r}; it has {columns}.{did_you_mean(FILE, columns)}")
    without = [row.where for row in rows if not isinstance(row.values.get(FILE), str) or not row.values[FILE].strip()]
    if without:
        raise DataError(f"{table}: " + counted("row", without, f"that names no picture in the column {FILE!r}"))
    entries = [Entry(_place(found, table, row, FILE), row.values, row.where) for row in rows]
    _check_there(found, table, [(entry.path, entry.where) for entry in entries])
    ours = [found.name(entry.path) for entry in entries if written_by_smidgen(entry.path)]
    if ours:
        warnings.append(counted("picture", ours, f"named in {table.name} but written by Smidgen, left out"))
    return [entry for entry in entries if found.name(entry.path) not in ours]


def caption_column(table: Path, columns: Sequence[str], warnings: list[str]) -> str | None:
    """The column that holds captions: ``text``, or the one that goes by another usual name; None without."""
    if TEXT in columns:
        chosen = TEXT
    else:
        near = [name for name in columns if name.strip().lower() in (TEXT, *SAME_AS_TEXT)]
        if len(near) > 1:
            raise DataError(f"{table} has no column {TEXT!r}, and {' and '.join(near)} both may be it. Rename one.")
        chosen = near[0] if near else ""
        if chosen:
            warnings.append(f"{table.name}: {chosen!r} is read as the captions, as there is no column {TEXT!r}.")
    unknown = [column for column in columns if column not in (FILE, CONTROL, chosen)]
    if unknown:
        near_text = "".join(did_you_mean(name, (FILE, TEXT, CONTROL)) for name in unknown) if not chosen else ""
        said = f"{TEXT!r} is read" if chosen in ("", TEXT) else f"{chosen!r} is read"
        warnings.append(f"{table.name}: unknown column(s) {', '.join(map(repr, unknown))} ignored; {said}.{near_text}")
    return chosen or None


def captions_of(table: Path, entries: Sequence[Entry], column: str | None) -> dict[Path, str]:
    """Captions by picture; a row without one is left out.

    Raises:
        DataError: a caption that is no text, or one picture with two of them.
    """
    if column is None:
        return {}
    wrong = [entry for entry in entries if _is_wrong(entry.values.get(column))]
    if wrong:
        what = type(wrong[0].values[column]).__name__
        raise DataError(
            f"{table}: {counted('row', [entry.where for entry in wrong], f'whose {column!r} is no text')} In the first it is "
            f"{'a list written as text' if what == 'str' else f'a {what}'}; give one sentence a picture."
        )
    found: dict[Path, tuple[str, str]] = {}
    for entry in entries:
        text = (entry.values.get(column) or "").strip()
        known = found.get(entry.path)
        if known is not None and text and known[0] and known[0] != text:
            raise DataError(
                f"{table}: {known[1]} and {entry.where} both describe {entry.path.name}, as {known[0][:60]!r} and {text[:60]!r}. "
                "Keep one."
            )
        if known is None or text:
            found[entry.path] = text, entry.where
    return {path: text for path, (text, _) in found.items() if text}


def controls_of(found: Listing, table: Path, entries: Sequence[Entry]) -> dict[Path, Path]:
    """Picture -> control picture, where a row names one."""
    named = [entry for entry in entries if entry.values.get(CONTROL)]
    wrong = [entry.where for entry in named if not isinstance(entry.values[CONTROL], str)]
    if wrong:
        raise DataError(f"{table}: " + counted("row", wrong, f"whose {CONTROL!r} is no file name"))
    rows = {entry.path: Row(entry.values, entry.where) for entry in named}
    return {path: _place(found, table, row, CONTROL) for path, row in rows.items()}


def repeated(entries: Sequence[Entry], table: Path) -> list[str]:
    """A warning of pictures with several rows."""
    seen: set[Path] = set()
    again = [entry.where for entry in entries if entry.path in seen or seen.add(entry.path)]  # type: ignore[func-returns-value]
    return (
        [counted("row", again, f"of {table.name} whose picture has a row already; each counts once")] if again else []
    )


def columns_of(rows: Sequence[Row | Entry]) -> list[str]:
    """The columns of any of ``rows``, in the order they come."""
    return list(dict.fromkeys(str(key) for row in rows for key in row.values))


def _place(found: Listing, table: Path, row: Row, column: str) -> Path:
    """The file that a row names, as the folder's listing calls it; DataError when it lies outside the folder."""
    name = str(row.values[column]).strip()
    if any(len(part.encode("utf-8", "replace")) > LONGEST for part in name.split("/")) or len(name) > 8 * LONGEST:
        raise DataError(
            f"{table}: {row.where} names {name[:60]!r}... in the column {column!r}, too long for a file's name."
        )
    path = table.parent / name
    if not path.exists() and "\\" in name:  # written on Windows
        path = table.parent / name.replace("\\", "/")
    folder, real = os.path.abspath(found.folder), os.path.abspath(path)
    if real != folder and not real.startswith(folder + os.sep):
        raise DataError(
            f"{table}: {row.where} names {name!r} in the column {column!r}, which lies outside {found.folder}; pictures of "
            "that folder alone are read. Move it there, or give the folder above."
        )
    return found.folder / os.path.relpath(real, folder)


def _check_there(found: Listing, table: Path, named: Sequence[tuple[Path, str]]) -> None:
    missing = [(path, where) for path, where in named if not path.is_file()]
    if missing:
        near = did_you_mean(missing[0][0].name, [path.name for path in found.pictures])
        names = [f"{found.name(path)} ({where})" for path, where in missing]
        raise DataError(counted("picture", names, f"named in {table.name} but not in the folder") + near)
    strange = [path for path, _ in named if path.suffix.lower() not in known_endings()]
    if strange:
        why = why_unread(strange[0])
        names = [found.name(path) for path in strange]
        said = counted("file", names, f"named in {table.name} that no picture reader knows by its ending")
        raise DataError(said + (f" {strange[0].suffix} {why}." if why else ""))


def _is_wrong(value: Any) -> bool:
    return value is not None and not isinstance(structured(value), str)
