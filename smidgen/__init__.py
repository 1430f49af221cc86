"""Smidgen: adapters of kilobytes for large pre-trained models, on top of peft.

Importing it makes peft know its adapters; ``import smidgen`` loads the engine alone.

Example:
    >>> import torch, smidgen
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> model = smidgen.adapt(model, "svfit", r=4, target_modules=["0"])
    >>> smidgen.trained_numbers(model)
    4
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smidgen.adapters.api import (
    adapt,
    default_targets,
    disabled,
    load,
    merge,
    parameter_groups,
    save,
    set_active,
    set_strength,
    trained_numbers,
)
from smidgen.adapters.tuner import peft_bridge as _peft_bridge
from smidgen.adapters.tuner.bank import Bank
from smidgen.adapters.tuner.config import SmidgenConfig, config
from smidgen.adapters.verify import VerifyReport, verify
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
    from smidgen.bases.counting import count
    from smidgen.bases.embedded import embedded_base

_peft_bridge.register()

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
    "config",
    "count",
    "default_targets",
    "disabled",
    "embedded_base",
    "load",
    "merge",
    "parameter_groups",
    "save",
    "set_active",
    "set_strength",
    "trained_numbers",
    "verify",
]

_LATER = {"count": "smidgen.bases.counting", "embedded_base": "smidgen.bases.embedded"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'smidgen' has no attribute {name!r}")
