"""One set of calls for what the recipes train: smidgen's adapters, and peft's own methods they are compared with.

Both are ordinary peft. Ours go through ``smidgen.*``, which locks, checks and verifies; peft's go through peft's own
functions, so that a comparison file is exactly what peft writes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen
from smidgen.errors import AdapterFileError, ConfigError

FILES = ("adapter_config.json", "adapter_model.safetensors")
NAME = "default"


def is_ours(config: peft.PeftConfig) -> bool:
    return isinstance(config, smidgen.SmidgenConfig)


def adapt(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Put a fresh adapter of any peft method into ``model``, in place."""
    if is_ours(config):
        return smidgen.adapt(model, config)
    try:
        return peft.inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise ConfigError(f"peft refuses its own {type(config).__name__}: {error}") from error


def trained_numbers(model: nn.Module) -> int:
    """Numbers of the model that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def groups(
    model: nn.Module, config: peft.PeftConfig, rate: float, transform_rate: float, decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: residuals apart from transforms for our methods, one group for peft's."""
    if is_ours(config):
        return smidgen.parameter_groups(model, lr=rate, transform_lr=transform_rate, weight_decay=decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": trained, "lr": rate, "weight_decay": decay}]


def save(model: nn.Module, config: peft.PeftConfig, folder: Path) -> int:
    """Write the adapter's two files, each in one step; returns their bytes."""
    if is_ours(config):
        smidgen.save(model, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            config.save_pretrained(str(hidden))
            tensors = peft.get_peft_model_state_dict(model, adapter_name=NAME)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, hidden / FILES[1])
            for file in FILES:
                os.replace(hidden / file, folder / file)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return sum((folder / file).stat().st_size for file in FILES)


def load(model: nn.Module, folder: Path) -> peft.PeftConfig:
    """Load an adapter folder of any peft method into ``model``, in place; returns its config."""
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder} is not an adapter folder: {error}") from error
    if is_ours(config):
        smidgen.load(model, folder)
        return config
    peft.inject_adapter_in_model(config, model, NAME)
    peft.set_peft_model_state_dict(model, load_file(folder / FILES[1]), adapter_name=NAME)
    return config


def verify(model: nn.Module, folder: Path, config: peft.PeftConfig) -> tuple[bool, list[str]]:
    """Is the adapter of ``folder`` on in ``model``, and if not, why? peft's own methods are taken at their word."""
    if not is_ours(config):
        return True, []
    found = smidgen.verify(model, folder)
    return bool(found.ok), [str(reason) for reason in found.reasons]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within, ``model`` is the base."""
    if getattr(model, "peft_config", None) and all(map(is_ours, model.peft_config.values())):  # type: ignore[union-attr,operator]
        with smidgen.disabled(model):
            yield model
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
