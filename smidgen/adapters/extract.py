"""From two checkpoints to an adapter: which family holds the change, how much of it, in how many bytes.

A change that an adapter made, merged in fp32 or bf16, is recovered: the family with the fewest bytes that leaves nothing but
rounding. Of a real fine-tune every family holds a share; the file that is written is the smallest that holds enough, or none.
Weights are read layer by layer, twice: once to fit every family, once to write the numbers of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.atomic import new_files
from smidgen.adapters.checkpoint import base_groups, base_lock, packing
from smidgen.adapters.checkpoint.base_groups import Part
from smidgen.adapters.fit import fit, with_weight
from smidgen.adapters.methods import known_methods
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.tuner import bypass
from smidgen.adapters.tuner.adapted_layer import adapted_layer
from smidgen.adapters.tuner.base import rest_of
from smidgen.adapters.tuner.building import make_slot, members_of
from smidgen.adapters.tuner.canary import head_sketches
from smidgen.adapters.tuner.carried import WRAP
from smidgen.adapters.tuner.config import SmidgenConfig, config
from smidgen.adapters.tuner.kinds import Kind, kind_of
from smidgen.adapters.tuner.slot import Members
from smidgen.errors import ConfigError, SmidgenError

logger = logging.getLogger("smidgen")

Weights = Mapping[str, Tensor]
LEAST = 0.5  # of the squared change, below which a file is called useless
RECOVERED = (
    5e-5  # relative error of a change that counts as recovered, besides rounding: fp32 singular vectors leave 2e-5
)
# The sizes of a family that are tried: option -> values; a family that is not here is tried as it is.
SIZES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "svfit": ("r", (16, 64, "full")),
    "loldu": ("r", (16, 64, "full")),
    "lora": ("r", (1, 4, 16, 64)),
    "oft": ("block_size", (4, 16, 64)),
    "oft_out": ("block_size", (4, 16, 64)),
    "tlora": ("residual_rank", (2,)),
    "tlora_star": ("r", (1, 4)),
    "seeded": ("r", (64,)),
}


@dataclass
class Fit:
    """A family, fitted to all changed layers.

    Attributes:
        config: of the adapter; label: its name with its size.
        numbers, bytes: trained numbers, and bytes of the tensors of a file.
        explained: share of the squared change of the layers that it is on.
        recovered: whether nothing but rounding is left: the family made the change.
        worst: (layer, share explained) of the layer of which it holds least.
        rank: the rank that suffices, where a smaller one does.
    """

    config: SmidgenConfig
    label: str
    numbers: int = 0
    bytes: int = 0
    explained: float = 0.0
    recovered: bool = False
    worst: tuple[str, float] = ("", 1.0)
    rank: int | None = None


@dataclass
class Extraction:
    """What a change is, and what families hold of it.

    Attributes:
        layers: layers that changed and can carry an adapter; same: those that did not change.
        carried: share of the squared change of all weights that is in these layers.
        rounding: share of their squared change that rounding to the number format explains.
        left: what changed and no adapter carries: group -> (tensors, share of the squared change).
        new: modules of the fine-tuned model that the base has not; kept in the adapter's modules_to_save.
        fits: families, the smallest first.
        chosen: the one that was written, None for none.
        folder: where.
        score: figures measured on inputs, by name.
    """

    layers: list[str]
    same: int
    carried: float
    rounding: float
    left: dict[str, tuple[int, float]]
    new: list[str]
    fits: list[Fit] = field(default_factory=list)
    chosen: Fit | None = None
    folder: Path | None = None
    score: dict[str, float] = field(default_factory=dict)


def extract(
    base: Weights | nn.Module,
    finetuned: Weights | nn.Module,
    out: Path | None = None,
    *,
    model: nn.Module | None = None,
    methods: Sequence[str] = (),
    least: float = LEAST,
    seed: int = 0,
    base_name: str | None = None,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    progress: Callable[[int, int], None] = lambda at, of: None,
) -> Extraction:
    """Fits families of adapters to the difference of two checkpoints and writes the best as an adapter folder.

    Args:
        base, finetuned: modules, or their tensors by name, which may be read when they are asked for.
        out: the folder; None only looks.
        model: whose layers the tensors are, on any device; told by names and shapes without it.
        methods: families, ``"lora"`` with the sizes of ``SIZES``, ``"lora:16"`` with one; all by default, but dora.
        least: share of the squared change that a file must hold to be written, unless a family made the change.
        seed: of the adapter, which fixes the directions of ``seeded`` and the start of rings.
        base_name, task_type: for the adapter's config; labels, problem_type: a classifier's, as in :class:`SmidgenConfig`.
        progress: called with (layers done, layers).

    Returns:
        What was found; ``chosen`` is None where no family holds enough or no layer changed, and then nothing is written.

    Raises:
        SmidgenError: the two have no layers in common.

    Example:
        >>> import smidgen, copy
        >>> tuned = nn.Sequential(nn.Linear(16, 16))
        >>> before = copy.deepcopy(tuned)
        >>> with torch.no_grad():
        ...     _ = tuned[0].weight.add_(torch.randn(16, 1) @ torch.randn(1, 16))
        >>> found = extract(before, tuned, methods=["svfit", "lora"])
        >>> found.fits[0].label, found.fits[0].recovered
        ('lora r=1', True)
    """
    candidates = [candidate for method in methods or _families() for candidate in _candidates(method, seed)]
    pair = _Pair(
        _weights(base), _weights(finetuned), model or (finetuned if isinstance(finetuned, nn.Module) else None)
    )
    found = pair.survey()
    if not found.layers:
        return found
    fits = _fit_all(pair, found, candidates, progress)
    known = {f.label for f in fits}
    narrowed = {_label(own): own for f in fits if f.recovered and f.rank for own in (replace(f.config, r=f.rank),)}
    fresh = [own for label, own in narrowed.items() if label not in known]
    fits += [f for f in _fit_all(pair, found, fresh, progress) if f.recovered] if fresh else []
    found.fits = sorted(fits, key=lambda f: f.bytes)
    enough = [f for f in found.fits if f.recovered] or [f for f in found.fits if f.explained >= least]
    if enough and out is not None:
        found.chosen, found.folder = enough[0], Path(out)
        said: dict[str, Any] = {
            "labels": list(labels) if labels else None,
            "problem_type": problem_type,
            "task_type": task_type,
        }
        pair.write(found, replace(enough[0].config, base_model_name_or_path=base_name, **said), Path(out))
    elif enough:
        found.chosen = enough[0]
    return found


def _weights(given: Weights | nn.Module) -> Weights:
    if not isinstance(given, nn.Module):
        return given
    if api.names(given):
        raise SmidgenError("A model that carries adapters is no plain checkpoint: merge them first (smidgen.merge).")
    return {name: p.detach() for name, p in given.named_parameters()}


def _families() -> list[str]:
    """All methods, and members alone that no method is; without dora, whose turns need not end where they should."""
    return [m.name for m in known_methods() if not m.output or len(m.members) == 1]


def _candidates(method: str, seed: int) -> list[SmidgenConfig]:
    """The configs that a family is tried with.

    Raises:
        ConfigError: no such family, or a size that is none of its.
    """
    name, _, size = method.partition(":")
    option, sizes = SIZES.get(name, ("r", ()))
    if size:
        sizes = (int(size) if size.isdigit() else size,)
    given: list[dict[str, Any]] = [{option: value} for value in sizes] or [{}]
    return [config(name, seed=seed, store_dtype="float32", **one) for one in given]


def _label(own: SmidgenConfig) -> str:
    extra = own.transform_options.get("block_size") or own.output_options.get("block_size")
    return own.label() + (f" b={extra}" if extra else "")


class _Pair:
    """Two checkpoints, and the layers of theirs that can carry an adapter."""

    def __init__(self, base: Weights, finetuned: Weights, model: nn.Module | None) -> None:
        self.base, self.tuned = base, finetuned
        self.model = model if model is not None else skeleton({n: finetuned[n].shape for n in finetuned})
        self.layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if (kind := kind_of(layer)) is not None
            and kind.name != "experts"
            and f"{name}.weight" in base
            and f"{name}.weight" in finetuned
            and base[f"{name}.weight"].shape == finetuned[f"{name}.weight"].shape
            and bypass.bypassed(self.model, name) is None
        }
        if not self.layers:
            here, there = sorted(base)[:2], sorted(finetuned)[:2]
            raise SmidgenError(
                f"The two have no layers in common: one holds {here} and the like, the other {there}. Are they of one model?"
            )

    def survey(self) -> Extraction:
        """What changed, without any family."""
        changed, same, inside, noise, left = list[str](), 0, 0.0, 0.0, dict[str, list[float]]()
        for name in self.base:
            if name not in self.tuned:
                continue
            before, after = self.base[name], self.tuned[name]
            if not before.is_floating_point() or torch.equal(before, after):
                same += name.rpartition(".")[0] in self.layers and name.endswith(".weight")
                continue
            if before.shape != after.shape:
                left.setdefault("other shapes", []).append(0.0)
                continue
            size = float((after.double() - before.double()).square().sum())
            if name.endswith(".weight") and name.rpartition(".")[0] in self.layers:
                changed.append(name.removesuffix(".weight"))
                inside, noise = inside + size, noise + _rounding(before, after)
            else:
                left.setdefault(_group(name, before), []).append(size)
        whole = max(inside + sum(map(sum, left.values())), 1e-300)
        groups = {group: (len(sizes), sum(sizes) / whole) for group, sizes in sorted(left.items())}
        new = _new_modules(self.model, {n for n in self.tuned if n not in self.base})
        return Extraction(sorted(changed), same, inside / whole, noise / max(inside, 1e-300), groups, new)

    def matrices(self, name: str) -> tuple[nn.Module, Kind, Tensor, Tensor]:
        """(layer with the base's weight, its kind, that weight, the fine-tuned one)."""
        before, after = self.base[f"{name}.weight"], self.tuned[f"{name}.weight"]
        layer = with_weight(self.layers[name], before)
        kind = kind_of(layer)
        assert kind is not None
        return layer, kind, before, after

    def sizes(self, name: str) -> tuple[float, float]:
        """(|change|^2, |rounding|^2) of a layer."""
        before, after = self.base[f"{name}.weight"], self.tuned[f"{name}.weight"]
        return float((after.double() - before.double()).square().sum()), _rounding(before, after)

    def adapted(self, name: str, own: SmidgenConfig) -> tuple[Any, float]:
        """(layer with an adapter of a family fitted to its change, |rest|^2)."""
        layer, kind, before, after = self.matrices(name)
        adapted = adapted_layer(layer)
        adapted.add_slot("default", make_slot(own, layer, name))
        return adapted, fit(adapted, "default", kind.matrix(after.double() - before.double(), layer))

    def fitted(self, name: str, own: SmidgenConfig, change: float, rounding: float) -> tuple[float, int]:
        """(|rest|^2, the rank that suffices or 0) of a family at a layer."""
        layer, error = self.adapted(name, own)
        return error, _rank(layer, 0.25 * rounding + 1e-11 * change)

    def write(self, found: Extraction, own: SmidgenConfig, folder: Path) -> None:
        """Fits once more and writes the adapter, with lock and canary, as :func:`smidgen.save` would."""
        own = replace(own, target_modules=set(found.layers), modules_to_save=found.new or None)
        stored, sketches = {}, []
        for name in found.layers:
            adapted, _ = self.adapted(name, own)
            slot = adapted.slot("default")
            stored[name] = {n: v.detach().clone() for n, v in slot.stored().items()}
            if slot.ties is not None:
                own.ties[name] = packing.encode_ties(slot.ties)
            with torch.no_grad():
                sketches.append(base_lock.sketch(adapted.delta_matrix("default")))
        heads = {
            f"{WRAP}{name}": self.tuned[name] for name in self.tuned if name.startswith(tuple(f"{n}." for n in found.new))
        } if found.new else {}  # fmt: skip
        kept = rest_of(self._parts(), own, self.layers.keys() & set(found.layers))
        own.base_lock = base_lock.make_lock(_Matrices(self, found.layers), kept)
        own.canary = {"sketch": base_lock.encode(base_lock.pool(torch.stack(sketches)), "<f4")}
        if heads:
            own.canary["heads"] = base_lock.encode(base_lock.pool(head_sketches(heads)), "<f4")
        tensors = packing.encode(packing.pack(stored), own.store_dtype)
        with new_files(folder) as scratch:
            api._write(own.mark_current(), tensors | heads, None, scratch)

    def _parts(self) -> dict[str, Part]:
        found = {}
        for name, _ in self.model.named_parameters():
            if name in self.base:
                value = self.base[name]
                found[name] = Part(tuple(value.shape), base_groups.samples(value), value.dtype)
        return found


class _Matrices(Mapping[str, Tensor]):
    """Target -> base weight as a matrix, read when it is asked for."""

    def __init__(self, pair: _Pair, names: Sequence[str]) -> None:
        self._pair, self._names = pair, names

    def __getitem__(self, name: str) -> Tensor:
        layer, kind, before, _ = self._pair.matrices(name)
        return kind.matrix(before, layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _fit_all(
    pair: _Pair, found: Extraction, candidates: Sequence[SmidgenConfig], progress: Callable[[int, int], None]
) -> list[Fit]:
    """Every family at every changed layer, layer by layer; one that does not fit a layer's geometry is left out."""
    fits = {_label(own): Fit(own, _label(own)) for own in candidates}
    rest, ranks, size, noise = dict.fromkeys(fits, 0.0), dict.fromkeys(fits, 0), 0.0, 0.0
    for at, name in enumerate(found.layers):
        change, rounding = pair.sizes(name)
        held: dict[tuple[str | None, ...], tuple[float, int]] = {}  # what a smaller size of a family recovers here
        for label, one in list(fits.items()):
            family = tuple(one.config.members.values())
            try:
                members = members_of(one.config, pair.layers[name], name)
                error, rank = held[family] if family in held else pair.fitted(name, one.config, change, rounding)
            except ConfigError as refusal:
                logger.info("%s is left out: %s", label, refusal)
                del fits[label]
                continue
            if error <= 1.5 * rounding + RECOVERED**2 * change:
                held[family] = error, rank
            rest[label] += error
            ranks[label] = max(ranks[label], rank)
            one.numbers += members.trained()
            one.bytes += _bytes(members, one.config)
            one.worst = min(one.worst, (name, 1 - error / change), key=lambda worst: worst[1])
        size, noise = size + change, noise + rounding
        progress(at + 1, len(found.layers))
    for label, one in fits.items():
        one.explained = 1 - rest[label] / size
        one.recovered = rest[label] <= 1.5 * noise + RECOVERED**2 * size
        r = one.config.r
        one.rank = (
            ranks[label]
            if ranks[label] and isinstance(r, int | str) and (r == "full" or ranks[label] < int(r))
            else None
        )
    return list(fits.values())


def _bytes(members: Members, own: SmidgenConfig) -> int:
    """What a file holds of members at a layer."""
    pins = members.residual.pins().values() if members.residual is not None else ()
    numbers = packing.size(members.trained(), own.store_dtype)
    return numbers + sum(prod(shape) * dtype.itemsize for shape, dtype in pins)


def _rank(adapted: Any, spare: float) -> int:
    """The least rank of a residual whose directions can be cut off at the end, at a loss of ``spare`` of |delta|^2."""
    slot = adapted.slot("default")
    if (
        slot.transform is not None
        or slot.output is not None
        or not isinstance(slot.residual, LowRank | DiagonalInBasis)
    ):
        return 0
    with torch.no_grad():
        factors = slot.factors()
    sizes = factors.up.double().square().sum(0) * factors.down.double().square().sum(1)
    if factors.diagonal is not None:
        sizes = sizes * factors.diagonal.double().square()
    tails = sizes.flip(0).cumsum(0).flip(0)
    return max(1, int((tails > spare).sum()))


def _rounding(before: Tensor, after: Tensor) -> float:
    """|error|^2 expected of the difference of two weights, of the coarser of the number formats that hold them."""
    formats = {base_groups.format_of([m.flatten()[:4096]]) for m in (before, after)}
    coarsest = max(formats, key=lambda f: torch.finfo(f).eps)
    return base_groups.rounding(after.double(), coarsest)


def _group(name: str, tensor: Tensor) -> str:
    if tensor.dim() < 2:
        return "norms and biases"
    return "embeddings" if _is_embedding(name) else "other weights"


def _is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "wpe", "shared.weight", "position"))


def _new_modules(model: nn.Module, new: set[str]) -> list[str]:
    """The largest modules all of whose parameters are new."""
    own = {name for name, _ in model.named_parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and inside and not f"{name}.".startswith(tuple(f"{f}." for f in found)) and set(inside) <= new & own:
            found.append(name)
    return found


def skeleton(shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A module tree without numbers that has layers where weights of their shapes are: two axes are a linear layer, four a
    convolution of one group; embeddings are told by their names, all else is a parameter.

    Example:
        >>> skeleton({"a.b.weight": (3, 2), "a.b.bias": (3,)}).get_submodule("a.b")
        Linear(in_features=2, out_features=3, bias=True)
    """
    root = nn.Module()
    for name, shape in sorted(
        shapes.items(), key=lambda item: not item[0].endswith(".weight")
    ):  # a layer makes its bias
        *path, key = name.split(".")
        owner = root
        for step in path[:-1]:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if (
            path
            and key == "weight"
            and len(shape) in (2, 4)
            and not _is_embedding(name)
            and path[-1] not in owner._modules
        ):
            bias = f"{'.'.join(path)}.bias" in shapes
            if len(shape) == 2:
                made: nn.Module = nn.Linear(shape[1], shape[0], bias, device="meta")
            else:
                made = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=bias, device="meta")
            owner.add_module(path[-1], made)
            continue
        if path:
            if path[-1] not in owner._modules:
                owner.add_module(path[-1], nn.Module())
            owner = owner.get_submodule(path[-1])
        if key not in owner._parameters:
            owner.register_parameter(key, nn.Parameter(torch.empty(tuple(shape), device="meta"), requires_grad=False))
    return root
