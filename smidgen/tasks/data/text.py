"""Labelled texts: rows of a table checked and turned into examples, the labels into numbers.

What cannot be used is left out and counted in a warning, or is an error that names the row; nothing goes missing
silently.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError
from smidgen.tasks.data import splits
from smidgen.tasks.data.labels import classes_of, gathered, is_missing, lacking, name_of, read_labels
from smidgen.tasks.data.tables import Row, column, counted, read_splits

NUMBERS = "Train on them as numbers with --regression, or name another --label-column."


@dataclass(frozen=True)
class Text:
    """One example: its text, maybe a second one, its label (class number, those that hold, or value), and where it stands."""

    text: str
    pair: str | None
    label: float | tuple[int, ...]
    where: str

    @property
    def key(self) -> str:
        return splits.digest(self.text, self.pair or "")


@dataclass(frozen=True)
class Texts:
    """Examples by split (train, validation, test), the classes' names in order (none for numbers), warnings, and whether
    several classes may hold for one example."""

    splits: dict[str, list[Text]]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    several: bool = False


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
    tables = {split: gathered(rows, columns.label) for split, rows in read_splits(path, warnings).items()}
    usable = {split: _usable(rows, columns, split, warnings) for split, rows in tables.items()}
    usable = {split: rows for split, rows in usable.items() if rows}
    names: tuple[str, ...] = ()
    several = False
    values: Mapping[str, Sequence[float | tuple[int, ...]]]
    if columns.regression:
        values = {split: [_number(row, columns.label) for row in rows] for split, rows in usable.items()}
        if len(set(values["train"])) < 2:
            raise DataError(f"Every row of train has the same number in {columns.label!r}: there is nothing to learn.")
    else:
        cells = {split: [(row.values[columns.label], row.where) for row in rows] for split, rows in usable.items()}
        labels = read_labels(cells, columns.label, NUMBERS)
        names, several, values = labels.names, labels.several, {**labels.values}
        warnings += labels.warnings
    found = {
        split: [_example(row, columns, value) for row, value in zip(rows, values[split], strict=True)]
        for split, rows in usable.items()
    }
    warnings += splits.contradictions(
        found["train"], lambda text: text.key, "train row", "whose text has another label elsewhere"
    )
    strata = (lambda example: ()) if columns.regression else (lambda example: classes_of(example.label))
    complete = splits.complete(found, lambda example: example.key, held_out, most, strata)
    warnings += splits.leaks(complete, lambda example: example.key, lambda example: example.where)
    _check_classes_left(complete["train"], names)
    if names:
        warnings += lacking({split: [classes_of(one.label) for one in some] for split, some in complete.items()}, names)
    return Texts(complete, names, tuple(warnings), several)


def _usable(rows: Sequence[Row], columns: Columns, split: str, warnings: list[str]) -> list[Row]:
    """The rows with text and label; the others are counted."""
    texts = [column(rows, columns.text, "text-column")]
    if columns.pair is not None:
        texts.append(column(rows, columns.pair, "text-pair-column"))
    column(rows, columns.label, "label-column")
    hidden = [row for row in rows if name_of(row.values.get(columns.label)) == "-1"]
    if split == "test" and len(hidden) == len(rows):
        warnings.append("The test split hides its labels (all are -1); a test split is cut from train instead.")
        return []
    strange = [row for row in rows if any(_is_strange(row.values.get(name)) for name in texts)]
    odd = {row.where for row in strange}
    bare = [row for row in rows if row.where not in odd and any(_is_empty(row.values.get(name)) for name in texts)]
    unlabelled = [row for row in rows if is_missing(row.values.get(columns.label))]
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


def _number(row: Row, name: str) -> float:
    try:
        value = float(name_of(row.values[name]))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{row.where} has {row.values[name]!r} in {name!r}, which is no number; --regression needs numbers."
        )
    return value


def _example(row: Row, columns: Columns, value: float | tuple[int, ...]) -> Text:
    pair = row.values[columns.pair] if columns.pair is not None else None
    return Text(row.values[columns.text], pair, value, row.where)


def _check_classes_left(examples: Sequence[Text], labels: Sequence[str]) -> None:
    if labels and len({example.label for example in examples}) < 2:
        held = " and ".join(labels[at] for at in classes_of(examples[0].label)) or "none"
        raise DataError(
            f"After the cut, every one of the {len(examples)} train examples has the label {held!r}. Give more rows, or a "
            "validation and a test file."
        )


def count_labels(examples: Sequence[Text], labels: Sequence[str]) -> Mapping[str, int]:
    """How many examples each class has, or how many there are of numbers."""
    if not labels:
        return {"texts": len(examples)}
    found = Counter(at for example in examples for at in classes_of(example.label))
    return {label: found[at] for at, label in enumerate(labels)}
