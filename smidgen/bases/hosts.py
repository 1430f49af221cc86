"""peft's and transformers' own ways in, for a folder of ours: ``AutoPeftModelFor*``, ``AutoModelFor*`` and ``pipeline()``.

Each of them reads the base's name in ``adapter_config.json`` and loads it as it stands: packaged bases and local folders they do
not find, and a fresh head has two classes called LABEL_0 and LABEL_1. Here they get the base that the folder means, with the
head that the adapter trained; whatever is no adapter of a text or image model's goes to their own code, unchanged.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_OURS = "of_smidgen"  # marks what is taught already
_AUTO = ("AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModelForCausalLM")


def follow() -> None:
    """Teaches those of them that were imported; idempotent. ``import smidgen`` has it called when one of them is."""
    # what is still being imported lacks its classes, and is followed once more at its end
    if (kind := getattr(sys.modules.get("peft.auto"), "_BaseAutoPeftModel", None)) is not None:
        _wrap_method(kind, _auto_peft)
    for name in _AUTO:  # each has a copy of the method
        if (kind := getattr(sys.modules.get("transformers.models.auto.modeling_auto"), name, None)) is not None:
            _wrap_method(kind, _auto_model)
    made = getattr(sys.modules.get("transformers.pipelines"), "pipeline", None)
    if made is not None and not hasattr(made, _OURS):
        wrapped = _marked(_pipeline(made), made)
        for module in ("transformers.pipelines", "transformers"):
            if vars(sys.modules[module]).get("pipeline") is made:
                sys.modules[module].pipeline = wrapped  # type: ignore[attr-defined]


def _wrap_method(kind: Any, wrap: Callable[[Any], Any]) -> None:
    method = kind.from_pretrained.__func__
    if not hasattr(method, _OURS):
        kind.from_pretrained = classmethod(_marked(wrap(method), method))


def _marked(call: Any, method: Any) -> Any:
    functools.update_wrapper(call, method)
    setattr(call, _OURS, True)
    return call


def _origin(path: Any, options: Mapping[str, Any]) -> Any:
    """Where an adapter of a text or image model comes from, here or on the hub; None for any other path."""
    from transformers.utils.peft_utils import find_adapter_config_file

    from smidgen.bases.origin import read_origin
    from smidgen.bases.transformers import AUTO
    from smidgen.errors import SmidgenError

    if not isinstance(path, str | Path):
        return None
    asked = {name: options[name] for name in ("revision", "token", "cache_dir") if options.get(name) is not None}
    try:
        found = find_adapter_config_file(str(path), **asked)
        origin = None if found is None else read_origin(Path(found).parent)
    except (OSError, ValueError, SmidgenError):
        return None  # the host says what it thinks of it
    return origin if origin is not None and origin.task in AUTO and origin.base else None


def _dressed(load: Callable[..., Any], origin: Any, config: Any = None, **options: Any) -> Any:
    """The base of ``origin`` by ``load`` (``from_pretrained``), with a head for its classes."""
    from smidgen.bases.transformers import source

    head = origin.head.options if origin.head is not None else {}
    where = source(origin.base)
    options.pop("revision", None)  # the adapter's own
    if config is None:
        return load(where.pop("pretrained_model_name_or_path"), **where, **head, **options)
    config = copy.deepcopy(config)
    for name, value in head.items():
        setattr(config, name, value)
    return load(where.pop("pretrained_model_name_or_path"), config=config, **where, **options)


def _auto_peft(method: Any) -> Any:
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        import transformers

        from smidgen.bases.origin import TASK_TYPES
        from smidgen.bases.transformers import AUTO

        path = pretrained_model_name_or_path
        options = {"adapter_name": adapter_name, "is_trainable": is_trainable, "config": config, "revision": revision}
        origin = _origin(path, {**kwargs, "revision": revision})
        auto: Any = getattr(transformers, AUTO[origin.task]) if origin else None
        if origin is None or cls._target_class is not (auto if origin.task in TASK_TYPES else None):
            return method(cls, path, **options, **kwargs)
        kwargs.pop("import_allowlist", None)
        base = _dressed(auto.from_pretrained, origin, **kwargs)
        return cls._target_peft_class.from_pretrained(base, path, **options, **kwargs)

    return from_pretrained


def _auto_model(method: Any) -> Any:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        path, origin = pretrained_model_name_or_path, _origin(pretrained_model_name_or_path, kwargs)
        if origin is None or args or kwargs.get("output_loading_info"):
            return method(cls, path, *args, **kwargs)
        name = kwargs.pop("adapter_name", "default")
        kwargs.pop("adapter_kwargs", None)
        model = _dressed(functools.partial(method, cls), origin, **kwargs)
        model.load_adapter(str(path), name)
        return model

    return from_pretrained


def _pipeline(method: Any) -> Any:
    def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        import transformers

        from smidgen.bases.origin import adapted_tokenizer
        from smidgen.bases.transformers import AUTO, source

        origin = _origin(model, kwargs) if not args else None
        if origin is None:
            return method(task, model, *args, **kwargs)
        how = {name: kwargs.pop(name) for name in ("dtype", "device_map") if name in kwargs}
        model = getattr(transformers, AUTO[origin.task]).from_pretrained(
            model, **how, **(kwargs.pop("model_kwargs", None) or {})
        )
        if origin.task == "image-classification":
            where = source(origin.base)
            reader = {"image_processor": transformers.AutoImageProcessor.from_pretrained(**where)}
        else:
            reader = {"tokenizer": adapted_tokenizer(origin)}
        names = {"instruction": "text-generation"}
        return method(task or names.get(origin.task, origin.task), model, **{**reader, **kwargs})

    return pipeline
