"""Labels, by one rule for texts and pictures.

1, 1.0, "1" and " 1 " are one label; so are true, "True" and 1 where nothing else is a label. Nothing, NaN, "nan", "null"
and blanks are no label. Spellings stay apart ("Good", "good"), and are warned about. A list, an object of 0 and 1, or a
row of zeros and ones makes the task multi-label: any number of classes may hold for one example.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data.tables import Row, counted, structured
from smidgen.tasks.data.tables import column as find_column

MOST_CLASSES = 1000
MISSING = ("", "nan", "null", "<na>")
DOUBTFUL = ("none", "na", "n/a", "nil", "undefined", "?", "-")  # a class to some, no label to others
TRUTH = {"true": "True", "1": "True", "false": "False", "0": "False"}
Label = int | tuple[int, ...]  # a class's number, or those that hold
Cells = Sequence[tuple[Any, str]]  # what a row has for its label, and where it stands


@dataclass(frozen=True)
class Labels:
    """The classes' names in order, whether several may hold at once, and each split's labels as numbers."""

    names: tuple[str, ...]
    several: bool
    values: dict[str, list[Label]]
    warnings: tuple[str, ...]


def is_missing(value: Any) -> bool:
    """Whether a cell holds no label.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), " ", "null", 0, "none", [])]
        [True, True, True, True, False, False, False]
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and _tidy(value).casefold() in MISSING


def name_of(value: Any) -> str:
    """A label's name.

    Example:
        >>> name_of(1.0), name_of(" 1 "), name_of("2.50"), name_of(True), name_of(" cat")
        ('1', '1', '2.50', 'True', 'cat')
    """
    text = _tidy(str(value))
    return text[: text.index(".")] if re.fullmatch(r"[+-]?\d+\.0+", text) else text


def gathered(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows; where ``name`` is several columns ("toxic,rude"), with an object of their zeros and ones under it.

    Example:
        >>> gathered([Row({"toxic": "1", "rude": "0"}, "a.csv row 1")], "toxic,rude")[0].values["toxic,rude"]
        {'toxic': '1', 'rude': '0'}
    """
    parts = [part.strip() for part in name.split(",")]
    if len(parts) < 2 or any(name in row.values for row in rows):
        return list(rows)
    for part in parts:
        find_column(rows, part, "label-column")
    held = [{part: row.values.get(part) for part in parts} for row in rows]
    cells = [None if all(is_missing(value) for value in one.values()) else one for one in held]
    return [Row(row.values | {name: cell}, row.where) for row, cell in zip(rows, cells, strict=True)]


def read_labels(cells: Mapping[str, Cells], column: str | None, numbers: str = "") -> Labels:
    """The labels of rows that have one, by split; the classes are those of train.

    ``column`` is where they stand in a table (None: they are names of folders), ``numbers`` says what to do about
    labels that are measurements. Raises DataError, with the row, for labels that are none, and where there is nothing
    to learn.
    """
    values = {split: [structured(value) if column else value for value, _ in some] for split, some in cells.items()}
    several = any(isinstance(value, list | dict) for some in values.values() for value in some)
    named, fixed = _sets(cells, values, column) if several else (_singles(values), ())
    names = fixed or _classes(named["train"], several, column, numbers)
    _check_varied(named["train"], column)
    if not several:
        _check_count(names, len(named["train"]), column)
    number = {name: at for at, name in enumerate(names)}
    found: dict[str, list[Label]] = {}
    for split, some in named.items():
        for labels, (_, where) in zip(some, cells[split], strict=True):
            _check_known(labels, number, split, where)
        every = [tuple(sorted(number[label] for label in labels)) for labels in some]
        found[split] = list(every) if several else [labels[0] for labels in every]
    return Labels(names, several, found, tuple(_warnings(named["train"], several)))


def classes_of(label: Label | float) -> tuple[int, ...]:
    """The classes that hold for an example."""
    return label if isinstance(label, tuple) else (int(label),)


def lacking(splits: Mapping[str, Iterable[Label]], names: Sequence[str]) -> list[str]:
    """Warnings that name the classes a split has no example of."""
    warnings = []
    for split, labels in splits.items():
        there = {at for label in labels for at in classes_of(label)}
        missing = [name for at, name in enumerate(names) if at not in there]
        if missing:
            effect = "nothing is learnt of it" if split == "train" else "its scores say nothing about it"
            warnings.append(counted("label", missing, f"without any example in {split}, {effect}"))
    return warnings


def _tidy(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().strip("\u200b\u2060\ufeff").strip()


def _singles(values: Mapping[str, list[Any]]) -> dict[str, list[tuple[str, ...]]]:
    names = {split: [name_of(value) for value in some] for split, some in values.items()}
    typed = any(isinstance(value, bool) for some in values.values() for value in some)
    truth = _truth({name for some in names.values() for name in some}, typed)
    return {split: [(truth.get(name.casefold(), name),) for name in some] for split, some in names.items()}


def _truth(known: set[str], typed: bool) -> dict[str, str]:
    """What true and false, and 1 and 0 beside them, are called: names by what is written, in small letters."""
    said = {name.casefold() for name in known}
    if not said & {"true", "false"}:
        return {}
    if said <= set(TRUTH):
        return TRUTH if typed or len(known) > 2 or said & {"0", "1"} else {}
    if all(_is_whole(name) or name.casefold() in TRUTH for name in known):
        return {"true": "1", "false": "0"}
    return {"true": "True", "false": "False"} if typed else {}


def _sets(
    cells: Mapping[str, Cells], values: Mapping[str, list[Any]], column: str | None
) -> tuple[dict[str, list[tuple[str, ...]]], tuple[str, ...]]:
    """The names that hold, and all that could where each row has a zero or one for each: names, or places."""
    every = [value for some in values.values() for value in some]
    hot = _is_hot(every)
    found: dict[str, list[tuple[str, ...]]] = {}
    for split, some in values.items():
        found[split] = []
        for value, (_, where) in zip(some, cells[split], strict=True):
            if isinstance(value, dict):
                labels = [name for name, holds in value.items() if _bit(holds, value, where, column)]
            elif hot:
                labels = [str(at) for at, holds in enumerate(value) if _bit(holds, value, where, column)]
            else:
                labels = value if isinstance(value, list) else [value]
            strange = [label for label in labels if isinstance(label, list | dict) or is_missing(label)]
            if strange:
                raise DataError(
                    f"{where} has {strange[0]!r} among its labels{_of(column)}: a label is a word, a number or true."
                )
            found[split].append(tuple(dict.fromkeys(name_of(label) for label in labels)))
    if hot:
        return found, tuple(str(at) for at in range(len(every[0])))
    same = all(isinstance(value, dict) and value.keys() == every[0].keys() for value in every)
    return found, tuple(sorted(every[0])) if same else ()


def _is_hot(every: Sequence[Any]) -> bool:
    """Whether the lists are rows of zeros and ones, one for each class, and not lists of the labels 0 and 1."""
    lists = [value for value in every if isinstance(value, list)]
    widths = {len(value) for value in lists}
    return (
        len(lists) == len(every)
        and len(widths) == 1
        and min(widths) > 1
        and all(isinstance(bit, bool | int | float) and bit in (0, 1) for value in lists for bit in value)
    )


def _bit(value: Any, whole: Any, where: str, column: str | None) -> bool:
    if is_missing(value):
        return False
    named = TRUTH.get(name_of(value).casefold()) if not isinstance(value, list | dict) else None
    if named:
        return named == "True"
    raise DataError(
        f"{where} has {value!r} in {str(whole)[:60]}{_of(column)}: what names or counts its labels holds 0 and 1."
    )


def _classes(train: Sequence[tuple[str, ...]], several: bool, column: str | None, numbers: str) -> tuple[str, ...]:
    """The names in order: by value when all are whole numbers, else by name."""
    found = Counter(label for labels in train for label in labels)
    fractions = [label for label in found if not _is_whole(label)]
    if fractions and not several and all(_is_number(label) for label in found):
        raise DataError(f"The labels{_of(column)} are numbers such as {fractions[0]}, not classes. {numbers}".rstrip())
    whole = not fractions
    return tuple(sorted(found, key=lambda label: (int(label) if whole else 0, label)))


def _check_varied(train: Sequence[tuple[str, ...]], column: str | None) -> None:
    if len(set(train)) < 2:
        what = f"the label {'+'.join(train[0])!r}" if train[0] else "no label"
        noun = "row" if column else "picture"
        raise DataError(f"Every {noun} of train has {what}{_of(column)}: there is nothing to learn.")


def _check_count(names: Sequence[str], rows: int, column: str | None) -> None:
    if len(names) > MOST_CLASSES or (column is not None and len(names) > 20 and len(names) > rows / 2):
        raise DataError(
            f"{column or 'The folder'!r} has {len(names)} different values in {rows} rows, too many for classes. Is it the "
            "right --label-column?"
        )


def _check_known(labels: Sequence[str], number: Mapping[str, int], split: str, where: str) -> None:
    for label in labels:
        if label not in number:
            raise DataError(
                f"{where} ({split}) has the label {label!r}, which train has not.{did_you_mean(label, number)} Train "
                f"knows {', '.join(list(number)[:20])}."
            )


def _warnings(train: Sequence[tuple[str, ...]], several: bool) -> list[str]:
    found = Counter(label for labels in train for label in labels)
    alike: dict[str, list[str]] = {}
    for name in found:
        key = (
            str(int(name))
            if _is_whole(name)
            else re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())
        )
        alike.setdefault(key, []).append(name)
    warnings = [
        f"Labels that differ in case, spacing or leading zeros alone are classes of their own: "
        f"{', '.join(f'{name!r} ({found[name]:,})' for name in sorted(names))}. Spell them alike if they mean the same."
        for names in alike.values()
        if len(names) > 1
    ]
    warnings += [
        f"The label {name!r} ({found[name]:,}) is a class of its own; leave it empty where it means that there is none."
        for name in found
        if name.casefold() in DOUBTFUL
    ]
    always = [name for name, count in found.items() if several and count == len(train)]
    if always:
        warnings.append(counted("label", always, "that every example of train has: nothing is learnt of it"))
    if several and all(len(labels) == 1 for labels in train):
        warnings.append(
            "Every example of train has one label alone, in a list: trained as multi-label. Take it out of the list to train a choice of one."
        )
    return warnings


def _of(column: str | None) -> str:
    return f" in {column!r}" if column else ""


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
