"""Where a finished adapter comes from: its task, its base and the classes of its head, as its own folder says it.

Two files always travel, and ``adapter_config.json`` names base, revision, task type and classes. ``report.json`` beside it says
how a training read its data; ``recipe.json`` is what a prediction leaves. ``config.yaml`` never leaves the machine: it alone says
in which folder a base lay that has no public name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from smidgen.adapters.checkpoint.files import as_folder, check_file, parse_config, public_name, read_config
from smidgen.adapters.checkpoint.formats.peft import own_options
from smidgen.adapters.tuner.config import PEFT_TYPE_NAME
from smidgen.bases import packaged
from smidgen.bases.embedded import EMBEDDED, FOLDERS
from smidgen.bases.families import load_base
from smidgen.bases.packaged import debug
from smidgen.bases.pipelines import default_device
from smidgen.bases.transformers import AUTO, Head, load_classifier, load_language_model, load_tokenizer
from smidgen.errors import AdapterFileError, ConfigError
from smidgen.training import engine

TASK_TYPES = {"text-classification": "SEQ_CLS", "instruction": "CAUSAL_LM"}  # peft's names of what it knows
IMAGES = "text-to-image"  # the task of every adapter that draws
TEMPLATE = "chat_template.jinja"  # beside an adapter whose conversations another template than the tokenizer's wrote
_TOLD = ("report.json", "recipe.json")


@dataclass(frozen=True)
class Origin:
    """What an adapter's folder says of where it comes from.

    ``task`` is a recipe's name or ``IMAGES``; ``base`` a name or a folder, "" when the folder does not say; ``method`` is what
    ``--method`` calls it, "" for what is no adapter (a trained head, a whole model); ``base_config`` is that of a base in one file;
    ``settings`` are those of the training by their dotted names, as far as they are known.
    """

    folder: Path
    task: str
    base: str
    method: str = ""
    head: Head | None = None
    base_config: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def named(self, base: str | None = None) -> str:
        """The base's name, or another one that was given.

        Raises:
            ConfigError: the folder does not say.
        """
        if not (base or self.base):
            raise ConfigError(f"{self.folder} does not say which base it is for; name it with --base.")
        return base or self.base

    def setting(self, name: str, default: Any) -> Any:
        """A setting of its training, if it is of the type of ``default``: the file may be anybody's."""
        value = self.settings.get(name)
        return value if type(value) is type(default) else default


def read_origin(path: str | Path) -> Origin:
    """What an adapter's folder says of where it comes from. Nothing is loaded.

    Raises:
        AdapterFileError: it is no adapter's folder, a file in it is damaged, or it is of a text model and names no task.
    """
    folder = as_folder(path)
    config = {} if (folder / engine.CONTROL).is_file() else read_config(folder)
    told: dict[str, Any] = {}
    for file in (folder / name for name in _TOLD if (folder / name).is_file()):
        check_file(file)
        told = parse_config(file.read_bytes(), str(file))
        break
    task, labels = told.get("kind"), told.get("labels") or config.get("labels")
    if task not in AUTO:
        known = {kind: task for task, kind in TASK_TYPES.items()}
        task = known.get(str(config.get("task_type")), "image-classification" if labels else IMAGES)
    problem = told.get("problem") or config.get("problem_type")
    head = None
    if task in AUTO and task != "instruction":
        try:
            head = Head(tuple(map(str, labels or ())), *([str(problem)] if problem else []))
        except TypeError as error:
            raise AdapterFileError(f"{folder}: its labels are damaged ({labels!r}).") from error
        if not head.labels and problem != "regression":
            raise AdapterFileError(
                f"{folder} does not say which classes it sorts into; it was saved without its labels."
            )
    method, run = _method(folder, config), _run(folder)
    if task == IMAGES:
        config = {"base_model_name_or_path": _drawn_by(folder, config, told)}
    settings, base_config = told.get("settings"), run.get("base_config")
    return Origin(
        folder,
        task,
        _base(folder, config, told, run),
        method,
        head,
        base_config if isinstance(base_config, str) else None,
        settings if isinstance(settings, dict) else {},
    )


def load_own_base(origin: Origin, base: str | None = None, base_config: str | None = None) -> Any:
    """The base that an adapter is for, without the adapter: an ImageBase, or a TransformersBase, of a classifier with a head
    for its classes, which the adapter fills; ``base`` instead of its own.

    Raises:
        ConfigError: the folder does not say which, or it cannot be loaded.
    """
    name = origin.named(base)
    if origin.task == IMAGES:
        return load_base(name, device=default_device(), config=base_config if base else origin.base_config)
    if origin.head is None:
        return load_language_model(name, "no", None)
    return load_classifier(AUTO[origin.task], name, origin.head, 0, "no", None)


def load_adapted(origin: Origin, base: str | None = None) -> Any:
    """:func:`load_own_base` with the adapter on it, at rest.

    Raises:
        SmidgenError: as :func:`load_own_base`; or the base is another one than the adapter was trained on.
    """
    found = load_own_base(origin, base)
    engine.load(getattr(found, "pipe", found.model), origin.folder)
    if origin.task == "text-classification":
        found.model.config.pad_token_id = load_tokenizer(origin.named(base)).pad_token_id
    if origin.task != IMAGES:
        found.model.to(default_device()).eval().requires_grad_(False)
    return found


def adapted_tokenizer(origin: Origin, base: str | None = None) -> Any:
    """The base's tokenizer as the adapter was trained with it: with its chat template, and cut where its texts were."""
    tokenizer = load_tokenizer(origin.named(base))
    template = origin.folder / TEMPLATE
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if origin.head is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, origin.setting("data.max_length", 128))
    return tokenizer


def _method(folder: Path, config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type") or "")
    if kind and kind != PEFT_TYPE_NAME:
        own = own_options(folder)  # a plain LoRA of ours in peft's form, as predicted ones are
        if own is None:
            return f"peft:{kind.lower()}"
        config = own
    members = (config.get("transform"), config.get("residual"), config.get("output"))
    return str(config.get("method") or "+".join(str(member) for member in members if member))


def _base(folder: Path, config: Mapping[str, Any], told: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The base's name with its revision; where it lay, if it has no public name and lies there still."""
    given = told.get("base") or config.get("base_model_name_or_path") or ""
    if not isinstance(given, str):
        raise AdapterFileError(f"{folder}: the name of its base is damaged ({given!r}).")
    local = run.get("model") or run.get("base")
    if isinstance(local, str) and public_name(local) == given and Path(local).expanduser().exists():
        return local
    revision = config.get("revision")
    return f"{given}@{revision}" if isinstance(revision, str) and "/" in given and not Path(given).is_dir() else given


def _drawn_by(folder: Path, config: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The base of an adapter that names no task, and so draws, as far as its config can say: ``embedded``, unless it names another
    one. What peft and diffusers write there is where the denoiser lay.

    Raises:
        AdapterFileError: the config names a model of transformers.
    """
    named = str(config.get("base_model_name_or_path") or "")
    name = named.partition("@")[0]
    if told.get("base") or not named or Path(name).is_absolute():
        return EMBEDDED
    if name in packaged.MODELS or name in debug.NAMES or _of_transformers(Path(name)):
        raise AdapterFileError(
            f"{folder} is for {named!r} and does not say for which task: its adapter_config.json has no task_type, and no report.json "
            f"lies beside it. Save it again from a config with one, such as smidgen.config(..., task_type={TASK_TYPES['instruction']!r})."
        )
    return named if name in FOLDERS else ""


def _of_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers; a denoiser's config says ``_class_name``."""
    file = folder / "config.json"
    return file.is_file() and "model_type" in parse_config(file.read_bytes(), str(file))


def _run(folder: Path) -> dict[str, Any]:
    """What ``config.yaml`` says, nothing where there is none."""
    file = folder / "config.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
