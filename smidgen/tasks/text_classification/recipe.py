"""Classify texts with an adapter of kilobytes. Read from top to bottom; finetune.py tells the common course.

report = text_classification(TextClassificationConfig(data=TextData("tweets"), out=Path("mood")))
"""

from dataclasses import replace
from typing import Any

from smidgen.bases.transformers import Head, TransformersBase, load_classifier, load_tokenizer, locate_data
from smidgen.errors import ConfigError
from smidgen.tasks.data.glue import GLUE
from smidgen.tasks.data.text import Columns, count_labels, read_texts
from smidgen.tasks.finetune.course import Prepared, finetune
from smidgen.tasks.finetune.measuring import check_length, class_weights, majority
from smidgen.tasks.finetune.report import FinetuneReport
from smidgen.tasks.finetune.settings import Adapter
from smidgen.tasks.text_classification.settings import TextClassificationConfig, TextData
from smidgen.tasks.text_classification.task import TextClassificationTask, content_digest, encode_texts
from smidgen.training.alone import runs_alone
from smidgen.training.loop import LoopConfig
from smidgen.training.metrics import DEFAULTS, MULTI, REGRESSION, SINGLE, metric

PRESETS = {
    "default": TextClassificationConfig(train=LoopConfig(max_train_steps=500, lr_warmup_steps=25, eval_steps=100)),
    "debug": TextClassificationConfig(
        data=TextData("debug-text", max_length=16, train_batch_size=8, eval_batch_size=8),
        adapter=Adapter(rank=4),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2, eval_steps=2, load_best=False),
        model="debug-text",
    ),
    "thorough": TextClassificationConfig(
        data=TextData(train_batch_size=32),
        train=LoopConfig(max_train_steps=3000, lr_warmup_steps=150, eval_steps=250, early_stopping_patience=4),
    ),
}


@runs_alone
def text_classification(config: TextClassificationConfig, progress: bool = True) -> FinetuneReport | None:
    """Train, save, prove and score one adapter in ``config.out``. Raises SmidgenError for every refusal."""
    return finetune("text-classification", config, prepare(config), progress)


def prepare(config: TextClassificationConfig) -> Prepared:
    """Read, check and tokenise the texts; load the base with a fresh head for their labels.

    Raises DataError and ConfigError for everything that would spoil the run, before anything is written.
    """
    data = resolved(config.data)
    tokenizer = load_tokenizer(config.model)
    columns = Columns(data.text_column, data.text_pair_column, data.label_column, data.regression)
    texts = read_texts(locate_data(data.path), columns, data.held_out_share, data.max_train_examples)
    problem = REGRESSION if data.regression else MULTI if texts.several else SINGLE
    name = data.metric or DEFAULTS[problem]
    metric(name, problem, len(texts.labels))

    def load() -> TransformersBase:
        head = Head(texts.labels, problem)
        auto = "AutoModelForSequenceClassification"
        loaded = load_classifier(
            auto, config.model, head, config.train.seed, config.train.mixed_precision, config.dropout
        )
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
        return loaded

    base = load()
    check_length(data.max_length, tokenizer, base.model.config)
    encoded, warnings = encode_texts(tokenizer, texts.splits, data.max_length, problem, len(texts.labels))
    task = TextClassificationTask(
        encoded,
        tokenizer,
        name,
        batch_size=data.train_batch_size,
        eval_batch_size=data.eval_batch_size,
        seed=config.train.seed,
        problem=problem,
        weights=class_weights(data.class_weights, encoded["train"].labels, problem, len(texts.labels)),
        group_by_length=data.group_by_length,
    )
    usual = majority(name, encoded["train"].labels, encoded["test"].labels, problem, texts.labels)
    return Prepared(
        model=base.model,
        task=task,
        heads=base.heads,
        family=base.kind,
        fresh=lambda: load().model,
        labels=texts.labels,
        problem=problem,
        majority=usual,
        counts={split: count_labels(part, texts.labels) for split, part in texts.splits.items()},
        warnings=(*texts.warnings, *warnings),
        data_digest=content_digest(encoded),
    )


def resolved(data: TextData) -> TextData:
    """``glue_task`` spelled out as columns and metric; what the caller set besides stays."""
    if data.glue_task is None:
        return data
    task = GLUE[data.glue_task]
    wanted: dict[str, Any] = {"text_column": task.text, "text_pair_column": task.pair, "regression": task.regression}
    given = {name for name in wanted if getattr(data, name) != getattr(TextData(), name)}
    clash = [name for name in given if getattr(data, name) != wanted[name]]
    if clash:
        raise ConfigError(
            f"glue_task {data.glue_task!r} sets {clash[0]} to {wanted[clash[0]]!r}; leave out one of the two."
        )
    return replace(data, **wanted, metric=data.metric or task.metric)
