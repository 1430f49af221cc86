"""Going on from a finished adapter, trained or predicted: what must be the same, and what is said where it is not.

The method, its ranks, the layers and the classes are the adapter's; data, steps and learning rates are the run's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from smidgen.adapters.checkpoint.files import WEIGHTS_NAME
from smidgen.adapters.components import component_folders
from smidgen.adapters.tuner.config import SmidgenConfig, is_ours, read_smidgen_config
from smidgen.adapters.tuner.matching import matched_layers
from smidgen.bases.origin import Origin, read_origin
from smidgen.errors import ConfigError

_VALUES: Mapping[str, Callable[[Any], Any]] = {  # where an adapter's config holds what a setting names
    "rank": lambda config: config.r,
    "residual_rank": lambda config: config.r,
    "alpha": lambda config: config.residual_options.get("alpha"),
    "transform_rank": lambda config: config.transform_options.get("rank"),
    "store_dtype": lambda config: config.store_dtype,
}


def starting(settings: Any, folder: Path) -> Any:
    """Settings to go on from the adapter in ``folder`` with: its method and its base, and what else a kind of settings reads there
    (``as_in``); a command's flags are read over them."""
    from dataclasses import fields, replace

    origin = read_origin(folder)
    base = next(field.name for field in fields(settings) if field.name in ("model", "base"))
    try:
        adapter = type(settings.adapter)(**({"method": origin.method} if origin.method else {}))
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds an adapter of {origin.method}, which this command does not train on: {error}"
        ) from error
    settings = replace(settings, adapter=adapter, **({base: origin.base} if origin.base else {}))
    return settings.as_in(origin.folder) if hasattr(settings, "as_in") else settings


def check_start(
    folder: Path,
    out: Path,
    task: str,
    wanted: Any,
    given: Mapping[str, Any],
    model: nn.Module,
    labels: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> str:
    """Refuse to go on from ``folder`` where it is not what the settings ask for; returns the digest of what it holds.

    ``wanted`` is the config that the settings make (peft's, or one of ``engine``'s controls, which is refused), ``given`` what they say by name (None: nothing), ``labels`` are the data's,
    ``beside`` the further components to train.

    Raises:
        ConfigError: another task, method, rank, layers or classes, in words.
        AdapterFileError: it is no adapter's folder.
    """
    origin = read_origin(folder)
    if folder.resolve() == out.resolve():
        raise ConfigError(f"--from-adapter {folder} is --out too; what comes of it needs a folder of its own.")
    if not origin.method:
        raise ConfigError(f"{folder} holds a trained head or a whole model, no adapter to go on from.")
    if not isinstance(wanted, PeftConfig):
        raise ConfigError(
            f"The adapter to go on from decides what is trained; leave out --method {wanted.kind}, or --from-adapter."
        )
    if origin.task != task:
        raise ConfigError(f"{folder} is an adapter for {origin.task}, and this is {task}.")
    own = read_smidgen_config(folder) if is_ours(folder) else PeftConfig.from_pretrained(str(folder))
    if _kind(own) != _kind(wanted):
        raise ConfigError(
            f"{folder} is a {origin.method} adapter, and the settings ask for {_name(wanted)}: leave --method out."
        )
    for name, value in given.items():
        if value is not None and name in _VALUES and isinstance(own, SmidgenConfig):
            has, asked = _VALUES[name](own), _VALUES[name](wanted)
            if has != asked:
                raise ConfigError(
                    f"{folder} has {name} {has}, and the settings ask for {asked}: leave it out to go on."
                )
    if given.get("target_modules") is not None and isinstance(own, SmidgenConfig):
        _check_layers(folder, set(matched_layers(own, model)), set(matched_layers(wanted, model)))
    _check_labels(origin, labels)
    has, asked = {path.name for path in component_folders(folder)}, set(beside)
    if has != asked:
        raise ConfigError(
            f"{folder} adapts {', '.join(sorted(has)) or 'no text encoder'}, and the settings train "
            f"{', '.join(sorted(asked)) or 'none'}: {'give' if has else 'leave out'} --train-text-encoder."
        )
    files = [where / WEIGHTS_NAME for where in (folder, *component_folders(folder))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _kind(config: PeftConfig) -> tuple[Any, ...]:
    if isinstance(config, SmidgenConfig):
        return "ours", *config.members.values()
    return (str(getattr(config.peft_type, "value", config.peft_type)),)


def _name(config: PeftConfig) -> str:
    return config.label() if isinstance(config, SmidgenConfig) else f"peft's {type(config).__name__}"


def _check_layers(folder: Path, has: set[str], asked: set[str]) -> None:
    for some, what in ((asked - has, "not on"), (has - asked, "on")):
        if some:
            raise ConfigError(
                f"{folder} is {what} {min(some)!r}, and the settings' target_modules say otherwise: leave them out to go on."
            )


def _check_labels(origin: Origin, labels: Sequence[str]) -> None:
    has = origin.head.labels if origin.head is not None else ()
    if tuple(labels) != has:
        raise ConfigError(
            f"{origin.folder} sorts into {', '.join(has) or 'no classes'}, and the data has {', '.join(labels) or 'none'}: to go on, "
            "they must be the same."
        )
