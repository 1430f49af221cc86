"""What the recipes train: an adapter of any method through ``smidgen.adapters.api``, or one of two controls.

The controls train a base's head alone, or all of it. ``heads`` are names of modules that are trained and saved beside
whatever else is.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save_file
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters import verify as proof
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, read_safetensors
from smidgen.adapters.methods import Rates
from smidgen.adapters.tuner.carried import adapter_parameters
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.heads import saved_modules
from smidgen.adapters.tuner.stored import round_live
from smidgen.errors import AdapterFileError, ConfigError, did_you_mean

FILES = (CONFIG_NAME, WEIGHTS_NAME)
CONTROL = "control.json"  # beside the tensors of a control
NAME = "default"


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
    """Put a fresh adapter into ``model``, in place, or make ready what a control trains."""
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
    return api.adapt(model, config)  # type: ignore[no-any-return]


def go_on(model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapter of ``folder`` into ``model``, in place, to be trained on.

    Raises:
        SmidgenError: as :func:`smidgen.load`.
    """
    api.load(model, folder)
    trained = {*map(id, adapter_parameters(model, NAME))}
    for head in saved_modules(model, NAME).values():
        trained.update(map(id, head.modules_to_save[NAME].parameters()))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    model.peft_config[NAME].inference_mode = False  # type: ignore[index,union-attr]
    return model


def hold_statistics(model: nn.Module) -> None:
    """Keep batch norms at the base's running statistics while training: they are in no adapter's file."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_rest)


def _rest(module: nn.Module, _inputs: Any) -> None:
    module.eval()


def head_parameters(model: nn.Module, heads: Sequence[str]) -> list[nn.Parameter]:
    """The trained numbers of ``heads``, before or after an adapter was put in."""
    inside = tuple(f"{name}." for name in heads)
    return [p for name, p in model.named_parameters() if inside and name.startswith(inside) and p.requires_grad]


def groups(model: nn.Module, rates: Rates, decay: float, heads: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Optimizer groups: members of adapters by their side and what else is trained, heads apart from all."""
    head = head_parameters(model, heads)
    known = {id(parameter) for parameter in head}
    found = api.parameter_groups(
        model, lr=rates.residual, transform_lr=rates.transform, weight_decay=decay, output_lr=rates.of("output")
    )
    for group in found:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
    found.append({"name": "head", "params": head, "lr": rates.head or rates.residual, "weight_decay": decay})
    return [group for group in found if group["params"]]


def as_in_file(model: Any) -> None:
    """Round an adapter that is stored in codes, so that what is measured from here on is what its file does."""
    for part in api.parts(model).values():
        config = (getattr(part, "peft_config", None) or {}).get(NAME)
        if isinstance(config, SmidgenConfig) and config.store_dtype in packing.CODES:
            round_live(part, config, NAME)


def save(model: Any, config: Config, folder: Path, heads: Sequence[str] = ()) -> int:
    """Write what was trained, all or nothing; returns the bytes of the files."""
    if isinstance(config, Control):
        with new_files(folder) as scratch:
            _write_control(model, config, scratch, heads)
            written = [path.name for path in scratch.iterdir()]
    else:
        api.save(model, folder)
        carrying = [where for where, part in api.parts(model).items() if NAME in api.names(part)]
        written = [f"{where}/{file}".removeprefix("/") for where in carrying for file in FILES]
    return sum((folder / file).stat().st_size for file in written)


def load(model: Any, folder: Path) -> None:
    """Load a folder that :func:`save` wrote into ``model``, a module or a pipeline, in place.

    Raises:
        AdapterFileError: nothing of the kind is there, or its tensors are not those the model calls for.
    """
    if (folder / CONTROL).is_file():
        _load_control(api.denoiser(model), folder)
    else:
        api.load(model, folder)


def verify(model: Any, folder: Path, output: Callable[[], Any] | None = None) -> tuple[bool, list[str]]:
    """Is what ``folder`` holds on in ``model``, and if not, why? A control is taken at its word.

    ``output`` runs the model, should no inputs be known for it.
    """
    if (folder / CONTROL).is_file():
        return True, []
    found = proof.verify(model, folder)
    if found.verdict == "NOT PROVEN" and output is not None:
        found = proof.verify(model, folder, lambda _: output())
    return found.ok, found.reasons


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
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}, folder / config.file)
    (folder / CONTROL).write_text(json.dumps({"kind": config.kind, "heads": list(heads)}, indent=1) + "\n")


def _load_control(model: nn.Module, folder: Path) -> None:
    try:
        stored = json.loads((folder / CONTROL).read_text())
        config, heads = _CONTROLS[stored["kind"]], tuple(f"{name}." for name in stored["heads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / CONTROL} is damaged: {error}") from error
    full = isinstance(config, FullFineTuning)
    tensors = _read_model(model, folder) if full else read_safetensors(folder / config.file)
    packing.check_names(tensors, [n for n in model.state_dict() if full or n.startswith(heads)], str(folder))
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from error


def _read_model(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder by their names in ``model``; transformers' files have names of their own."""
    if not hasattr(model, "save_pretrained"):
        return read_safetensors(folder / FullFineTuning.file)
    from smidgen.training.quiet import quiet

    try:
        with quiet():
            found, info = type(model).from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{folder} is no folder of a {type(model).__name__}: {error}") from error
    if info["missing_keys"]:
        raise AdapterFileError(f"{folder} lacks {min(info['missing_keys'])!r} of a {type(model).__name__}.")
    return found.state_dict()


def _hide_path(config: Any) -> None:
    """Files that travel do not tell where the base lay on this machine."""
    value = getattr(config, "_name_or_path", None)
    if isinstance(value, str) and (Path(value).is_absolute() or Path(value).is_dir()):
        config._name_or_path = Path(value).name
