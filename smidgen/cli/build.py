"""The one builder: a row of the table and raw words become a function whose signature says all flags."""

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from smidgen.cli.extras import check_extras
from smidgen.cli.flags import BASE, MODEL, familiar, value_of
from smidgen.cli.parsing import parse
from smidgen.cli.table import COMMANDS
from smidgen.errors import ConfigError, did_you_mean

_DOCS = """
    preset: settings to start from.
    config: YAML file of settings to start from; flags override it."""


@dataclass(frozen=True)
class Section:
    """Marks a parameter whose fields are flags: a settings class by ``module:name`` inside smidgen, imported when the
    command is run.

    Attributes:
        kind: the class.
        presets: the module that holds its PRESETS; ``--preset`` and ``--config`` then say what the flags start from.
        prefixed: flags are named with their section, as in ``--end-to-end.learning-rate``, where sections share names.
        append: a flag of several values may be given several times.
    """

    kind: str
    presets: str = ""
    prefixed: bool = False
    append: bool = False

    def load(self) -> Any:
        """The class itself."""
        return resolve(self.kind)

    def start(self, config: str | Path | None, preset: str | None) -> Any:
        """The settings that ``--config`` or ``--preset`` names."""
        from smidgen.training.settings import load_yaml

        if config and preset:
            raise ConfigError("Give --config or --preset, not both.")
        if config:
            return load_yaml(self.load(), config)
        presets, preset = self.names(), preset or "default"
        if preset not in presets:
            raise ConfigError(
                f"There is no preset {preset!r}.{did_you_mean(preset, presets)} Known: {', '.join(presets)}."
            )
        return presets[preset]

    def names(self) -> dict[str, Any]:
        """The presets by name."""
        return resolve(f"{self.presets}:PRESETS")  # type: ignore[no-any-return]


def resolve(name: str) -> Any:
    """What ``module:name`` inside smidgen is."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"smidgen.{module}"), attribute)


def sections(name: str) -> dict[str, Section]:
    """The sections of settings among the parameters of a command."""
    hints = typing.get_type_hints(resolve(f"cli.{COMMANDS[name].function}"), include_extras=True)
    marked = {key: getattr(hint, "__metadata__", ()) for key, hint in hints.items()}
    return {key: found[0] for key, found in marked.items() if found and isinstance(found[0], Section)}


def build(name: str, words: Sequence[str]) -> Callable[..., Any]:
    """The command's function with its sections in place, and what ``words`` choose to start from as their defaults."""
    from tyro import conf

    function = resolve(f"cli.{COMMANDS[name].function}")
    signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = dict(signature.parameters)
    chosen: dict[str, tuple[Any, Any]] = {}  # flags that choose the defaults: annotation, default
    for key, section in sections(name).items():
        marks = [conf.arg(name=""), *([conf.UseAppendAction] if section.append else [])]
        hints[key] = Annotated[(section.load(), *marks)]
        if section.presets:
            start = section.start(value_of(words, "--config"), value_of(words, "--preset"))
            if (folder := value_of(words, "--from-adapter")) and not value_of(words, "--config"):
                start = resolve("tasks.going_on:starting")(start, Path(folder))
            parameters[key] = parameters[key].replace(default=start)
            chosen = {"preset": (Literal[tuple(section.names())], "default"), "config": (Path | None, None)}
    for key, (hint, default) in chosen.items():
        hints[key] = hint
        parameters[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)

    def command(*given: Any, **named: Any) -> Any:
        return function(*given, **{key: value for key, value in named.items() if key not in chosen})

    command.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = hints
    command.prefixed = any(section.prefixed for section in sections(name).values())  # type: ignore[attr-defined]
    command.__doc__ = doc + (_DOCS if chosen else "")
    return command


def call_of(name: str, words: Sequence[str]) -> Callable[[], Any]:
    """The call that ``words`` ask a command for; ConfigError when they do not fit its signature."""
    import tyro

    found = sections(name).values()
    fields = {field for section in found for field in section.load().__dataclass_fields__}
    given = familiar(words, MODEL if "model" in fields and "base" not in fields else BASE)
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    command = build(name, given)
    return parse(command, given, name, (tyro.conf.AvoidSubcommands,) if command.prefixed else omit)  # type: ignore[attr-defined]


def run(name: str, words: Sequence[str]) -> None:
    """Parse ``words`` by the signature of a command and call it."""
    check_extras(name, words)
    call_of(name, words)()
