"""Labelled texts: rows of a table checked and turned into examples, the labels into numbers.

What cannot be used is left out and counted in a warning, or is an error that names the row; nothing goes missing
silently.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data import splits
from smidgen.tasks.data.tables import Row, column, counted, read_splits

MOST_CLASSES = 1000


@dataclass(frozen=True)
class Text:
    """One example: its text, maybe a second one, its label (class number or value), and where it stands."""

    text: str
    pair: str | None
    label: float
    where: str

    @property
    def key(self) -> str:
        return splits.digest(self.text, self.pair or "")


@dataclass(frozen=True)
class Texts:
    """Examples by split (train, validation, test), the classes' names in order (none for numbers), and warnings."""

    splits: dict[str, list[Text]]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns are read; with ``regression`` the label is a number."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    regression: bool = False


def read_texts(path: Path, columns: Columns, held_out: float, most: int | None = None) -> Texts:
    """Read, check and split the table at ``path``; see ``tables.read_splits`` for what it may be.

    ``held_out`` is the share cut from the train split for each of validation and test that has no file of its own,
    ``most`` how many train examples are kept. Raises DataError when there is nothing sensible to learn.
    """
    warnings: list[str] = []
    tables = read_splits(path, warnings)
    usable = {split: _usable(rows, columns, split, warnings) for split, rows in tables.items()}
    usable = {split: rows for split, rows in usable.items() if rows}
    if columns.regression:
        labels: tuple[str, ...] = ()
        values = {split: [_number(row, columns.label) for row in rows] for split, rows in usable.items()}
        if len(set(values["train"])) < 2:
            raise DataError(f"Every row of train has the same number in {columns.label!r}: there is nothing to learn.")
    else:
        labels = _classes(usable["train"], columns.label)
        values = {split: _numbered(rows, columns.label, labels, split) for split, rows in usable.items()}
    found = {
        split: [_example(row, columns, value) for row, value in zip(rows, values[split], strict=True)]
        for split, rows in usable.items()
    }
    warnings += _contradictions(found["train"])
    complete = splits.complete(found, lambda example: example.key, held_out, most)
    warnings += splits.leaks(complete, lambda example: example.key, lambda example: example.where)
    _check_classes_left(complete["train"], labels)
    return Texts(complete, labels, tuple(warnings))


def _usable(rows: Sequence[Row], columns: Columns, split: str, warnings: list[str]) -> list[Row]:
    """The rows with text and label; the others are counted."""
    texts = [column(rows, columns.text, "text-column")]
    if columns.pair is not None:
        texts.append(column(rows, columns.pair, "text-pair-column"))
    column(rows, columns.label, "label-column")
    hidden = [row for row in rows if _label(row.values.get(columns.label)) == "-1"]
    if split == "test" and len(hidden) == len(rows):
        warnings.append("The test split hides its labels (all are -1); a test split is cut from train instead.")
        return []
    strange = [row for row in rows if any(_is_strange(row.values.get(name)) for name in texts)]
    odd = {row.where for row in strange}
    bare = [row for row in rows if row.where not in odd and any(_is_empty(row.values.get(name)) for name in texts)]
    unlabelled = [row for row in rows if not _label(row.values.get(columns.label))]
    for found, what in ((strange, "whose text is no text"), (bare, "without text"), (unlabelled, "without a label")):
        if found:
            warnings.append(counted(f"{split} row", [row.where for row in found], f"{what}, left out"))
    out = {row.where for row in (*strange, *bare, *unlabelled)}
    kept = [row for row in rows if row.where not in out]
    if not kept:
        raise DataError(
            f"No row of {split} has both text in {columns.text!r} and a label in {columns.label!r}: {' '.join(warnings)}"
        )
    return kept


def _is_strange(value: Any) -> bool:
    return not isinstance(value, str) and value is not None and not _is_nan(value)


def _is_empty(value: Any) -> bool:
    return value is None or _is_nan(value) or not value.strip()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _label(value: Any) -> str:
    """A label's name; "" when there is none. 1 and 1.0 are one label."""
    if value is None or _is_nan(value):
        return ""
    text = str(value).strip()
    return text[: text.index(".")] if re.fullmatch(r"-?\d+\.0+", text) else text


def _classes(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """The labels of the train split in order: by value when all are whole numbers, else by name."""
    found = Counter(_label(row.values[name]) for row in rows)
    if len(found) < 2:
        raise DataError(f"Every row of train has the label {min(found)!r} in {name!r}: there is nothing to learn.")
    fractions = [label for label in found if not _is_whole(label)]
    if fractions and all(_as_float(label) is not None for label in found):
        raise DataError(
            f"The labels in {name!r} are numbers such as {fractions[0]}, not classes. Train on them as numbers with "
            "--regression, or name another --label-column."
        )
    if len(found) > MOST_CLASSES or (len(found) > 20 and len(found) > len(rows) / 2):
        raise DataError(
            f"{name!r} has {len(found)} different values in {len(rows)} rows, too many for classes. Is it the right "
            "--label-column?"
        )
    whole = all(_is_whole(label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label) if whole else 0, label)))


def _numbered(rows: Sequence[Row], name: str, labels: Sequence[str], split: str) -> list[float]:
    number = {label: at for at, label in enumerate(labels)}
    for row in rows:
        label = _label(row.values[name])
        if label not in number:
            raise DataError(
                f"{row.where} ({split}) has the label {label!r}, which no row of train has."
                f"{did_you_mean(label, labels)} Train knows {', '.join(labels[:20])}."
            )
    return [float(number[_label(row.values[name])]) for row in rows]


def _number(row: Row, name: str) -> float:
    value = _as_float(_label(row.values[name]))
    if value is None or not math.isfinite(value):
        raise DataError(
            f"{row.where} has {row.values[name]!r} in {name!r}, which is no number; --regression needs numbers."
        )
    return value


def _as_float(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _example(row: Row, columns: Columns, value: float) -> Text:
    pair = row.values[columns.pair] if columns.pair is not None else None
    return Text(row.values[columns.text], pair, value, row.where)


def _contradictions(examples: Sequence[Text]) -> list[str]:
    """A warning that counts texts with several labels."""
    labels: dict[str, set[float]] = {}
    for example in examples:
        labels.setdefault(example.key, set()).add(example.label)
    double = [example.where for example in examples if len(labels[example.key]) > 1]
    return [counted("train row", double, "whose text has another label elsewhere")] if double else []


def _check_classes_left(examples: Sequence[Text], labels: Sequence[str]) -> None:
    if labels and len({example.label for example in examples}) < 2:
        raise DataError(
            f"After the cut, every one of the {len(examples)} train examples has the label "
            f"{labels[int(examples[0].label)]!r}. Give more rows, or a validation and a test file."
        )


def count_labels(examples: Sequence[Text], labels: Sequence[str]) -> Mapping[str, int]:
    """How many examples each class has, or how many there are of numbers."""
    if not labels:
        return {"texts": len(examples)}
    found = Counter(int(example.label) for example in examples)
    return {label: found[at] for at, label in enumerate(labels)}
