"""What a format is: a kind of file that another program reads, with that program's own rules of names.

A format holds one of five things of each layer: a product of two factors (``lora``), a rotation of the input (``rotation``), a factor
for each feature (``scales``), the difference of the weight (``change``), or the weight itself (``weight``). Its ``write`` is checked by ``check``, which looks into the
file as the program does that will read it: a key that this program would not look for is an error, not a log line.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from smidgen.errors import AdapterFileError, did_you_mean

HEADER = "smidgen"  # the entry in a file's header that says where it comes from
EXACT = 1e-6  # |change in the file - change of the adapter| / |change of the adapter| that a written file may have


class Lora(NamedTuple):
    """A change scale * b @ a of a layer's weight as a matrix: b [rows, r], a [r, cols]. With a magnitude [rows] it is DoRA's: the rows
    of the changed weight have these norms."""

    b: Tensor
    a: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        return len(self.a)


class Rotation(NamedTuple):
    """Cayley's skew matrices of a block-diagonal rotation of the input, their strictly lower triangles [blocks, b(b-1)/2]."""

    q: Tensor
    block: int


class Scales(NamedTuple):
    """What each feature of a layer's outputs, or of its input, is multiplied by [features]."""

    factors: Tensor
    of_input: bool


@dataclass(frozen=True)
class Place:
    """A layer that carries an adapter.

    Attributes:
        component: the pipeline's part that it is in, "" for a model alone.
        layer: its name there.
        shape: of its weight.
        kind: "linear", "conv1d" (weight [in, out]), "conv2d" or "experts".
        groups: of a convolution.
        plain: whether a convolution is undilated and pads with zeros.
    """

    component: str
    layer: str
    shape: tuple[int, ...]
    kind: str = "linear"
    groups: int = 1
    plain: bool = True

    def __str__(self) -> str:
        return f"{self.component}.{self.layer}".removeprefix(".")


Content = Mapping[Place, Any]  # what the format holds of each layer


@dataclass(frozen=True)
class Source:
    """What a file is made of, besides the layers.

    Attributes:
        components: names of the parts of the pipeline, () for a model alone.
        modules: component -> names of all its modules.
        about: what the file says of where it comes from.
        base: name of the base model, for programs that ask.
        heads: component -> name in the model -> tensor, of the heads that were trained beside the adapter.
        head_modules: component -> names of those heads.
        model: the model or pipeline itself, with the adapter on it.
    """

    components: tuple[str, ...] = ()
    modules: Mapping[str, Collection[str]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    head_modules: Mapping[str, Collection[str]] = field(default_factory=dict)
    model: Any = None

    @property
    def header(self) -> dict[str, str] | None:
        """What goes into the file's header: one entry, as the order of several is another in each process."""
        return {HEADER: json.dumps(self.about, sort_keys=True, separators=(",", ":"))} if self.about else None


class Format(ABC):
    """A kind of file.

    Class attributes:
        name: the word that asks for it.
        summary: what it is and who reads it.
        holds: "lora", "rotation", "scales", "change" or "weight".
        magnitudes: whether its LoRA may have DoRA's magnitude.
        heads: whether it holds heads too.
        task: the task type of the models that it is for (peft's word), None for any.
        file: what the one file is called ("{name}": as its folder), None for a format of several.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    holds: ClassVar[str]
    magnitudes: ClassVar[bool] = False
    heads: ClassVar[bool] = False
    task: ClassVar[str | None] = None
    file: ClassVar[str | None] = None

    def place(self, out: Path) -> Path:
        """Where ``write`` writes when ``out`` is asked for: a folder, or of a format of one file that file too."""
        if self.file is None or out.suffix == Path(self.file).suffix:
            return out
        return out / self.file.format(name=out.resolve().name)

    def refusal(self, place: Place, source: Source) -> str | None:
        """Why a layer has no place in such a file; None where it has one."""
        return None

    @abstractmethod
    def write(self, content: Content, source: Source, path: Path) -> None:
        """Writes the file ``path``, or files into the folder ``path``, which is there and empty."""

    @abstractmethod
    def check(self, content: Content, source: Source, path: Path) -> int:
        """How many layers the reader of ``path`` finds, by its own rules.

        Raises:
            AdapterFileError: it finds fewer than ``content`` has, other ones, or other numbers.
        """


def check_layers(found: Mapping[str, Any], wanted: Mapping[str, Place], where: Path, reader: str) -> int:
    """How many of the names that a reader looks for are in a file, which must be all, and no others.

    Raises:
        AdapterFileError: naming the first that is missing, or that nobody looks for.
    """
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or extra:
        there = len(wanted) - len(missing)
        first = f"{min(missing)!r} is not there" if missing else f"nobody looks for {min(extra)!r}"
        hint = did_you_mean(min(missing), extra) if missing else ""
        raise AdapterFileError(f"{where.name}: {reader} finds {there} of {len(wanted)} layers: {first}.{hint}")
    return len(wanted)


def check_pair(
    place: Place, name: str, own: Mapping[str, Tensor], wanted: Lora, where: Path, scale: float = 1.0
) -> None:
    """Holds the two factors of a layer, ``own``, against what was to be written.

    Raises:
        AdapterFileError: one is missing, the kernel has another shape, or they make another change.
    """
    a, b = both(name, own, where)
    if own["a"].shape[1:] != place.shape[1:]:
        raise AdapterFileError(f"{where.name}: {name!r} has a kernel of another shape than the layer.")
    check_change(place, Lora(b, a, scale), wanted, where)


def check_change(place: Place, found: Lora, wanted: Lora, where: Path) -> None:
    """Holds the product in a file against the one that was to be written, on fixed probes of the input.

    Raises:
        AdapterFileError: other shapes, NaN, or another change.
    """
    shapes = tuple(found.b.shape), tuple(found.a.shape)
    if shapes != (tuple(wanted.b.shape), tuple(wanted.a.shape)):
        expected = f"{tuple(wanted.b.shape)} and {tuple(wanted.a.shape)}"
        raise AdapterFileError(f"{where.name}: the factors at {place} are {shapes[0]} and {shapes[1]}, not {expected}.")
    probe = torch.randn(found.a.shape[1], 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there, here = (lora.scale * (lora.b.double() @ (lora.a.double() @ probe)) for lora in (found, wanted))
    error = float((there - here).norm())
    if not error <= EXACT * max(float(here.norm()), 1e-30):
        raise AdapterFileError(
            f"{where.name}: the change at {place} is another than the adapter's (off by {error / max(float(here.norm()), 1e-30):.1e} of it)."
        )


def check_magnitude(place: Place, found: Tensor | None, wanted: Lora, where: Path) -> None:
    """Holds the magnitude in a file against the one that was to be written, where there is one.

    Raises:
        AdapterFileError: it is missing, or another.
    """
    if wanted.magnitude is None:
        return
    if found is None or not torch.equal(found.flatten(), wanted.magnitude):
        raise AdapterFileError(f"{where.name}: the magnitude at {place} is not the adapter's.")


def sides(
    tensors: Mapping[str, Tensor], endings: Mapping[str, str], where: Path, old: re.Pattern[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA file by the layer's name and what they are there: "a", "b" or "alpha".

    Args:
        endings: how keys end -> what they are.
        old: names of attention processors in files of before 2023.

    Raises:
        AdapterFileError: a key that is no part of a plain LoRA.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = old.fullmatch(key) if old else None
        if match:
            name, side = f"{match[1]}.{match[2]}", "a" if match[3] == "down" else "b"
        else:
            ending = next((e for e in endings if key.endswith(f".{e}")), None)
            if ending is None:
                raise AdapterFileError(_no_lora(key, where))
            name, side = key.removesuffix(f".{ending}"), endings[ending]
        found.setdefault(name, {})[side] = value
    return found


def _no_lora(key: str, where: Path) -> str:
    if key.endswith(".diff"):
        return f"{where} holds whole differences and no LoRA: `smidgen extract BASE {where} --out ADAPTER` makes an adapter of them."
    kinds = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
    named = next((f" It is {kind}." for word, kind in kinds.items() if word in key), "")
    return f"{where} has the key {key!r}, which is no part of a plain LoRA.{named}"


def both(name: str, own: Mapping[str, Tensor], where: Path) -> tuple[Tensor, Tensor]:
    """(a [r, cols], b [rows, r]) of a layer of a LoRA file, as matrices.

    Raises:
        AdapterFileError: one is missing, or they do not fit each other.
    """
    if not {"a", "b"} <= own.keys():
        raise AdapterFileError(f"{where}: {name!r} has only {sorted(own)}; a LoRA has two factors.")
    if own["a"].ndim < 2 or own["b"].ndim < 2:
        raise AdapterFileError(f"{where}: {name!r} has factors of {own['a'].ndim} and {own['b'].ndim} axes.")
    return own["a"].float().flatten(1), own["b"].float().flatten(1)


def at_one_alpha(content: Content) -> tuple[float, dict[Place, Lora]]:
    """The commonest rank as the alpha of all layers, and the layers with a scale of alpha / rank in their readers' hands."""
    alpha = Counter(lora.r for lora in content.values()).most_common(1)[0][0]
    return float(alpha), {p: lora._replace(scale=lora.scale * lora.r / alpha) for p, lora in content.items()}


def as_weights(lora: Lora, place: Place) -> tuple[Tensor, Tensor]:
    """(a, b) as the weights of two layers: of a convolution [r, in, kh, kw] and [rows, r, 1, 1]; the scale is in b."""
    a, b = lora.a, lora.b * lora.scale if lora.scale != 1 else lora.b
    if place.kind == "conv2d":
        a, b = a.reshape(len(a), -1, *place.shape[2:]), b.reshape(*b.shape, 1, 1)
    return a.contiguous(), b.contiguous()
