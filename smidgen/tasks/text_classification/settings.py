"""The settings of a text classification."""

from dataclasses import dataclass, field
from typing import Literal

from smidgen.tasks.finetune.settings import FinetuneConfig


@dataclass(frozen=True)
class TextData:
    """Labelled texts: a packaged name, a table, or a folder of train, validation and test tables."""

    path: str | None = None  # packaged name, file (csv, tsv, jsonl, json, parquet) or folder
    text_column: str = "text"
    text_pair_column: str | None = None  # a second text beside the first
    label_column: str = "label"  # or several of zeros and ones: toxic,rude
    glue_task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"] | None = (
        None  # its columns
    )
    regression: bool = False  # labels are numbers
    metric: str | None = (
        None  # accuracy, f1, f1_macro, matthews; pearson, spearman; several labels: f1_micro, f1_macro, subset_accuracy
    )
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class counts alike in the loss
    max_length: int = 128  # tokens
    held_out_share: float = 0.1  # cut from train for each of validation and test that has no file
    max_train_examples: int | None = None  # None: all
    group_by_length: bool = False  # batches of examples of like length: less padding, in another order
    train_batch_size: int = 16
    eval_batch_size: int = 64


@dataclass(frozen=True)
class TextClassificationConfig(FinetuneConfig):
    """One text classification."""

    data: TextData = field(default_factory=TextData)
