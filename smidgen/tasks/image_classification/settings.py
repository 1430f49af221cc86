"""The settings of an image classification."""

from dataclasses import dataclass, field
from typing import Literal

from smidgen.tasks.finetune.settings import FinetuneConfig


@dataclass(frozen=True)
class PictureData:
    """Labelled pictures: a packaged name, or a folder of class folders or with metadata.csv."""

    path: str | None = None  # packaged name or folder
    label_column: str = "label"  # of metadata.csv or metadata.jsonl, beside file_name
    metric: str | None = None  # accuracy, f1, f1_macro, matthews; several labels: f1_micro, f1_macro, subset_accuracy
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class counts alike in the loss
    resolution: int | None = None  # pixels; None: the model's own
    random_crop: bool = False  # shift by up to an eighth
    random_flip: bool = False  # mirror half of them
    held_out_share: float = 0.1  # cut from train for each of validation and test that has no folder
    max_train_examples: int | None = None  # None: all
    train_batch_size: int = 16
    eval_batch_size: int = 64
    memory_mb: int = 1024  # pixels stay in memory up to this


@dataclass(frozen=True)
class ImageClassificationConfig(FinetuneConfig):
    """One image classification."""

    data: PictureData = field(default_factory=PictureData)
    model: str = "vit-s14"
