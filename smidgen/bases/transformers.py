"""Bases of the transformers family: a packaged name, a folder or a hub name becomes a model with its task's head.

The head's start follows from the seed and its tensors' names alone, so every method of a comparison starts from the
same one.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.api import default_targets
from smidgen.adapters.checkpoint.files import public_name
from smidgen.adapters.methods import Kind
from smidgen.adapters.tuner.base import fingerprint
from smidgen.bases.packaged import debug
from smidgen.errors import ConfigError, DataError, did_you_mean
from smidgen.training.quiet import quiet
from smidgen.training.randomness import stream

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_STD = 0.02  # of a fresh head's matrices, where the model's config names no initializer_range
_DROPOUTS = ("dropout", "drop", "pdrop", "dropout_prob", "dropout_rate")


@dataclass(frozen=True)
class Head:
    """What a classifier's head must offer: the classes' names in order, of which one holds or several may, or one number
    for a regression."""

    labels: tuple[str, ...]
    problem_type: str = "single_label_classification"  # transformers' terms

    @property
    def options(self) -> dict[str, Any]:
        """As transformers' configs have them."""
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": self.problem_type}
        names = dict(enumerate(self.labels))
        numbers = {label: at for at, label in names.items()}
        return {"num_labels": len(names), "id2label": names, "label2id": numbers, "problem_type": self.problem_type}


@dataclass(frozen=True)
class TransformersBase:
    """A base with its head, as ``protocol.ReadingBase`` has it."""

    name: str
    model: Any
    heads: tuple[str, ...]
    kind: Kind

    def tokenizer(self) -> Any:
        return load_tokenizer(self.name)

    def targets(self) -> set[str]:
        return default_targets(self.model)

    def fingerprint(self) -> str:
        return fingerprint(self.model)


AUTO = {  # the class of transformers that reads a base for a task
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "instruction": "AutoModelForCausalLM",
}


def source(name: str) -> dict[str, Any]:
    """What ``from_pretrained`` is to read a model from: its folder, or its hub name and, after an @, the revision.

    Example:
        >>> source("me/bert@v1")
        {'pretrained_model_name_or_path': 'me/bert', 'revision': 'v1'}
    """
    where, _, revision = (name, "", "") if Path(name).expanduser().is_dir() else name.partition("@")
    return {"pretrained_model_name_or_path": locate(where), "revision": revision or "main"}


def revision_of(name: str) -> str | None:
    """The commit of a hub model on this machine; None for what is no hub model."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    found = source(name)
    if Path(found["pretrained_model_name_or_path"]).is_dir():
        return None
    with hub_errors(name):
        file = cached_file(found["pretrained_model_name_or_path"], "config.json", revision=found["revision"])
    return extract_commit_hash(file, None)  # type: ignore[no-any-return]


def locate(name: str) -> str:
    """A packaged model's name as its folder; a folder or a hub name as it is."""
    from smidgen.bases import packaged

    if name in debug.NAMES:
        return str(debug.model_folder(name))
    if name in packaged.MODELS:
        return str(packaged.model_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is no transformers folder: it has no config.json.")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"There is no model folder {name!r}.")
    return name


def locate_data(name: str | None) -> Path:
    """A packaged data set's name as its folder; a file or folder as it is. DataError when there is nothing."""
    from smidgen.bases import packaged

    if name is None:
        raise DataError(f"Which data? Give a file, a folder, or a packaged name ({', '.join(packaged.DATASETS)}).")
    if name in debug.NAMES:
        return debug.data_folder(name)
    if name in packaged.DATASETS:
        return packaged.dataset_folder(name)
    path = Path(name).expanduser()
    if not path.exists():
        near = (
            [*packaged.DATASETS, *(p.name for p in path.parent.iterdir())]
            if path.parent.is_dir()
            else packaged.DATASETS
        )
        raise DataError(
            f"There is no data at {name}.{did_you_mean(path.name, near)} Give a file, a folder, or a packaged name "
            f"({', '.join(packaged.DATASETS)})."
        )
    return path


def load_classifier(
    auto: str, name: str, head: Head, seed: int, precision: str, dropout: float | None
) -> TransformersBase:
    """The base ``name`` by the transformers class ``auto`` (AutoModelFor...), with a head for ``head``.

    A head of the right size that the folder already holds keeps its numbers; all else the folder lacks starts from
    ``seed``.
    """
    model, missing = _load(auto, name, precision, dropout, **head.options)
    heads = head_modules(model, missing)
    if not heads:
        raise ConfigError(f"{name}: no head was found in a {type(model).__name__}.")
    _start(model, missing, seed)
    for module in heads:
        model.get_submodule(module).float()  # trained in fp32 whatever the base's precision
    kind: Kind = "vision" if "Image" in auto else "decoder" if getattr(model.config, "is_decoder", False) else "encoder"
    return TransformersBase(name, model, heads, kind)


def load_language_model(name: str, precision: str, dropout: float | None) -> TransformersBase:
    """The causal language model ``name``; it needs no new head."""
    model, missing = _load("AutoModelForCausalLM", name, precision, dropout)
    if missing:
        raise ConfigError(f"{name} does not hold a whole language model: {min(missing)!r} is missing.")
    return TransformersBase(name, model, (), "decoder")


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of ``name``, with a padding token."""
    import transformers

    with hub_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"The tokenizer of {name} has no padding, end or unknown token to fill batches with.")
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str) -> Any:
    """The transformers config of ``name``."""
    import transformers

    with hub_errors(name):
        return transformers.AutoConfig.from_pretrained(**source(name))


def image_processor(name: str) -> dict[str, Any]:
    """What ``preprocessor_config.json`` of the base says of sizes, ``image_mean`` and ``image_std`` (ImageNet's if none)."""
    import transformers

    try:
        values = transformers.image_processing_utils.ImageProcessingMixin.get_image_processor_dict(**source(name))[0]
    except (OSError, ValueError):
        logger.warning("%s has no preprocessor_config.json; pixels are scaled by ImageNet's mean and deviation.", name)
        values = {}
    imagenet = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    return values | {key: values.get(key) or value for key, value in imagenet.items()}


def image_statistics(name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of pixels in 0..1 that the base's image processor names (ImageNet's if none)."""
    values = image_processor(name)
    return tuple(torch.tensor(values[key], dtype=torch.float32) for key in ("image_mean", "image_std"))  # type: ignore[return-value]


def head_modules(model: nn.Module, missing: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the modules that are not the pre-trained base: those beside it, and those its folder lacked.

    Each is the largest module that is new as a whole (``classifier``; ``bert.pooler``).
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    outside = [name for name, _ in model.named_parameters() if prefix and not name.startswith(f"{prefix}.")]
    new = {*outside, *missing} & {name for name, _ in model.named_parameters()}
    found: dict[str, None] = {}
    for name in sorted(new):
        parts = name.split(".")[:-1]
        whole = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        module = next((path for path in whole if _all_new(model, path, new)), None)
        if module is None:
            raise ConfigError(f"The folder lacks {name!r}, which is part of the base itself, not of a head.")
        found[module] = None
    return tuple(found)


def _load(auto: str, name: str, precision: str, dropout: float | None, **options: Any) -> tuple[Any, list[str]]:
    import transformers

    config = load_config(name)
    if dropout is not None:
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), not {dropout}.")
        for key in _dropouts(config):
            setattr(config, key, dropout)
    for key, value in options.items():
        setattr(config, key, value)
    with hub_errors(name), quiet():
        model, info = getattr(transformers, auto).from_pretrained(
            **source(name),
            config=config,
            dtype=DTYPES[precision],
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.name_or_path = public_name(name)  # for the adapter's config
    other = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    return model, [*info["missing_keys"], *other]


def _dropouts(config: Any) -> list[str]:
    return [
        key
        for key, value in config.to_dict().items()
        if isinstance(value, int | float | None) and not isinstance(value, bool) and key.endswith(_DROPOUTS)
    ]


def _start(model: nn.Module, names: Sequence[str], seed: int) -> None:
    """Matrices from a normal distribution, biases 0, scales of norms 1."""
    std = float(getattr(model.config, "initializer_range", None) or HEAD_STD)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters.get(name)
            if parameter is None:
                continue
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=stream(seed, "head", name)) * std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _all_new(model: nn.Module, path: str, new: set[str]) -> bool:
    return all(f"{path}.{name}" in new for name, _ in model.get_submodule(path).named_parameters())


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What the hub and damaged folders raise, as ConfigError."""
    try:
        yield
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        from smidgen.bases import packaged

        text = str(error).strip().split("\n")[0]
        hint = did_you_mean(name, packaged.MODELS)
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {text}{hint} Give a packaged name "
            f"({', '.join(packaged.MODELS)}), a transformers folder, or a hub name."
        ) from error
