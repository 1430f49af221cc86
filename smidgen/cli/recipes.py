"""Commands that train: ``personalize`` and ``train TASK``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from smidgen.cli.build import Section, resolve


def personalize(
    data: Path | None = None,
    /,
    *,
    settings: Annotated[Any, Section("tasks.personalize.settings:PersonalizeConfig", "tasks.personalize.settings")],
) -> None:
    """Train an adapter of kilobytes on the pictures in a folder.

    Captions come from metadata.jsonl or metadata.csv (file_name, text), from .txt files beside the pictures, or
    from --instance-prompt. Ends with the adapter, a contact sheet, a loss plot and a report in the --out folder.

    Args:
        data: what to learn from.
        settings: all that can be set.
    """
    _train("tasks.personalize.recipe:personalize", settings, folder=data)


def control(
    data: Path | None = None,
    /,
    *,
    settings: Annotated[Any, Section("tasks.control.settings:ControlConfig", "tasks.control.settings")],
) -> None:
    """Train a hint encoder and an adapter that make a text-to-image base follow control pictures.

    The folder is an imagefolder whose metadata.jsonl has file_name, control_file_name and text; for --control canny
    pictures with captions are enough. Draw with it: smidgen generate OUT --control PICTURE --prompt TEXT.

    Args:
        data: what to learn from.
        settings: all that can be set.
    """
    _train("tasks.control.recipe:control", settings, folder=data)


def text_classification(
    data: str | None = None,
    /,
    *,
    settings: Annotated[
        Any, Section("tasks.text_classification.settings:TextClassificationConfig", "tasks.text_classification.recipe")
    ],
) -> None:
    """Train an adapter of kilobytes, and a head, on labelled texts.

    The data is a packaged name, a table (csv, tsv, jsonl, json, parquet) or a folder of train, validation and test
    tables; what is missing is cut from train. Columns: --text-column, --label-column, or --glue-task.

    Args:
        data: what to learn from.
        settings: all that can be set.
    """
    _train("tasks.text_classification.recipe:text_classification", settings, path=data)


def image_classification(
    data: str | None = None,
    /,
    *,
    settings: Annotated[
        Any,
        Section("tasks.image_classification.settings:ImageClassificationConfig", "tasks.image_classification.recipe"),
    ],
) -> None:
    """Train an adapter of kilobytes, and a head, on labelled pictures.

    The data is a packaged name or a folder: train/cat/1.png, cat/1.png, or metadata.csv with file_name and label.

    Args:
        data: what to learn from.
        settings: all that can be set.
    """
    _train("tasks.image_classification.recipe:image_classification", settings, path=data)


def instruction(
    data: str | None = None,
    /,
    *,
    settings: Annotated[Any, Section("tasks.instruction.settings:InstructionConfig", "tasks.instruction.recipe")],
) -> None:
    """Train an adapter of kilobytes on conversations; only what the assistant says is learnt.

    The data is a packaged name, a file or a folder with messages (tools and thoughts too), a question and its answer
    in columns, or a prompt and its completion.

    Args:
        data: what to learn from.
        settings: all that can be set.
    """
    _train("tasks.instruction.recipe:instruction", settings, path=data)


def _train(recipe: str, settings: Any, **data: Any) -> None:
    """Run a recipe on the data given first on the command line, or on what the settings name."""
    if None not in data.values():
        settings = replace(settings, data=replace(settings.data, **data))
    report = resolve(recipe)(settings)
    if report is not None:  # the other processes of a run have none
        print(report.table())
        print("\n".join(["", *report.notes, f"Adapter, plots, report and model card: {report.adapter}/"]))
