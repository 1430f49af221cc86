"""transformers' own calls, for adapters of ours: add_adapter, load_adapter, from_pretrained, save_pretrained, Trainer.

transformers reads an adapter file key by key and knows no packed ones; it refuses a peft older than the next one, of
which adapters of ours need nothing; and its Trainer reloads a checkpoint of a model that carries adapters itself (not
inside a ``PeftModel``) from a file that it does not write. Each is mended here for adapters of ours; whatever concerns
others goes to transformers' own code, unchanged.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from smidgen.adapters.atomic import new_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, read_config
from smidgen.adapters.tuner.carried import adapter_parameters, tuner_layers
from smidgen.adapters.tuner.config import PEFT_TYPE_NAME, SmidgenConfig
from smidgen.adapters.tuner.heads import saved_modules
from smidgen.errors import SmidgenError, TargetError

logger = logging.getLogger("smidgen")

METHODS = (
    "add_adapter", "set_adapter", "disable_adapters", "enable_adapters", "active_adapters", "get_adapter_state_dict",
    "delete_adapter",
)  # fmt: skip
_MARK = "_hf_peft_config_loaded"  # what transformers' models have
RELOADED = "model.safetensors"  # what Trainer reloads a model from that is no PeftModel
_ours: ContextVar[bool] = ContextVar("smidgen_adapter", default=False)


def follow(load: Callable[..., Any]) -> None:
    """Teaches transformers' adapter methods about adapters of ours, which ``load`` reads; idempotent."""
    from transformers.integrations import peft as host

    mixin = host.PeftAdapterMixin
    if hasattr(host.check_peft_version, "__wrapped__"):
        return
    check = host.check_peft_version

    @functools.wraps(check)
    def check_unless_ours(*args: Any, **kwargs: Any) -> None:
        if not _ours.get():
            check(*args, **kwargs)

    host.check_peft_version = check_unless_ours
    for name in METHODS:
        setattr(mixin, name, _unchecked(getattr(mixin, name)))
    mixin.load_adapter = _reading_ours(mixin.load_adapter, load)


def _unchecked(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, without the check of peft's version where an adapter of ours is meant."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values(), *(getattr(self, "peft_config", None) or {}).values()]
        token = _ours.set(any(isinstance(value, SmidgenConfig) for value in given))
        try:
            found = method(self, *args, **kwargs)
        finally:
            _ours.reset(token)
        if method.__name__ == "enable_adapters":  # transformers switches heads off with the layers, but not on again
            for head in saved_modules(self).values():
                head.enable_adapters(True)
        if method.__name__ == "add_adapter":
            follow_trainer(self)
        return found

    return call


def _reading_ours(method: Callable[..., Any], load: Callable[..., Any]) -> Callable[..., Any]:
    """``load_adapter`` that leaves a folder of ours to the one reader of ours, ``load``."""

    @functools.wraps(method)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        named = peft_model_id or getattr(kwargs.get("load_config"), "pretrained_model_name_or_path", None)
        folder = None if args or kwargs.get("adapter_state_dict") is not None else _folder_of_ours(named, kwargs)
        if folder is None:
            return method(self, peft_model_id, adapter_name, *args, **kwargs)
        name = adapter_name or "default"
        load(self, folder, name)
        if not kwargs.get("is_trainable", False):
            self.eval()
            for part in (*tuner_layers(self, name).values(), *saved_modules(self, name).values()):
                part.requires_grad_(False)
        return _nothing_missing()

    return load_adapter


def _folder_of_ours(named: Any, kwargs: dict[str, Any]) -> Path | None:
    """The folder of an adapter of ours, here or in the hub's cache; None for any other adapter."""
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if not isinstance(named, str | Path):
        return None
    asked = {
        **(getattr(kwargs.get("load_config"), "download_kwargs", None) or {}),
        **kwargs,
        **(kwargs.get("adapter_kwargs") or {}),
    }
    takes = inspect.signature(find_adapter_config_file).parameters
    asked = {key: value for key, value in asked.items() if key in takes and value is not None}
    found = find_adapter_config_file(str(named), **asked)
    try:
        if found is None or read_config(Path(found).parent).get("peft_type") != PEFT_TYPE_NAME:
            return None
    except SmidgenError:
        return None  # transformers says what it thinks of it
    if not Path(named).is_dir():
        cached_file(str(named), WEIGHTS_NAME, **asked)
    return Path(found).parent


def _nothing_missing() -> Any:
    """What ``load_adapter`` answers in transformers 5; in 4 it answers nothing."""
    try:
        from transformers.utils.loading_report import LoadStateDictInfo
    except ImportError:
        return None
    return LoadStateDictInfo(
        **{name: set() for name in LoadStateDictInfo.__dataclass_fields__} | {"conversion_errors": {}, "error_msgs": []}
    )


def check_host(model: nn.Module) -> None:
    """A host that saves the transformers model in it by that model's own call would lose an adapter put around it.

    Raises:
        TargetError: naming the model to adapt instead.
    """
    if not hasattr(model, "save_pretrained") or isinstance(model, PeftModel) or hasattr(model, _MARK):
        return
    for name, module in model.named_modules():
        if hasattr(module, _MARK):
            raise TargetError(
                f"A {type(model).__name__} saves the {type(module).__name__} in it as that saves itself, and loses an adapter that "
                f"was put around it: adapt the model inside, smidgen.adapt(model.get_submodule({name!r}), ...)"
                + (", or call model.add_adapter(config)." if hasattr(model, "add_adapter") else ".")
            )


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def follow_trainer(model: nn.Module) -> None:
    """Has transformers' Trainer write, beside the adapter in each checkpoint, what it reloads it from; idempotent."""
    if not hasattr(model, _MARK):
        return
    try:
        from transformers import trainer
    except ImportError:  # no accelerate, so no Trainer
        return
    if not any(getattr(callback, "of_smidgen", False) for callback in trainer.DEFAULT_CALLBACKS):
        trainer.DEFAULT_CALLBACKS.append(_callback(trainer.TrainerCallback))


def _callback(base: type) -> type:
    class Reloadable(base):  # type: ignore[misc]
        """Makes a Trainer's checkpoint of an adapted transformers model one that it can resume and take as the best."""

        of_smidgen = True

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            own = not isinstance(model, PeftModel) and getattr(model, _MARK, False)
            if own and state.is_world_process_zero and (folder / CONFIG_NAME).is_file():
                write_reloadable(model, folder / RELOADED)

    return Reloadable


def write_reloadable(model: nn.Module, path: Path) -> None:
    """Writes the adapters and heads that a model carries under the names that they have in it."""
    parameters = {id(p) for p in adapter_parameters(model)}
    state = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) in parameters or ".smidgen_slots." in name or ".modules_to_save." in name
    }
    with new_file(path) as beside:
        save_file(state, beside, {"format": "pt"})
