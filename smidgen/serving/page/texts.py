"""What the page does with texts: look into a table, train a classifier on it, ask it."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from smidgen.errors import ConfigError, DataError
from smidgen.serving.page import runs
from smidgen.serving.page.runs import Run
from smidgen.tasks.classifying import Classifier, Prediction
from smidgen.tasks.data.tables import SUFFIXES, open_table
from smidgen.tasks.finetune.settings import Adapter
from smidgen.tasks.text_classification.settings import TextClassificationConfig, TextData
from smidgen.training.loop import LoopConfig

KIND = "text-classification"
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent")  # what such a column is often called
TEXTS = ("text", "texts", "sentence", "message", "content", "review", "comment", "tweet", "body", "question")
GUESSED = 500  # rows that columns are guessed from
FEW, SEVERAL = 5, 40  # texts of a label, and in all, below which little can be learnt
MANY = 50  # labels, above which it is rather no label


@dataclass(frozen=True)
class Table:
    """What a dropped table holds: its columns, how many rows, and which columns look like texts and labels."""

    path: Path
    columns: tuple[str, ...]
    rows: int
    text: str
    label: str
    warnings: tuple[str, ...] = ()


def look(path: Path) -> Table:
    """Read a table's head and guess its columns.

    Raises:
        DataError: no table, or one that cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path.name} is no table. Drop a file that ends in {', '.join(SUFFIXES)}.")
    warnings: list[str] = []
    table = open_table(path, warnings)
    if not table.count:
        raise DataError(f"{path.name} has no rows below its head.")
    if len(table.columns) < 2:
        raise DataError(
            f"{path.name} has one column, {', '.join(table.columns)!r}; a classifier needs one of texts and one of labels."
        )
    rows = [row.values for row in islice(table.read(), GUESSED)]
    label = _guess(table.columns, LABELS) or min(
        table.columns, key=lambda name: len({str(row.get(name)) for row in rows})
    )
    rest = [name for name in table.columns if name != label]
    text = _guess(rest, TEXTS) or max(rest, key=lambda name: sum(len(str(row.get(name) or "")) for row in rows))
    return Table(path, tuple(table.columns), table.count, text, label, tuple(warnings))


def judge(table: Table, text: str, label: str) -> tuple[Counter[str], list[str], list[str]]:
    """Texts of each label, what stands in the way of learning them, and what is only worth knowing."""
    if text == label:
        return Counter(), [f"Texts and labels cannot both be in {text!r}; choose two columns."], []
    counts: Counter[str] = Counter()
    empty = 0
    for row in open_table(table.path).read():
        said, name = row.values.get(text), row.values.get(label)
        if said is None or name is None or not str(said).strip() or not str(name).strip():
            empty += 1
        else:
            counts[str(name)] += 1
    wrong, notes = [], list(table.warnings)
    total = sum(counts.values())
    if len(counts) < 2:
        wrong.append(f"Column {label!r} holds {len(counts)} label{'s' if len(counts) != 1 else ''}; two are the least.")
    elif len(counts) > MANY:
        wrong.append(
            f"Column {label!r} holds {len(counts):,} different values, so it is hardly the label. Choose another."
        )
    elif total < SEVERAL:
        wrong.append(
            f"{total} labelled texts are too few to learn from and be tested on; {SEVERAL} are the least here."
        )
    rare = [f"{name} ({count})" for name, count in counts.items() if count < FEW]
    if rare and not wrong:
        notes.append(f"Few texts of {', '.join(rare[:5])}: they will hardly be learnt.")
    if empty:
        notes.append(f"{empty:,} rows without a text or a label are left out.")
    return counts, wrong, notes


def train(
    folder: Path, title: str, table: Table | None, text: str, label: str, steps: int, model: str, length: int = 128
) -> Run:
    """Keep the table and start to train on it.

    Raises:
        SmidgenError: nothing to learn there, settings without meaning, or another run at work. Nothing is left then.
    """
    if table is None:
        raise ConfigError("Drop a table first: a CSV with a column of texts and a column of labels.")
    _, wrong, _ = judge(table, text, label)
    if wrong:
        raise DataError(wrong[0])
    every = max(1, steps // 4)
    config = TextClassificationConfig(
        data=TextData(text_column=text, label_column=label, max_length=length),
        adapter=Adapter(),
        train=LoopConfig(
            max_train_steps=steps, lr_warmup_steps=min(25, steps), eval_steps=every, checkpointing_steps=min(100, every)
        ),
        model=model.strip() or TextClassificationConfig().model,
    )  # fmt: skip
    path = runs.new_run(folder, title)
    try:
        kept = path / f"texts{table.path.suffix.lower()}"
        shutil.copyfile(table.path, kept)
        config = replace(config, data=replace(config.data, path=str(kept)))
        return runs.start(folder, path, KIND, title, config, f"{table.rows:,} texts")
    except BaseException:
        runs.discard(path)
        raise


def scores(run: Run) -> str:
    """What a finished classifier scored, in a sentence; "" where its report does not say."""
    try:
        report = json.loads((run.folder / runs.REPORT).read_text(encoding="utf-8"))
        metric, found = report["metric"], report["scores"]
        said = f"{metric.capitalize()} {found['test'][metric]:.1%} on texts it has not seen"
        usual = found.get("majority", {}).get(metric)
        return (
            f"{said}; always giving the commonest answer would score {usual:.1%}." if usual is not None else f"{said}."
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Classifiers:
    """The classifier that was asked last, kept between questions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[Path, float, Classifier] | None = None

    def ask(self, run: Run, texts: Sequence[str]) -> list[Prediction]:
        """What it says of each text.

        Raises:
            SmidgenError: nothing is asked, or it is no finished classifier of texts.
        """
        asked = [text.strip() for text in texts if text.strip()]
        if not asked:
            raise ConfigError("Write a text first, or several, one a line.")
        if not run.finished:
            raise ConfigError(f"{run.title} is not finished yet.")
        with self._lock:
            if self._known is None or self._known[:2] != (run.folder, run.when):
                self._known = run.folder, run.when, Classifier(run.folder)
            return self._known[2](asked)


def classifiers(folder: Path) -> list[Run]:
    """Finished classifiers of texts."""
    return [run for run in runs.list_runs(folder) if run.kind == KIND and run.finished]


def _guess(columns: Sequence[str], usual: Sequence[str]) -> str:
    return next((name for wanted in usual for name in columns if name.lower() == wanted), "")
