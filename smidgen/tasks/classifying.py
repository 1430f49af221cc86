"""Sort texts or images with a finished adapter of ``smidgen train``: in Python, or files in and files out.

The adapter's folder says its base, its classes, and how its training read texts or images; nothing else has to be known.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.atomic import new_file
from smidgen.bases.origin import Origin, adapted_tokenizer, load_adapted, read_origin
from smidgen.bases.transformers import image_statistics
from smidgen.errors import ConfigError, DataError, did_you_mean
from smidgen.tasks.data.listing import list_folder
from smidgen.tasks.data.pictures import LabelledPicture, read_pixels
from smidgen.tasks.data.pixels import known_endings
from smidgen.tasks.data.tables import SUFFIXES, counted, known_column, open_table
from smidgen.tasks.data.text import Text
from smidgen.tasks.image_classification.task import ImageClassificationTask, choose_resolution, needs_interpolation
from smidgen.tasks.text_classification.task import TextClassificationTask, encode_texts
from smidgen.training.metrics import MULTI, REGRESSION, SINGLE

logger = logging.getLogger(__name__)

SLICE = 16  # batches between two steps of the progress bar; within them texts are sorted by length
FORMATS = (".csv", ".jsonl")
_BLANK: Mapping[str, Any] = {SINGLE: 0, MULTI: (), REGRESSION: 0.0}  # a label, where a task asks for one


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one text or image.

    ``answer`` is the likeliest class, or all classes that hold, or of a regression the number; ``probabilities`` and ``logits``
    are by class, empty for a regression.
    """

    answer: str | tuple[str, ...] | float
    probabilities: Mapping[str, float]
    logits: Mapping[str, float]


class Classifier:
    """A text or image classifier: an adapter's folder with the base that it names, ready to be asked.

    Args:
        adapter: a folder that ``smidgen train text-classification`` or ``image-classification`` wrote.
        base: another place of its base (None: as the folder says).
        batch_size: how many are read at once.

    Raises:
        SmidgenError: it is none, or its base cannot be found, or is another one.

    Example:
        >>> Classifier("mood")(["I love it"])[0].answer  # doctest: +SKIP
        'positive'
    """

    def __init__(self, adapter: str | Path, base: str | None = None, batch_size: int = 64) -> None:
        self.origin: Origin = read_origin(adapter)
        if self.origin.head is None:
            verb = "chat" if self.origin.task == "instruction" else "generate"
            raise ConfigError(f"{adapter} does not classify, it is for {self.origin.task}: use smidgen {verb}.")
        self.labels, self.problem = self.origin.head.labels, self.origin.head.problem_type
        self.model = load_adapted(self.origin, base).model
        self.batch_size = batch_size
        name = self.origin.named(base)
        if self.reads_images:
            self._image_options: dict[str, Any] = dict(zip(("mean", "std"), image_statistics(name), strict=True))
            self._resolution = choose_resolution(self.origin.setting("data.resolution", 0) or None, self.model.config)
            self._image_options["interpolate"] = needs_interpolation(self.model, self._resolution)
        else:
            self.tokenizer = adapted_tokenizer(self.origin, base)

    @property
    def reads_images(self) -> bool:
        return self.origin.task == "image-classification"

    def __call__(self, given: Sequence[Any], progress: bool = False) -> list[Prediction]:
        """What is said of each of ``given``: texts, pairs of texts, or paths of images."""
        return predictions(self.logits(given, progress), self.labels, self.problem)

    def logits(self, given: Sequence[Any], progress: bool = False) -> Tensor:
        """Logits [example, class] on the CPU, or values [example, 1]."""
        from tqdm.auto import tqdm

        found, step = [], SLICE * self.batch_size
        with tqdm(total=len(given), disable=not progress, desc="classify", dynamic_ncols=True) as bar:
            for start in range(0, len(given), step):
                part = given[start : start + step]
                found.append(self._images(part) if self.reads_images else self._texts(part))
                bar.update(len(part))
        return torch.cat(found) if found else torch.zeros(0, max(1, len(self.labels)))

    def _texts(self, given: Sequence[str | tuple[str, str]]) -> Tensor:
        pairs = [(one, None) if isinstance(one, str) else tuple(one) for one in given]
        texts = [Text(text, pair, _BLANK[self.problem], f"text {n}") for n, (text, pair) in enumerate(pairs, 1)]
        length = int(self.tokenizer.model_max_length)
        encoded, warnings = encode_texts(self.tokenizer, {"given": texts}, length, self.problem, len(self.labels))
        for warning in warnings:
            logger.warning("%s", warning)
        options: dict[str, Any] = {"eval_batch_size": self.batch_size, "problem": self.problem}
        return TextClassificationTask(encoded, self.tokenizer, "", **options).predict(self.model, "given")

    def _images(self, given: Sequence[Path]) -> Tensor:
        images = [LabelledPicture(Path(path), _BLANK[self.problem], "", str(path)) for path in given]
        options: dict[str, Any] = {"eval_batch_size": self.batch_size, "problem": self.problem, **self._image_options}
        task = ImageClassificationTask(
            {"given": images}, lambda one: read_pixels(one.path, self._resolution), **options
        )
        return task.predict(self.model, "given")


def predictions(logits: Tensor, labels: Sequence[str], problem: str) -> list[Prediction]:
    """Logits [example, class] as answers."""
    if problem == REGRESSION:
        return [Prediction(float(value), {}, {}) for value in logits.squeeze(-1)]
    shares = logits.sigmoid() if problem == MULTI else logits.softmax(-1)
    found = []
    for row, share in zip(logits.tolist(), shares.tolist(), strict=True):
        held = tuple(label for label, value in zip(labels, row, strict=True) if value > 0)
        likeliest = labels[max(range(len(row)), key=row.__getitem__)]
        by_class = (dict(zip(labels, values, strict=True)) for values in (share, row))
        found.append(Prediction(held if problem == MULTI else likeliest, *by_class))
    return found


def classify(
    adapter: Path,
    given: Sequence[str],
    out: Path | None = None,
    base: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    batch_size: int = 64,
    logits: bool = False,
    overwrite: bool = False,
) -> Iterator[str]:
    """Classify what ``given`` names: texts, tables of texts, images, folders of images. Gives the predictions as lines of CSV or
    JSON as they are made, or, with ``out``, a sentence that says what was written there, at once when it is whole.

    Every row of a table comes back with its columns, in its place; where there was nothing to read, without a prediction, and
    counted in a warning. Tables are gone through twice, first for their columns, and only some batches of rows are held.
    Raises SmidgenError before anything is given or written.
    """
    from tqdm.auto import tqdm

    if out is not None and out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out is a file that ends in {' or '.join(FORMATS)}, not {out.name!r}.")
    if out is not None and out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; give another --out, or --overwrite to write it anew.")
    if not given:
        raise DataError("What is to be classified? Give texts, tables of texts, images, or folders of images.")
    classifier = Classifier(adapter, base, batch_size)
    setting = classifier.origin.settings.get("data.text_pair_column")
    pair = text_pair_column or (setting if isinstance(setting, str) else None)
    name = text_column or classifier.origin.setting("data.text_column", "text")
    parts = _image_parts(given) if classifier.reads_images else _text_parts(given, name, pair)
    total = sum(part.count for part in parts)
    if not total:
        raise DataError(f"{' '.join(given)}: nothing to classify there.")
    columns = list(dict.fromkeys(chain.from_iterable(part.columns for part in parts)))
    _check_free(columns, classifier.labels)
    lines = (
        out.suffix.lower() == ".jsonl"
        if out
        else any(Path(word).suffix.lower() in (".jsonl", ".json") for word in given)
    )
    shown = total > SLICE and (out is not None or not sys.stdout.isatty())
    with tqdm(total=total, disable=not shown, desc="classify", dynamic_ncols=True) as bar:
        answered = _answered(classifier, parts, bar.update)
        written = (_as_json if lines else _as_csv)(columns, answered, classifier.labels, logits)
        if out is None:
            yield from written
        else:
            with new_file(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                file.writelines(f"{line}\n" for line in written)
    absent = [where for part in parts for where in part.absent]
    for part in parts:
        if part.absent:
            logger.warning("%s", counted(part.noun, part.absent, part.without))
    if out is not None:
        yield f"{out}: {total - len(absent):,} predictions."


@dataclass(frozen=True)
class _Part:
    """What one of the things given holds: its columns, how many rows, and the rows: the columns that come back, and what is asked
    (None: nothing is there, which is kept in ``absent``)."""

    columns: Sequence[str]
    count: int
    rows: Callable[[], Iterator[tuple[dict[str, Any], Any]]]
    absent: list[str] = field(default_factory=list)
    noun: str = "row"
    without: str = "without text, which have no prediction"


Answered = Iterable[tuple[dict[str, Any], Prediction | None]]


def _answered(classifier: Classifier, parts: Sequence[_Part], done: Callable[[int], object]) -> Answered:
    """Every row with its prediction, some batches at a time."""
    rows = chain.from_iterable(part.rows() for part in parts)
    while some := list(islice(rows, SLICE * classifier.batch_size)):
        found = iter(classifier([one for _, one in some if one is not None]))
        for row, one in some:
            yield row, None if one is None else next(found)
        done(len(some))


def _text_parts(given: Sequence[str], text: str, pair: str | None) -> list[_Part]:
    found = []
    warnings: list[str] = []
    for word in given:
        path = Path(word)
        if not _is_path(path):
            _check_text(word, pair)
            found.append(_Part(["text"], 1, lambda word=word: iter([({"text": word}, word)])))  # type: ignore[misc]
        elif path.suffix.lower() in SUFFIXES:
            found.append(_table_part(path, text, pair, warnings))
        else:
            raise DataError(f"{path} is no table of texts; known endings are {', '.join(SUFFIXES)}.")
    for warning in warnings:
        logger.warning("%s", warning)
    return found


def _table_part(path: Path, text: str, pair: str | None, warnings: list[str]) -> _Part:
    table, absent = open_table(path, warnings), list[str]()
    if not table.count:
        raise DataError(f"{path} holds no rows.")
    names = [known_column(table.columns, text, "text-column")]
    names += [known_column(table.columns, pair, "text-pair-column")] if pair else []

    def rows() -> Iterator[tuple[dict[str, Any], Any]]:
        for row in table.read():
            values = [row.values.get(name) for name in names]
            whole = all(isinstance(value, str) and value.strip() for value in values)
            if not whole:
                absent.append(row.where)
            yield dict(row.values), (tuple(values) if pair else values[0]) if whole else None

    return _Part(table.columns, table.count, rows, absent)


def _image_parts(given: Sequence[str]) -> list[_Part]:
    found = []
    for word in given:
        path = Path(word)
        if not path.exists():
            near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"There is no image or folder {word!r}.{did_you_mean(path.name, near)}")
        paths = list_folder(path).pictures if path.is_dir() else [path]
        if not paths:
            raise DataError(f"{path} holds no images; known endings are {', '.join(sorted(known_endings()))}.")
        found.append(_images_part(paths))
    return found


def _images_part(paths: Sequence[Path]) -> _Part:
    broken: list[str] = []

    def rows() -> Iterator[tuple[dict[str, Any], Any]]:
        for one in paths:
            readable: Path | None = one
            try:
                read_pixels(one, 8)
            except DataError as error:
                broken.append(f"{one} ({error})")
                readable = None
            yield {"file_name": one.as_posix()}, readable

    return _Part(["file_name"], len(paths), rows, broken, "image", "cannot be read and have no prediction")


def _is_path(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that is too long for a name
        return False


def _check_text(word: str, pair: str | None) -> None:
    if pair:
        raise DataError(f"This adapter reads pairs of texts; give a table with the columns of both, not {word[:60]!r}.")
    if not word.strip():
        raise DataError("A text to classify is empty.")
    if _names_a_file(word):
        near = [other.name for other in Path(word).parent.iterdir()] if Path(word).parent.is_dir() else []
        raise DataError(f"There is no table {word!r}.{did_you_mean(Path(word).name, near)}")


def _names_a_file(word: str) -> bool:
    """Whether one means a file by it, there or not: "mood.csv", "data/mood" beside a folder data; but not "and/or" or "http://x.org/a"."""
    path = Path(word)
    if any(sign.isspace() for sign in word) or "//" in word:
        return False
    inside = "/" in word and (word.startswith(("/", "./", "../", "~")) or _is_path(path.parent))
    return inside or path.suffix.lower() in (*SUFFIXES, ".txt", *known_endings())


def _columns(labels: Sequence[str], logits: bool) -> Iterator[tuple[str, str, str]]:
    """(column, attribute of a Prediction, class) of everything beside the answer."""
    for kind in ("probabilities", *(["logits"] if logits else [])):
        yield from (
            (f"{'probability' if kind == 'probabilities' else 'logit'}_{label}", kind, label) for label in labels
        )


def _check_free(columns: Sequence[str], labels: Sequence[str]) -> None:
    ours = {"prediction", "probabilities", "logits", *(name for name, *_ in _columns(labels, True))}
    taken = sorted(ours & set(columns))
    if taken:
        raise DataError(f"The table has a column {taken[0]!r}, where the prediction would go; rename it.")


def _as_csv(columns: Sequence[str], answered: Answered, labels: Sequence[str], logits: bool) -> Iterator[str]:
    more = list(_columns(labels, logits))
    head: list[Any] | None = [*columns, "prediction", *(name for name, *_ in more)]
    for row, answer in answered:
        if head is not None:  # after the first batch, which may be refused
            yield _line(head)
            head = None
        cells = [row.get(name) for name in columns]
        cells = [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in cells]
        if answer is None:
            yield _line([*cells, *[""] * (1 + len(more))])
            continue
        said = answer.answer
        cells.append(json.dumps(said, ensure_ascii=False) if isinstance(said, tuple) else _short(said))
        yield _line([*cells, *(_short(getattr(answer, kind)[label]) for _, kind, label in more)])


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _as_json(_: Sequence[str], answered: Answered, labels: Sequence[str], logits: bool) -> Iterator[str]:
    for row, answer in answered:
        told: dict[str, Any] = {"prediction": None if answer is None else _short(answer.answer)}
        if answer is not None and labels:
            for kind in ("probabilities", *(["logits"] if logits else [])):
                told[kind] = {label: _short(value) for label, value in getattr(answer, kind).items()}
        yield json.dumps({**row, **told}, ensure_ascii=False, default=str)


def _short(value: Any) -> Any:
    """A number with as many digits as fp32 has."""
    return float(f"{value:.8g}") if isinstance(value, float) else value
