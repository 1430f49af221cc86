"""One set of calls for what the recipes train: smidgen's adapters, peft's own methods, and two controls.

Adapters are ordinary peft. Ours go through ``smidgen.*``, which locks, checks and verifies; peft's go through peft's own
functions, so that a comparison file is exactly what peft writes. The controls train a base's head alone, or all of it.
``heads`` are names of modules that are trained and saved beside whatever else is.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters import verify as proof
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.errors import AdapterFileError, ConfigError, did_you_mean

FILES = ("adapter_config.json", "adapter_model.safetensors")
CONTROL = "control.json"  # beside the tensors of a control
NAME = "default"
_OWNER = "_smidgen_peft_model"
_WRAP = "base_model.model."  # peft's files name tensors as they are inside a PeftModel


@dataclass(frozen=True)
class LinearProbe:
    """A control: the head alone is trained. Saved as ``head.safetensors``."""

    kind = "linear_probe"
    file = "head.safetensors"


@dataclass(frozen=True)
class FullFineTuning:
    """A control: every number of the base is trained. Saved as an ordinary model folder."""

    kind = "full"
    file = "model.safetensors"


Control = LinearProbe | FullFineTuning
Config = peft.PeftConfig | Control
_CONTROLS: dict[str, Control] = {control.kind: control for control in (LinearProbe(), FullFineTuning())}


def is_ours(config: Config) -> bool:
    return isinstance(config, SmidgenConfig)


def peft_config(method: str, rank: Any, alpha: float | None, targets: Any) -> peft.PeftConfig:
    """peft's own config for ``method`` (lora, oft, loha, ...), its other options at peft's defaults."""
    known = {name.value.lower(): kind for name, kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = known.get(method.lower())
    if kind is None or kind is SmidgenConfig:
        raise ConfigError(f"peft has no method {method!r}.{did_you_mean(method, known)}")
    fields = kind.__dataclass_fields__
    wanted = {"r": rank, "lora_alpha" if "lora_alpha" in fields else "alpha": alpha, "target_modules": targets}
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in fields:
            raise ConfigError(f"peft's {kind.__name__} has no option {name!r}; leave it out.")
    return kind(**given)


def adapt(model: nn.Module, config: Config, heads: Sequence[str] = ()) -> nn.Module:
    """Put a fresh adapter of any peft method into ``model``, in place, or make ready what a control trains."""
    if isinstance(config, FullFineTuning):
        return model
    if isinstance(config, LinearProbe):
        if not heads:
            raise ConfigError("linear_probe trains a head, and this model has none of its own.")
        model.requires_grad_(False)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        return model
    if heads:
        config.modules_to_save = list(heads)  # type: ignore[attr-defined]
    if is_ours(config):
        return api.adapt(model, config)
    try:
        return _inject(model, config)
    except ValueError as error:
        raise ConfigError(f"peft refuses its own {type(config).__name__}: {error}") from error


def hold_statistics(model: nn.Module) -> None:
    """Keep batch norms at the base's running statistics while training: they are in no adapter's file."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_rest)


def _rest(module: nn.Module, _inputs: Any) -> None:
    module.eval()


def trained_numbers(model: nn.Module) -> int:
    """Numbers of the model that are trained, heads included."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def head_parameters(model: nn.Module, heads: Sequence[str]) -> list[nn.Parameter]:
    """The trained numbers of ``heads``, before or after an adapter was put in."""
    inside = tuple(f"{name}." for name in heads)
    return [p for name, p in model.named_parameters() if inside and name.startswith(inside) and p.requires_grad]


def groups(
    model: nn.Module,
    config: Config,
    rate: float,
    transform_rate: float,
    decay: float,
    heads: Sequence[str] = (),
    head_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: residuals apart from transforms for our methods, one group for others; heads apart from all."""
    head = head_parameters(model, heads)
    known = {id(parameter) for parameter in head}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[dict[str, Any]] = [{"name": "trained", "params": trained, "lr": rate, "weight_decay": decay}]
    if is_ours(config):
        found = api.parameter_groups(model, lr=rate, transform_lr=transform_rate, weight_decay=decay)
    for group in found:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
    found.append({"name": "head", "params": head, "lr": head_rate or rate, "weight_decay": decay})
    return [group for group in found if group["params"]]


def save(model: Any, config: Config, folder: Path, heads: Sequence[str] = ()) -> int:
    """Write what was trained, each file in one step; returns the bytes of all of them."""
    if is_ours(config):
        _hide_path(model.peft_config[NAME])
        api.save(model, folder)
        return _size(folder, FILES)
    folder.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        if isinstance(config, Control):
            _write_control(model, config, hidden, heads)
        else:
            _hide_path(config)
            config.save_pretrained(str(hidden))
            tensors = peft.get_peft_model_state_dict(_owner(model), adapter_name=NAME)
            wrap = _WRAP if _owner(model) is model else ""
            _write({wrap + name: tensor for name, tensor in tensors.items()}, hidden / FILES[1])
        written = sorted(path.name for path in hidden.iterdir() if path.name != "README.md")
        for file in written:
            os.replace(hidden / file, folder / file)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return _size(folder, written)


def load(model: nn.Module, folder: Path) -> Config:
    """Load a folder that :func:`save` wrote into ``model``, in place; returns its config.

    Raises:
        AdapterFileError: nothing of the kind is there, or its tensors are not those the model calls for.
    """
    if (folder / CONTROL).is_file():
        return _load_control(model, folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder} is not an adapter folder: {error}") from error
    if is_ours(config):
        api.load(model, folder)
        return config
    _inject(model, config)
    owner = _owner(model)
    wrap = _WRAP if owner is model else ""
    tensors = {name.removeprefix(wrap): tensor for name, tensor in _read(folder / FILES[1]).items()}
    _check_names(tensors, peft.get_peft_model_state_dict(owner, adapter_name=NAME), folder)
    peft.set_peft_model_state_dict(owner, tensors, adapter_name=NAME)
    return config


def verify(
    model: nn.Module, folder: Path, config: Config, output: Callable[[], Any] | None = None
) -> tuple[bool, list[str]]:
    """Is what ``folder`` holds on in ``model``, and if not, why? All but ours is taken at its word.

    ``output`` runs the model, should no inputs be known for it.
    """
    if not is_ours(config):
        return True, []
    found = proof.verify(model, folder)
    if found.verdict == "NOT PROVEN" and output is not None:
        found = proof.verify(model, folder, lambda _: output())
    return bool(found.ok), [str(reason) for reason in found.reasons]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within, ``model`` is the base; needs an adapter, as a control cannot be switched off."""
    if getattr(model, "peft_config", None) and all(map(is_ours, model.peft_config.values())):  # type: ignore[union-attr,operator]
        with api.disabled(model):
            yield model
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _inject(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """A fresh adapter of peft's in ``model``. VeRA and its kin keep what their layers share in a PeftModel around it."""
    if PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].uses_shared_state:  # type: ignore[index]
        model.__dict__[_OWNER] = peft.get_peft_model(model, config, NAME)  # not as a submodule: it holds the model
        return model
    return peft.inject_adapter_in_model(config, model, NAME)


def _owner(model: nn.Module) -> nn.Module:
    """What peft saves and loads the adapter of ``model`` through."""
    return model.__dict__.get(_OWNER, model)


def _write_control(model: Any, config: Control, folder: Path, heads: Sequence[str]) -> None:
    if isinstance(config, FullFineTuning) and hasattr(model, "save_pretrained"):
        from smidgen.training.quiet import quiet

        _hide_path(model.config)
        with quiet():
            model.save_pretrained(folder)
    else:
        inside = tuple(f"{name}." for name in heads)
        state = model.state_dict()
        kept = state if isinstance(config, FullFineTuning) else {k: v for k, v in state.items() if k.startswith(inside)}
        _write(kept, folder / config.file)
    (folder / CONTROL).write_text(json.dumps({"kind": config.kind, "heads": list(heads)}, indent=1) + "\n")


def _load_control(model: nn.Module, folder: Path) -> Control:
    try:
        stored = json.loads((folder / CONTROL).read_text())
        config, heads = _CONTROLS[stored["kind"]], tuple(f"{name}." for name in stored["heads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / CONTROL} is damaged: {error}") from error
    tensors = _read(folder / config.file) if isinstance(config, LinearProbe) else _read_model(model, folder)
    _check_names(
        tensors, [n for n in model.state_dict() if isinstance(config, FullFineTuning) or n.startswith(heads)], folder
    )
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from error
    return config


def _read_model(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder by their names in ``model``; transformers' files have names of their own."""
    if not hasattr(model, "save_pretrained"):
        return _read(folder / FullFineTuning.file)
    from smidgen.training.quiet import quiet

    try:
        with quiet():
            found, info = type(model).from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{folder} is no folder of a {type(model).__name__}: {error}") from error
    if info["missing_keys"]:
        raise AdapterFileError(f"{folder} lacks {min(info['missing_keys'])!r} of a {type(model).__name__}.")
    return found.state_dict()


def _check_names(tensors: Mapping[str, Tensor], wanted: Any, folder: Path) -> None:
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise AdapterFileError(
            f"{folder} does not fit this model: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}."
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _hide_path(config: Any) -> None:
    """Files that travel do not tell where the base lay on this machine."""
    for name in ("base_model_name_or_path", "_name_or_path"):
        value = getattr(config, name, None)
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).is_dir()):
            setattr(config, name, Path(value).name)


def _size(folder: Path, files: Sequence[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)
