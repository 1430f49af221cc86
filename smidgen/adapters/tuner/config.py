"""The adapter's config: what ``adapter_config.json`` holds and what :func:`smidgen.config` builds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor

from smidgen import errors
from smidgen.adapters import methods
from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint import checksum as checksums
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.checkpoint.base_lock import read_lock
from smidgen.adapters.checkpoint.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_values,
    is_recipe,
    read_config,
    read_tensors,
)
from smidgen.adapters.checkpoint.formats.peft import own_options, own_tensors
from smidgen.adapters.tuner import patterns

PEFT_TYPE_NAME = "SMIDGEN"
_CURRENT = "_current"
_SEAL = "_tensors_sum"


@dataclass
class SmidgenConfig(PeftConfig):
    """Config of one adapter, an ordinary :class:`peft.PeftConfig`.

    Args:
        method: name of the members together, for people; ``transform``, ``residual`` and ``output`` decide.
        transform, residual, output: names of the members; at least one.
        r: rank of the residual (a whole number, "full" or, for spectral, "energy:0.99").
        transform_options, residual_options, output_options: the members' own options.
        rank_pattern: r by target module (a name or the end of one), as in peft's LoRA.
        seed: seed of the start values; they depend on nothing else than it and the target's name.
        target_modules: names or ends of names, one regular expression, or "all-linear".
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in peft's LoRA.
        store_factors: keep the frozen factors in the file, which then needs no matching base weights to rebuild them.
        store_dtype: number format of the numbers in the file, "float32", "float16" (half the bytes), "int8" or "int4" (a quarter
            and an eighth, heads and stored factors in halves); trained in fp32 whatever it is.
        labels, problem_type: of a classifier's head in modules_to_save: the classes' names in order, and what kind of answer
            it gives in transformers' terms, so that a fresh base can be given the head that the adapter trained.
        ties: by target, what its base weight does not determine of the factors (equal or zero singular values), written at
            save; see ``linalg/ties.py``.
        base_lock: sketch of the base weights, written at save; see ``checkpoint/base_lock.py``.
        canary: fingerprint of the adapter's effect, written at save; re-checked by :func:`smidgen.verify`.
        checksum: SHA-256 of the tensors and options, written at save; see ``checkpoint/checksum.py``. A config that was
            read holds that of the tensors until they are there.
    """

    method: str | None = None
    transform: str | None = None
    residual: str | None = None
    output: str | None = None
    r: int | str | None = None
    transform_options: dict[str, Any] = field(default_factory=dict)
    residual_options: dict[str, Any] = field(default_factory=dict)
    output_options: dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    store_factors: bool = False
    store_dtype: str = "float32"
    labels: list[str] | None = None
    problem_type: str | None = None
    ties: dict[str, str] = field(default_factory=dict)
    base_lock: dict[str, Any] | None = None
    canary: dict[str, Any] | None = None
    checksum: dict[str, str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        self.from_file = self.peft_type is not None
        try:
            check_values([vars(self)])
        except (ValueError, RecursionError) as error:
            raise errors.ConfigError(f"An option has a value that none can have: {error}.") from error
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if hasattr(self.r, "__index__") and not isinstance(self.r, bool):
            self.r = int(self.r)  # type: ignore[arg-type]  # numpy has whole numbers that are no int
        self._check_forms()
        if self.target_modules is None and self.base_lock:  # as a file of ours says it, see text()
            self.target_modules = set(read_lock(self.base_lock).targets)
        if not any(self.members.values()):
            raise errors.ConfigError(
                "An adapter needs a transform, a residual or an output transform; the config names none."
            )
        for kind, name in self.members.items():
            options = getattr(self, f"{kind}_options")
            known = methods.member_options(kind, name) if name else {}
            for option in options:
                if option not in known:
                    raise errors.ConfigError(
                        f"{kind} {name!r} has no option {option!r}.{errors.did_you_mean(option, known)}"
                        f" Known: {', '.join(known) or 'none'}."
                    )
        if self.bias != "none":
            raise errors.ConfigError(
                f"bias must be 'none', got {self.bias!r}; list a module in modules_to_save instead."
            )
        self._check_options()

    @property
    def members(self) -> dict[str, str | None]:
        """Side -> member, None where there is none."""
        return {side: getattr(self, side) for side in methods.SIDES}

    def _check_forms(self) -> None:
        for name, (fits, form) in _FORMS.items():
            if not fits(getattr(self, name)):
                raise errors.ConfigError(f"{name} must be {form}, got {errors.shown(getattr(self, name))}.")
        patterns.check_names("modules_to_save", self.modules_to_save or ())
        patterns.check_names("rank_pattern", self.rank_pattern)
        for name in () if self.from_file else ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else ():
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise errors.ConfigError(f"{name}: {pattern!r} is no regular expression ({error}).") from error

    def _check_options(self) -> None:
        """Holds the options against the checksum of a file, which then is that of the tensors alone."""
        if self.checksum is None:
            return
        wanted = self.checksum.get("options")
        if wanted is not None and wanted != self._options_sum():
            raise errors.AdapterFileError(
                "adapter_config.json is not as it was saved (the SHA-256 of its options differs): it was damaged or changed. "
                f'Copy it again from its source; if you changed an option on purpose, take "{checksums.KEY}" out of it.'
            )
        self.checksum = {"tensors": self.checksum["tensors"]}

    def _options_sum(self) -> str:
        return checksums.of_options(self.to_dict(), _defaults(type(self)))

    def mark_current(self) -> SmidgenConfig:
        """Says that this config was saved, or read with a checksum, as files are now; see :attr:`old`."""
        self.__dict__[_CURRENT] = True
        return self

    @property
    def old(self) -> bool:
        """Whether this is the config of a file from before there were checksums."""
        return bool(self.base_lock) and self.checksum is None and _CURRENT not in self.__dict__

    def seal(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers the checksum of the tensors that this config is about to be saved with."""
        self.__dict__[_SEAL] = checksums.of_tensors(tensors)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes ``adapter_config.json`` without white space and without the fields that have their default value.

        peft's own form costs a kilobyte for nothing; what is left out comes back as its default at load.
        """
        by_host = "auto_mapping_dict" not in kwargs  # transformers finds the base of its checkpoints by this path
        replace_file(Path(save_directory) / CONFIG_NAME, self.text(kwargs.get("auto_mapping_dict"), by_host))
        self.__dict__.pop(_SEAL, None)  # tensors trained further are others

    def text(self, auto_mapping: dict[str, Any] | None = None, with_path: bool = False) -> str:
        """What ``adapter_config.json`` holds; the folder that the base lies in on this machine only ``with_path``."""
        data = self.to_dict() | ({} if auto_mapping is None else {"auto_mapping": auto_mapping})
        base = data["base_model_name_or_path"] or ""
        if os.path.isabs(base) and not with_path:  # where it lay on this machine is nobody else's business
            data["base_model_name_or_path"] = os.path.basename(os.path.normpath(base))
        targets = data["target_modules"]
        if self.base_lock and isinstance(targets, set) and targets == set(read_lock(self.base_lock).targets):
            data["target_modules"] = None  # the base lock names them already, in fewer bytes
        tensors = self.__dict__.get(_SEAL) or (self.checksum or {}).get("tensors")
        data[checksums.KEY] = {"options": self._options_sum(), "tensors": tensors} if tensors else None
        defaults = _defaults(type(self))
        kept = {n: value for n, value in data.items() if n == "peft_type" or value != defaults.get(n, MISSING)}
        return json.dumps(kept, separators=(",", ":"), sort_keys=True, default=sorted)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As peft reads a config; of a folder on this machine both files are read before, as :func:`smidgen.load` does.

        Through peft this is where a file is first asked whose it is: no model has been touched yet.

        Raises:
            AdapterFileError: a missing, truncated or hostile file, or one that was not saved with this config.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if os.path.lexists(folder / CONFIG_NAME):
            own = read_smidgen_config(folder)
            if os.path.lexists(folder / WEIGHTS_NAME):
                checked(own, packing.plain_keys(read_tensors(folder)), folder)
        return super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)

    def label(self) -> str:
        """Short text for tables, e.g. ``"svfit r=64"``."""
        parts = [self.method or "+".join(filter(None, self.members.values()))]
        parts += [f"R_T={self.transform_options['rank']}"] if "rank" in self.transform_options else []
        parts += [f"r={self.r}"] if self.r is not None else []
        return " ".join(parts)


def read_adapter(path: str | os.PathLike[str]) -> tuple[SmidgenConfig, dict[str, Tensor]]:
    """(config, tensors) of an adapter folder, whichever library wrote it, or of a recipe: the one reader of ``load`` and ``verify``.

    Raises:
        AdapterFileError: a missing, truncated or hostile file, another kind of adapter, or files of two saves.
    """
    if is_recipe(path):  # made by a generator, of which nothing below the generators knows
        return import_module("smidgen.difflora.use.recipes").adapter_of(path)  # type: ignore[no-any-return]
    own, tensors = read_smidgen_config(path), packing.plain_keys(read_tensors(path))
    if read_config(path).get("peft_type") != PEFT_TYPE_NAME:
        tensors = own_tensors(tensors, Path(path))
    return own, checked(own, tensors, path)


def read_smidgen_config(path: str | os.PathLike[str]) -> SmidgenConfig:
    """The config of an adapter folder.

    Raises:
        AdapterFileError: no folder, no config, or another kind of adapter.
    """
    if is_recipe(path):
        return read_adapter(path)[0]
    data = read_config(path)
    kind = data.get("peft_type")
    if kind != PEFT_TYPE_NAME and (told := own_options(Path(path))):
        data, kind = told, told.get("peft_type")
    if kind != PEFT_TYPE_NAME:
        raise errors.AdapterFileError(
            f"{path} holds a peft adapter of type {errors.shown(kind)}, not one of smidgen's; smidgen.load puts it into a model."
        )
    known = set(SmidgenConfig.__dataclass_fields__)
    unknown = sorted(set(data) - known)
    if unknown:
        hint = errors.did_you_mean(unknown[0], known)
        raise errors.AdapterFileError(f"{path}: adapter_config.json has unknown keys {errors.shown(unknown)}.{hint}")
    try:
        return SmidgenConfig(**{k: v for k, v in data.items() if k != "auto_mapping"})
    except (errors.ConfigError, errors.AdapterFileError) as error:
        raise errors.AdapterFileError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise errors.AdapterFileError(f"{path}: adapter_config.json is damaged ({error}).") from error


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of ours, in our form or, a plain LoRA, in peft's too.

    Raises:
        AdapterFileError: no folder, no config, or damage.
    """
    return (
        is_recipe(path) or read_config(path).get("peft_type") == PEFT_TYPE_NAME or own_options(Path(path)) is not None
    )


def checked(own: SmidgenConfig, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The numbers in the tensors of a file, which are held against the checksum and the ranks of its config.

    Raises:
        AdapterFileError: they were not saved together, or are no numbers of its format.
    """
    if own.checksum:
        checksums.check_tensors(own.checksum["tensors"], tensors, str(path))
    numbers = packing.decode(tensors, own.store_dtype, str(path))
    check_ranks({"r": own.r, "rank_pattern": own.rank_pattern, **own.transform_options}, numbers, path)
    return numbers


_RANKS_OF = ("r", "rank", "rank_pattern", "init_r", "target_r", "n_frequency", "num_virtual_tokens")


def check_ranks(options: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """A rank is at most the number of numbers in the file, whatever the method: seen before anything is made of it.

    Raises:
        AdapterFileError: naming the option.
    """
    most = max(4096, sum(tensor.numel() for tensor in tensors.values()))
    for name in _RANKS_OF:
        value = options.get(name)
        for rank in value.values() if isinstance(value, dict) else [value]:
            if isinstance(rank, int | float) and not rank <= most:
                raise errors.AdapterFileError(
                    f"{path}: {name} is {errors.shown(rank)}, more than the file holds numbers; restore adapter_config.json."
                )


def _defaults(kind: type[SmidgenConfig]) -> dict[str, Any]:
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind)}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all(value: Any, kinds: type | tuple[type, ...], fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, kinds) and all(fits(v) for v in value)  # type: ignore[attr-defined]


def _text(value: Any) -> bool:
    return isinstance(value, str)


_LISTS = (list, tuple, set)
_NAME = (lambda v: v is None or _text(v), "a name")
_NAMES = (lambda v: v is None or _text(v) or _all(v, _LISTS, _text), "a list of names or one regular expression")
_OPTIONS = (lambda v: _all(v, dict, _text), "options by name")
_RECORD = (lambda v: v is None or isinstance(v, dict), "what smidgen.save wrote")
_RANKS = (lambda v: _all(v, dict, _text) and all(_whole(r) or _text(r) for r in v.values()), "ranks by module name")
_TEXT_OR_NONE = (lambda v: v is None or _text(v), "a text")
# field -> (whether a value fits, what would): a config file is anybody's JSON.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": _NAME,
    "transform": _NAME,
    "residual": _NAME,
    "output": _NAME,
    "r": (lambda v: v is None or _whole(v) or _text(v), "a whole number, 'full' or 'energy:SHARE'"),
    "transform_options": _OPTIONS,
    "residual_options": _OPTIONS,
    "output_options": _OPTIONS,
    "rank_pattern": _RANKS,
    "seed": (_whole, "a whole number"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": (lambda v: v is None or _all(v, _LISTS, _text), "a list of names"),
    "layers_to_transform": (lambda v: v is None or _whole(v) or _all(v, _LISTS, _whole), "layer numbers"),
    "store_factors": (lambda v: isinstance(v, bool), "true or false"),
    "store_dtype": (lambda v: v in packing.STORED, f"one of {', '.join(packing.STORED)}"),
    "labels": (lambda v: v is None or _all(v, list, _text), "a list of names"),
    "problem_type": _TEXT_OR_NONE,
    "task_type": _TEXT_OR_NONE,
    "revision": _TEXT_OR_NONE,
    "peft_version": _TEXT_OR_NONE,
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str | os.PathLike), "a name or a path"),
    "inference_mode": (lambda v: isinstance(v, bool), "true or false"),
    "auto_mapping": (lambda v: v is None or isinstance(v, dict), "names by name"),
    "ties": (lambda v: _all(v, dict, _text) and all(map(_text, v.values())), "what smidgen.save wrote"),
    "base_lock": _RECORD,
    "canary": _RECORD,
    "checksum": (
        lambda v: v is None or (_all(v, dict, _text) and "tensors" in v and _all(v.values(), object, _text)),
        "what smidgen.save wrote",
    ),
}


class _PeftTypeName(str):
    """A str that also answers ``.value`` and ``.name`` as the members of peft's own enum do."""

    value = property(lambda self: str(self))
    name = property(lambda self: str(self))


PEFT_TYPE = _PeftTypeName(PEFT_TYPE_NAME)

_FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "store_factors",
    "store_dtype",
    "seed",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "labels",
    "problem_type",
)


def config(method: str | None = None, **options: Any) -> SmidgenConfig:
    """Config of an adapter: a method by name, or any transform, residual and output transform together.

    Args:
        method: ``tlora``, ``tlora_star``, ``svfit``, ``loldu``, ``lora``, ``seeded``, ``oft``, ``dora``, ``ia3``, ``oft_out`` (see
            ``smidgen methods``), the papers' notation such as ``"tlora(2,6)"``, members such as ``"rotation+spectral"`` or
            ``"low_rank+magnitude"``, or None when ``transform``, ``residual`` or ``output`` are named.
        **options: ``r`` (residual rank; also ``residual_rank``), ``transform_rank``, ``alpha``, ``transform``,
            ``residual``, ``output``, ``init``, ``store_factors``, ``target_modules`` and the other fields of
            :class:`SmidgenConfig`, and the members' own options (``atoms``, ``std``, ``blocks``, ...).

    Returns:
        A :class:`peft.PeftConfig` for ``peft.get_peft_model``, ``model.add_adapter`` or :func:`smidgen.adapt`.

    Raises:
        ConfigError: unknown names (with the nearest ones) or values.

    Example:
        >>> config("svfit", r=64, target_modules=["q_proj", "v_proj"]).residual
        'spectral'
        >>> config(transform="rotation", residual="spectral", r=16).label()
        'rotation+spectral r=16'
    """
    fields: dict[str, Any] = {name: options.pop(name) for name in _FIELDS if name in options}
    if method is None:
        pair, merged = None, dict(options)
        members = {side: merged.pop(side, None) for side in methods.SIDES}
        if not any(members.values()):
            raise errors.ConfigError(
                f"Give a method ({', '.join(methods.METHODS)}), or name a transform, a residual or an output transform."
            )
    else:
        pair, spelled = methods.parse_method(method)
        members = {side: options.pop(side, getattr(pair, side)) for side in methods.SIDES}
        fields = {name: value for name, value in pair.defaults.items() if name in _FIELDS} | fields
        merged = _relevant(pair.defaults, members) | spelled | options
        _one_rank(merged, spelled | options)
    own = methods.split_options(members, merged)
    r = own["residual"].pop("r", None)
    # Members are the same however they were spelled; only a row of METHODS gives them a name.
    there = {side: name for side, name in members.items() if name}
    named = pair is not None and pair.name in methods.METHODS and there == pair.members
    return SmidgenConfig(
        method=pair.name if pair and named else None,
        r=r,
        **members,  # type: ignore[arg-type]
        transform_options=own["transform"],
        residual_options=own["residual"],
        output_options=own["output"],
        **fields,
    )


def _relevant(defaults: Mapping[str, Any], members: Mapping[str, str | None]) -> dict[str, Any]:
    """Defaults of a method that still mean something after one of its members was replaced."""
    kept = {}
    for option, value in defaults.items():
        try:
            methods.split_options(members, {option: value})
        except errors.ConfigError:
            continue
        kept[option] = value
    return kept


def _one_rank(merged: dict[str, Any], given: Mapping[str, Any]) -> None:
    """``r`` and ``residual_rank`` are two names of one option: what the caller gave wins over a default."""
    for name, other in (("r", "residual_rank"), ("residual_rank", "r")):
        if name in given and other not in given:
            merged.pop(other, None)
