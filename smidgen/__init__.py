"""Smidgen: adapters of kilobytes for large pre-trained models, on top of peft.

Importing it makes peft know its adapters. It loads nothing until one of its names, or peft, is used.

Example:
    >>> import torch, smidgen
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> model = smidgen.adapt(model, "svfit", r=4, target_modules=["0"])
    >>> smidgen.trained_numbers(model)
    4
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smidgen.errors import (
    AdapterFileError,
    BaseLockError,
    ConfigError,
    DataError,
    MissingExtraError,
    SmidgenError,
    TargetError,
)

if TYPE_CHECKING:
    from smidgen.adapters.api import (
        adapt,
        default_targets,
        disabled,
        load,
        merge,
        names,
        parameter_groups,
        save,
        set_active,
        set_strength,
        trained_numbers,
    )
    from smidgen.adapters.bank import Bank
    from smidgen.adapters.combine import combine
    from smidgen.adapters.extract import extract
    from smidgen.adapters.resize import resize
    from smidgen.adapters.tuner.config import SmidgenConfig, config
    from smidgen.adapters.verify import VerifyReport, verify
    from smidgen.bases.counting import count
    from smidgen.bases.embedded import embedded_base

__version__ = "0.1.0"
__all__ = [
    "AdapterFileError",
    "Bank",
    "BaseLockError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "SmidgenConfig",
    "SmidgenError",
    "TargetError",
    "VerifyReport",
    "adapt",
    "combine",
    "config",
    "count",
    "default_targets",
    "disabled",
    "embedded_base",
    "extract",
    "load",
    "merge",
    "names",
    "parameter_groups",
    "resize",
    "save",
    "set_active",
    "set_strength",
    "trained_numbers",
    "verify",
]

_API = "adapt default_targets disabled load merge names parameter_groups save set_active set_strength trained_numbers"
_LATER = {
    **dict.fromkeys(_API.split(), "smidgen.adapters.api"),
    "Bank": "smidgen.adapters.bank",
    "combine": "smidgen.adapters.combine",
    "extract": "smidgen.adapters.extract",
    "resize": "smidgen.adapters.resize",
    "SmidgenConfig": "smidgen.adapters.tuner.config",
    "config": "smidgen.adapters.tuner.config",
    "VerifyReport": "smidgen.adapters.verify",
    "verify": "smidgen.adapters.verify",
    "count": "smidgen.bases.counting",
    "embedded_base": "smidgen.bases.embedded",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        found = getattr(import_module(_LATER[name]), name)
        globals()[name] = found
        return found
    if name == "adapters":
        return import_module("smidgen.adapters")
    raise AttributeError(f"module 'smidgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Modules of others, and what of ours is to follow when they are imported: peft has no entry points for tuners, so its tables
# can only be written once it is loaded, and loading it here would cost ``smidgen --help`` the seconds that torch takes. A saved
# adapter is to open in peft and in transformers after ``import smidgen`` alone.
_FOLLOWED = {
    "peft": ("smidgen.adapters", "smidgen.bases.hosts"),
    "diffusers.loaders.lora_base": ("smidgen.adapters.loaders",),
    "diffusers.loaders.peft": ("smidgen.adapters.loaders",),
    "diffusers.models.modeling_utils": ("smidgen.adapters.loaders",),
    "diffusers.pipelines.pipeline_utils": ("smidgen.adapters.loaders",),
    "transformers.models.auto.modeling_auto": ("smidgen.bases.hosts",),
    "transformers.pipelines": ("smidgen.bases.hosts",),
}


def _follow(name: str) -> None:
    for module in _FOLLOWED[name]:
        getattr(import_module(module), "follow", lambda: None)()


class _Finder(MetaPathFinder):
    """Has what follows a module of others follow as soon as that is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _FOLLOWED:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_follow(module: ModuleType) -> None:
                load(module)
                _follow(fullname)

            spec.loader.exec_module = load_and_follow  # type: ignore[method-assign]
        return spec


for _name in _FOLLOWED:
    if _name in sys.modules:
        _follow(_name)
sys.meta_path.insert(0, _Finder())
