"""The recipes an experiment may name: their config and how they prepare base, head and data."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smidgen.errors import ConfigError
from smidgen.training.settings import from_dict

RECIPES: Mapping[str, str] = {  # recipe -> its config
    "text-classification": "TextClassificationConfig",
    "image-classification": "ImageClassificationConfig",
    "instruction": "InstructionConfig",
}
HARNESS_SETS = {  # what differs from cell to cell, or has no meaning here
    "": ("out", "resume_from_checkpoint", "overwrite", "push_to_hub", "hub_private", "head", "from_adapter"),
    "adapter": (
        "method",
        "transform",
        "residual",
        "rank",
        "alpha",
        "transform_rank",
        "residual_rank",
        "target_modules",
        "learning_rate",
        "transform_learning_rate",
        "output",
    ),
    "train": (
        "seed",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "preview_steps",
        "report_to",
        "load_best",
        "eval_steps",
        "early_stopping_patience",
    ),
}


def recipe_config(recipe: str, settings: Mapping[str, Any], seed: int, steps: int | None = None) -> Any:
    """The recipe's config with the settings of an experiment, for one seed.

    With ``steps`` it is a training of that length. Nothing is evaluated along the way: the last checkpoint counts.

    Raises:
        ConfigError: an unknown key, a wrong type, or a setting that the harness itself decides.
    """
    for section, names in HARNESS_SETS.items():
        given = settings.get(section, {}) if section else settings
        clash = [name for name in names if isinstance(given, Mapping) and name in given]
        if clash:
            dotted = f"{section}.{clash[0]}" if section else clash[0]
            raise ConfigError(f"settings: {dotted} is decided by the comparison, cell by cell; leave it out.")
    config = from_dict(getattr(_part(recipe, "settings"), RECIPES[recipe]), settings, "settings.")
    train = replace(config.train, seed=seed)
    if steps is not None:
        share = steps / train.max_train_steps
        train = replace(train, max_train_steps=steps, lr_warmup_steps=round(share * train.lr_warmup_steps))
    return replace(config, train=train)


def prepare(recipe: str, config: Any) -> Any:
    """Base, fresh head and task of a recipe (``tasks.finetune.course.Prepared``)."""
    return _part(recipe, "recipe").prepare(config)


def _part(recipe: str, name: str) -> Any:
    return importlib.import_module(f"smidgen.tasks.{recipe.replace('-', '_')}.{name}")
