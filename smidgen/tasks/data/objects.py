"""JSON as rows: a line each, an array, objects one after the other, columns, or rows under a name; the ending does not
decide which."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smidgen.errors import DataError
from smidgen.tasks.data.decoding import Unusual, read_text
from smidgen.tasks.data.separated import check_once

WRAPPERS = ("data", "rows", "examples", "records", "items", "instances", "train")  # what holds the rows of a dump


def read_objects(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """The objects of a .json or .jsonl file. DataError names the line, or the row."""
    text = read_text(path, warnings)
    try:
        values = _values(text)
    except _Damaged as error:
        raise DataError(f"{path} line {error.line} is not JSON: {error}") from error
    what = "row"
    if len(values) == 1 and isinstance(values[0], list) and (_are_objects(values[0]) or path.suffix.lower() == ".json"):
        values = values[0]
    elif len(values) == 1 and isinstance(values[0], dict):
        values = _unwrapped(path, values[0], warnings)
    elif path.suffix.lower() == ".jsonl":
        what = "line"
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise DataError(
                f"{path} {what} {number} must be an object with named values, not {json.dumps(value)[:60]}."
            )
    return values


def plain_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one a line, read line by line. Raises Unusual for any other."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                value = _loads(line, number)
                if not isinstance(value, dict):
                    raise Unusual
                yield value


class _Damaged(ValueError):
    """JSON that cannot be read, and the line where."""

    def __init__(self, why: str, line: int):
        super().__init__(why)
        self.line = line


class _Doubled(ValueError):
    """One object names a value twice."""


def _values(text: str) -> list[Any]:
    """The values of a text: one a line if every line is one, else one after the other."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found, failures = [], []
    for number, line in lines:
        try:
            found.append(_loads(line, number))
        except _Damaged as error:
            failures.append(error)
            if len(failures) > 1 and not found:
                break
    if not failures:
        return found
    try:
        return list(_stream(text))
    except _Damaged as error:
        of_lines = any(isinstance(value, dict) for value in found)
        raise failures[0] if of_lines else error from None


def _loads(line: str, number: int) -> Any:
    try:
        return _DECODER.decode(line)
    except RecursionError:
        raise _Damaged("it is nested too deeply", number) from None
    except ValueError as error:
        raise _Damaged(str(error).replace("line 1 column", "column"), number) from error


def _stream(text: str) -> Iterator[Any]:
    at = _SPACE.match(text, 0).end()  # type: ignore[union-attr]
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        try:
            value, at = _DECODER.raw_decode(text, at)
        except RecursionError:
            raise _Damaged("it is nested too deeply", line) from None
        except json.JSONDecodeError as error:
            raise _Damaged(error.msg, error.lineno) from error
        except ValueError as error:
            raise _Damaged(str(error), line) from error
        yield value
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Doubled(
            f"it holds {next(name for name in names if names.count(name) > 1)!r} twice; rename or remove one"
        )
    return found


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _unwrapped(path: Path, value: dict[str, Any], warnings: list[str]) -> list[Any]:
    """The rows that a lone object stands for: under a name, or as columns; in a .jsonl it may be the only row."""
    if {"columns", "data"} <= set(value) <= {"columns", "data", "index"} and isinstance(value["data"], list):
        columns = [str(name) for name in value["columns"]]  # as pandas splits a table
        check_once(columns, f"{path} has")
        return [dict(zip(columns, row, strict=False)) for row in value["data"]]
    named = [name for name in WRAPPERS if isinstance(value.get(name), list) and _are_objects(value[name])]
    if len(named) == 1:
        others = [name for name in value if name not in named]
        if others:
            warnings.append(
                f"{path.name}: the rows under {named[0]!r} are read; {', '.join(others)} beside them {'is' if len(others) == 1 else 'are'} not."
            )
        return value[named[0]]
    parts = list(value.values())
    if len(parts) > 1 and all(isinstance(part, list) and len(part) == len(parts[0]) > 1 for part in parts):
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if parts and all(isinstance(part, dict) and part and all(key.isdecimal() for key in part) for part in parts):
        numbers = sorted({int(key) for part in parts for key in part})  # as pandas writes a table
        return [{name: part.get(str(number)) for name, part in value.items()} for number in numbers]
    if path.suffix.lower() == ".json":
        raise DataError(f"{path} must hold a list of objects, not a dict with {', '.join(map(repr, list(value)[:8]))}.")
    return [value]


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)
