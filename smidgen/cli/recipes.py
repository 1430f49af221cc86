"""Recipes as commands: one way from flags, a preset or a YAML file to a config, and from there to a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from smidgen.cli.flags import value_of
from smidgen.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Where a recipe lives. ``data`` is the setting of its data section that stands first on the command line."""

    name: str
    summary: str
    help: str
    module: str  # holds the function that runs it
    function: str
    settings: str  # holds its config
    config: str
    presets: str  # holds PRESETS
    data: str = "path"
    kind: Any = str  # of ``data``


def _finetune(name: str, config: str, summary: str, help: str) -> Recipe:
    module = name.replace("-", "_")
    return Recipe(name, summary, help, f"{module}.recipe", module, f"{module}.settings", config, f"{module}.recipe")


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "personalize",
            "teach a text-to-image base one subject from a folder of pictures",
            """Train an adapter of kilobytes on the pictures in a folder.

        Captions come from metadata.jsonl or metadata.csv (file_name, text), from .txt files beside the pictures, or
        from --instance-prompt. Ends with the adapter, a contact sheet, a loss plot and a report in the --out folder.""",
            "personalize.recipe",
            "personalize",
            "personalize.settings",
            "PersonalizeConfig",
            "personalize.settings",
            data="folder",
            kind=Path,
        ),
        Recipe(
            "control",
            "make a text-to-image base follow control pictures: edges, parts, landmarks",
            """Train a hint encoder and an adapter that make a text-to-image base follow control pictures.

        The folder is an imagefolder whose metadata.jsonl has file_name, control_file_name and text; for --control canny
        pictures with captions are enough. Draw with it: smidgen generate OUT --control PICTURE --prompt TEXT.""",
            "control.recipe",
            "control",
            "control.settings",
            "ControlConfig",
            "control.settings",
            data="folder",
            kind=Path,
        ),
        _finetune(
            "text-classification",
            "TextClassificationConfig",
            "sort texts, or pairs of texts, into classes, or give them a number",
            """Train an adapter of kilobytes, and a head, on labelled texts.

        The data is a packaged name, a table (csv, tsv, jsonl, json, parquet) or a folder of train, validation and test
        tables; what is missing is cut from train. Columns: --text-column, --label-column, or --glue-task.""",
        ),
        _finetune(
            "image-classification",
            "ImageClassificationConfig",
            "sort pictures into classes",
            """Train an adapter of kilobytes, and a head, on labelled pictures.

        The data is a packaged name or a folder: train/cat/1.png, cat/1.png, or metadata.csv with file_name and label.""",
        ),
        _finetune(
            "instruction",
            "InstructionConfig",
            "teach a language model to answer",
            """Train an adapter of kilobytes on conversations; only what the assistant says is learnt.

        The data is a packaged name, a file or a folder with messages, or instruction, input and output, or prompt and
        completion.""",
        ),
    )
}


def find(name: str) -> Recipe:
    """The recipe called ``name``; ConfigError with the nearest names otherwise."""
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {name!r}.{did_you_mean(name, RECIPES)} Known: {', '.join(RECIPES)}.")
    return RECIPES[name]


def overview() -> str:
    """The recipes, one a line."""
    width = max(map(len, RECIPES))
    lines = [f"  {name.ljust(width)}  {recipe.summary}" for name, recipe in RECIPES.items()]
    return (
        "usage: smidgen train TASK [DATA] [OPTIONS]\n\n" + "\n".join(lines) + "\n\nsmidgen train TASK --help says more."
    )


def start(recipe: Recipe, config: str | None, preset: str | None) -> Any:
    """The config that ``--config`` or ``--preset`` names."""
    from smidgen.training.settings import load_yaml

    if config and preset:
        raise ConfigError("Give --config or --preset, not both.")
    if config:
        return load_yaml(getattr(_module(recipe.settings), recipe.config), config)
    presets = _module(recipe.presets).PRESETS
    if preset and preset not in presets:
        raise ConfigError(f"There is no preset {preset!r}.{did_you_mean(preset, presets)} Known: {', '.join(presets)}.")
    return presets[preset or "default"]


def recipe_command(recipe: Recipe, words: Sequence[str]) -> Callable[..., None]:
    """The command with the defaults that ``--config`` or ``--preset`` among ``words`` names."""
    import tyro

    default = start(recipe, value_of(words, "--config"), value_of(words, "--preset"))
    first = getattr(default.data, recipe.data)
    shown = replace(default, data=replace(default.data, **{recipe.data: None}))

    def command(data: Any = first, /, settings: Any = shown, config: Any = None, preset: Any = "default") -> None:
        chosen = settings if data is None else replace(settings, data=replace(settings.data, **{recipe.data: data}))
        report = getattr(_module(recipe.module), recipe.function)(chosen)
        if report is not None:  # the other processes of a run have none
            print(report.table())
            print("\n".join(["", *report.notes, f"Adapter, plots, report and model card: {report.adapter}/"]))

    command.__annotations__ = {
        "data": Annotated[recipe.kind | None, tyro.conf.Positional],
        "settings": Annotated[getattr(_module(recipe.settings), recipe.config), tyro.conf.arg(name="")],
        "config": Path | None,
        "preset": Literal[tuple(_module(recipe.presets).PRESETS)],
        "return": None,
    }
    command.__doc__ = f"""{recipe.help}

        Args:
            data: what to learn from.
            settings: all that can be set.
            config: YAML file of settings; flags override it.
            preset: settings to start from.
        """
    return command


def _module(name: str) -> Any:
    return import_module(f"smidgen.tasks.{name}")
