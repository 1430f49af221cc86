"""Classify pictures with an adapter of kilobytes. Read from top to bottom; finetune.py tells the common course.

report = image_classification(ImageClassificationConfig(data=PictureData("emoji"), out=Path("emoji")))
"""

from typing import Any

from smidgen.bases.transformers import (
    Head,
    TransformersBase,
    image_statistics,
    load_classifier,
    load_config,
    locate_data,
)
from smidgen.tasks.data.pictures import count_labels, read_pictures
from smidgen.tasks.finetune.course import Prepared, finetune
from smidgen.tasks.finetune.measuring import class_weights, majority
from smidgen.tasks.finetune.report import FinetuneReport
from smidgen.tasks.finetune.settings import Adapter
from smidgen.tasks.image_classification.settings import ImageClassificationConfig, PictureData
from smidgen.tasks.image_classification.task import (
    ImageClassificationTask,
    choose_resolution,
    content_digest,
    needs_interpolation,
)
from smidgen.training.alone import runs_alone
from smidgen.training.loop import LoopConfig
from smidgen.training.metrics import DEFAULTS, MULTI, SINGLE, metric

PRESETS = {
    "default": ImageClassificationConfig(train=LoopConfig(max_train_steps=500, lr_warmup_steps=25, eval_steps=100)),
    "debug": ImageClassificationConfig(
        data=PictureData("debug-image", train_batch_size=8, eval_batch_size=8, random_flip=True, random_crop=True),
        adapter=Adapter(rank=4),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2, eval_steps=2, load_best=False),
        model="debug-image",
    ),
    "thorough": ImageClassificationConfig(
        data=PictureData(train_batch_size=32, random_crop=True),
        train=LoopConfig(max_train_steps=3000, lr_warmup_steps=150, eval_steps=250, early_stopping_patience=4),
    ),
}


@runs_alone
def image_classification(config: ImageClassificationConfig, progress: bool = True) -> FinetuneReport | None:
    """Train, save, prove and score one adapter in ``config.out``. Raises SmidgenError for every refusal."""
    return finetune("image-classification", config, prepare(config), progress)


def prepare(config: ImageClassificationConfig) -> Prepared:
    """Read and check the pictures; load the base with a fresh head for their labels.

    Raises DataError and ConfigError for everything that would spoil the run, before anything is written.
    """
    data = config.data
    resolution = choose_resolution(data.resolution, load_config(config.model))
    options: dict[str, Any] = {"most": data.max_train_examples, "memory": data.memory_mb << 20}
    pictures = read_pictures(locate_data(data.path), data.label_column, resolution, data.held_out_share, **options)
    problem = MULTI if pictures.several else SINGLE
    name = data.metric or DEFAULTS[problem]
    metric(name, problem, len(pictures.labels))

    def load() -> TransformersBase:
        precision, head = config.train.mixed_precision, Head(pictures.labels, problem)
        auto = "AutoModelForImageClassification"
        return load_classifier(auto, config.model, head, config.train.seed, precision, config.dropout)

    base = load()
    mean, std = image_statistics(config.model)
    task = ImageClassificationTask(
        pictures.splits,
        pictures.pixels,
        mean,
        std,
        name,
        batch_size=data.train_batch_size,
        eval_batch_size=data.eval_batch_size,
        seed=config.train.seed,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        interpolate=needs_interpolation(base.model, resolution),
        problem=problem,
        classes=len(pictures.labels),
    )
    task.weights = class_weights(data.class_weights, task.labels("train"), problem, len(pictures.labels))
    usual = majority(name, task.labels("train"), task.labels("test"), problem, pictures.labels)
    return Prepared(
        model=base.model,
        task=task,
        heads=base.heads,
        family=base.kind,
        fresh=lambda: load().model,
        labels=pictures.labels,
        problem=problem,
        majority=usual,
        counts={split: dict(count_labels(part, pictures.labels)) for split, part in pictures.splits.items()},
        warnings=pictures.warnings,
        data_digest=content_digest(pictures.splits),
    )
