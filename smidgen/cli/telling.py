"""Commands that tell: methods, counts, settings."""

from pathlib import Path
from typing import Any, Literal


def methods() -> None:
    """List the methods: what each is made of and how many numbers it trains in a matrix."""
    from smidgen.adapters.methods import known_methods
    from smidgen.tasks import cards

    head = ["method", "transform", "residual", "output", "trained numbers per matrix", "defaults", "paper"]
    rows = []
    for method in known_methods():
        defaults = ", ".join(f"{key}={value}" for key, value in method.defaults.items())
        parts = [method.transform or "-", method.residual or "-", method.output or "-"]
        rows.append([method.name, *parts, method.formula, defaults, method.paper])
    print(cards.table(head, rows, left=len(head)))


Architecture = Literal[
    "sd15", "sdxl", "roberta-base", "roberta-large", "vit-base", "vit-large", "llama2-7b",
    "deberta-v3-base", "gemma-2b", "gemma-7b", "llama3-8b",
]  # fmt: skip


def count(
    method: str,
    /,
    architecture: Architecture,
    rank: int | str | None = None,
    transform_rank: int | None = None,
    residual_rank: int | None = None,
    target_modules: list[str] | None = None,
) -> None:
    """Count the numbers METHOD trains in a well-known architecture, without its weights.

    Args:
        method: as in `smidgen methods`, or tlora(2,6), tlora*(2,4).
        architecture: built on the meta device.
        rank: rank of the residual.
        transform_rank: ring rank of the transform.
        residual_rank: ring rank of the residual.
        target_modules: endings of module names (default: the paper's for the architecture).
    """
    import smidgen

    named: dict[str, Any] = {"r": rank, "transform_rank": transform_rank, "residual_rank": residual_rank}
    named["target_modules"] = target_modules
    given = {name: value for name, value in named.items() if value is not None}
    print(f"{smidgen.count(architecture, smidgen.config(method, **given)):,}")


def config(
    action: Literal["show", "validate"],
    file: Path | None = None,
    /,
    preset: str = "default",
    recipe: str = "personalize",
) -> None:
    """Show every setting with its value, or check a config file.

    Args:
        action: show prints the whole config as YAML; validate only checks it.
        file: a YAML file as for --config (none: a preset).
        preset: which preset to show when there is no file.
        recipe: whose settings: personalize, or a task of `smidgen train`.
    """
    from smidgen.cli.build import sections
    from smidgen.cli.table import find
    from smidgen.training.settings import dump_yaml

    settings = sections(recipe if recipe == "personalize" else find(recipe, "train"))["settings"]
    found = settings.start(file, None if file else preset)
    print(dump_yaml(found).rstrip() if action == "show" else f"{file or preset} is valid.")
