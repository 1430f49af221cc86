"""Configs as files: frozen dataclasses <-> YAML, where a key nobody knows is an error that names the nearest one."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from smidgen.errors import ConfigError, did_you_mean

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, ready for YAML or JSON; sections become nested mappings."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build ``kind`` from plain values; missing keys keep their defaults. ConfigError names each wrong key or type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'The config'} must be a mapping of names to values, not {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    unknown = [str(name) for name in values if name not in fields]
    if unknown:
        raise ConfigError(f"Unknown key {(where + unknown[0])!r}.{_hint(unknown[0], kind)}")
    made = {name: _value(hints[name], value, where + name) for name, value in values.items()}
    try:
        return kind(**made)
    except TypeError as error:
        raise ConfigError(f"{where or 'The config'} is incomplete: {error}") from error


def load_yaml(kind: type[C], path: str | Path) -> C:
    """Read a config file. ConfigError for a file that is missing, not YAML, or holds an unknown key or wrong type."""
    check_file(Path(path))
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The config {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, a date that there is not
        raise ConfigError(f"The config {str(path)!r} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"The config {str(path)!r} is nested too deeply.") from error
    try:
        return from_dict(kind, values or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_file(path: Path) -> None:
    """ConfigError for a pipe, socket or device: reading one may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is a pipe or a device; give a file (what a pipe says can be saved in one).")


def dump_yaml(config: Any) -> str:
    """The whole config, defaults included, as YAML in the order of its fields."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"train.seed": 0, ...}``: every leaf of a config by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        part = getattr(config, name)
        found |= flat(part, f"{prefix}{name}.") if dataclasses.is_dataclass(part) else {prefix + name: value}
    return found


def decisive(config: Any, *aside: str) -> dict[str, Any]:
    """The leaves that decide a run's numbers: without those called ``aside``, where things lie, and how a run is watched."""
    return {name: value for name, value in flat(config).items() if name.rpartition(".")[2] not in {*_WATCHED, *aside}}


_WATCHED = (
    "out", "folder", "path", "overwrite", "resume_from_checkpoint", "gradient_checkpointing", "report_to", "preview_steps",
    "checkpointing_steps", "checkpoints_total_limit",
)  # fmt: skip


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _hint(name: str, kind: type) -> str:
    """Nearest known names, those of sections with their dots."""
    leaves: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        part = typing.get_type_hints(kind)[field.name]
        leaves[field.name] = field.name
        if dataclasses.is_dataclass(part):
            leaves |= {inner.name: f"{field.name}.{inner.name}" for inner in dataclasses.fields(part)}
    if name in leaves:
        return f" It belongs under {leaves[name]!r}."
    hint = did_you_mean(name, leaves)
    for leaf, dotted in leaves.items():
        hint = hint.replace(f"'{leaf}'", f"'{dotted}'")
    return hint or f" Known: {', '.join(field.name for field in dataclasses.fields(kind))}."


def _value(hint: Any, value: Any, name: str) -> Any:
    section = next((part for part in _parts(hint) if dataclasses.is_dataclass(part)), None)
    if section is not None and (section is hint or isinstance(value, Mapping)):
        return from_dict(typing.cast(type, section), value, f"{name}.")
    if _holds_sections(hint) and isinstance(value, list | tuple):
        return tuple(_value(typing.get_args(hint)[0], item, f"{name}[{number}]") for number, item in enumerate(value))
    for accepted in _parts(hint):
        fitted = _fit(accepted, value)
        if fitted is not _NO:
            return fitted
    raise ConfigError(f"{name} must be {_words(hint)}, not {value!r}." + _choices(hint, value))


_NO = object()


def _fit(hint: Any, value: Any) -> Any:
    """``value`` as ``hint``, or _NO. YAML reads 1e-4 as a string and 1 as an int; both are good floats."""
    origin = typing.get_origin(hint)
    if hint is type(None):
        return None if value is None else _NO
    if origin is typing.Literal:
        return (
            value if any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)) else _NO
        )
    if origin is tuple:
        items = [_fit(typing.get_args(hint)[0], item) for item in value] if isinstance(value, list | tuple) else [_NO]
        return _NO if _NO in items else tuple(items)
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else _NO
    if hint is float and not isinstance(value, bool):
        try:
            return float(value) if isinstance(value, int | float | str) else _NO
        except ValueError:
            return _NO
    if hint is Path:
        return Path(value) if isinstance(value, str | Path) and str(value) else _NO
    if hint is int and isinstance(value, bool):
        return _NO
    return value if isinstance(hint, type) and isinstance(value, hint) else _NO


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a hint that is none alone."""
    return typing.get_args(hint) if _is_union(hint) else (hint,)


def _holds_sections(hint: Any) -> bool:
    """Is ``hint`` a tuple of dataclasses?"""
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _words(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a mapping of names to values"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is dict:
        return "a mapping of names to values"
    if typing.get_origin(hint) is tuple:
        return f"a list of {_words(typing.get_args(hint)[0])}"
    return str(getattr(hint, "__name__", hint))


def _choices(hint: Any, value: Any) -> str:
    known = [
        str(c) for part in _parts(hint) if typing.get_origin(part) is typing.Literal for c in typing.get_args(part)
    ]
    return did_you_mean(str(value), known)
