"""Adapters add: a weighted sum of adapter files as one file, without the base model.

Where an update is linear in the trained numbers (``linear`` of a member: svfit, loldu, seeded, the diagonal transform) the
weighted sum of the numbers is the weighted sum of the updates, to rounding. LoRA's factors are not: their average is another
adapter, so they are put side by side, B = [w_1 s_1 B_1, w_2 s_2 B_2], A = [A_1; A_2], which is exact at the sum of the ranks.
Rotations and rings have no exact sum and are refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smidgen.adapters import api
from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.checkpoint.base_lock import Lock, encode
from smidgen.adapters.components import part_folders
from smidgen.adapters.linalg.least_squares import leading_product
from smidgen.adapters.member import Residual, build
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.adapters.tuner.building import rank_at
from smidgen.adapters.tuner.canary import read_canary
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.errors import SmidgenError, did_you_mean

logger = logging.getLogger("smidgen")

MERGES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # of peft.utils.merge_utils
Add = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


class Source(NamedTuple):
    """An adapter file as read: its config, tensors of the adapter, heads, and lock."""

    path: str
    config: SmidgenConfig
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]
    lock: Lock


def combine(
    sources: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    out: str | os.PathLike[str],
    by: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    average_heads: bool = False,
) -> Path:
    """Writes the weighted sum of adapters as one adapter: loaded, it does what the others do at these weights together.

    Args:
        sources: adapter folders of one method with the same targets, made for one base; of a pipeline, all its parts.
        weights: one for each, of any sign; the mean (1/n each) unless given.
        out: folder of the new adapter, in fp32.
        by: "sum", or one of peft's merges of updates that disagree (``MERGES``), of the trained vectors, which lie in one
            basis, or of lora's products B A, of which the leading directions are kept, as many as the ranks add up to.
        density: share of the numbers that a merge keeps of each adapter; seed: which, where it draws them (DARE).
        average_heads: heads in modules_to_save that differ are averaged by the weights (which must sum to one), not refused.

    Returns:
        The folder.

    Raises:
        SmidgenError: there is no exact sum: other members, targets, bases, seeds, ranks or options, pivots of another
            factorisation, clamped singular values, rotations and rings, heads that differ. Nothing is written.

    Example:
        >>> import smidgen, tempfile
        >>> folders = [tempfile.mkdtemp() for _ in range(3)]
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = smidgen.adapt(base, "svfit", r=4, target_modules=["0"])
        >>> read = [read_source(smidgen.save(model, folder)) for folder in folders[:2]]
        >>> smidgen.load(model, combine(folders[:2], [0.3, 0.7], out=folders[2]), "both") is model
        True
    """
    shares = _weights(weights, len(sources))
    merge = None if by == "sum" else _merge(by, density, seed)
    parts = [part_folders(Path(source)) for source in sources]
    for path, other in zip(sources, parts, strict=True):
        if other.keys() != parts[0].keys():
            odd = min(other.keys() ^ parts[0].keys()) or "denoiser"
            raise SmidgenError(
                f"{sources[0]} and {path} are on different parts of a pipeline: one has none of the {odd}."
            )
    content = {
        where: _combined([read_source(own[where]) for own in parts], shares, merge, average_heads) for where in parts[0]
    }
    api.write_parts(Path(out), content, part_folders(Path(out)).keys() - content.keys())
    return Path(out)


def _combined(
    read: Sequence[Source], shares: Sequence[float], merge: Add | None, average_heads: bool
) -> tuple[SmidgenConfig, dict[str, Tensor], None]:
    """What the files of a part hold."""
    first = read[0]
    for other in read[1:]:
        _check_alike(first, other)
    _check_linear(first.config)
    options = {name: value for name, value in first.config.residual_options.items() if name not in ("alpha", "scaling")}
    tensors = {name: value for name, value in first.tensors.items() if not value.is_floating_point()}
    config = first.config
    if config.transform or config.output:
        for name in (n for n in first.tensors if n.startswith(("transform_", "output_"))):
            tensors[name] = (merge or _sum)([source.tensors[name] for source in read], shares)
    if config.residual == LowRank.name:
        found, ranks = _side_by_side(read, shares) if merge is None else _merged_products(read, shares, merge)
        most = max(ranks.values())
        pattern = {target: r for target, r in ranks.items() if r != most}
        config = replace(config, r=most, rank_pattern=pattern, residual_options=options)
        tensors |= found
    elif config.residual:
        tensors["residual_delta"] = _scaled(read, shares, merge or _sum)
    canary = _canary(read, shares) if merge is None else None  # which adds only where updates do
    config = replace(config, store_dtype="float32", checksum=None, canary=canary)
    heads = _heads(read, shares, average_heads)
    return config.mark_current(), tensors | heads, None


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise SmidgenError(f"A combination is of at least two adapters, got {count}.")
    found = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count or not all(abs(weight) < float("inf") for weight in found):
        raise SmidgenError(f"{count} adapters take {count} finite weights, got {found}.")
    return found


def read_source(path: str | os.PathLike[str]) -> Source:
    config, tensors = api.read_adapter(path)
    if not config.base_lock:
        raise SmidgenError(
            f"{path} has no base lock, so nobody knows which layers its numbers belong to; save it anew."
        )
    packed = {name: value for name, value in tensors.items() if packing.is_packed(name)}
    for name, value in tensors.items():
        packing.check_tensor(name, value, tuple(value.shape), value.dtype, str(path))
    return Source(
        str(path),
        config,
        {name: value.float() if value.is_floating_point() else value for name, value in packed.items()},
        {name: value for name, value in tensors.items() if name not in packed},
        base_lock.read_lock(config.base_lock),
    )


def _check_alike(first: Source, other: Source) -> None:
    """Two adapters whose numbers mean the same."""
    a, b, both = first.config, other.config, f"{first.path} and {other.path}"
    if a.members != b.members:
        raise SmidgenError(f"{both} are of two methods ({a.label()}, {b.label()}): only adapters of one method add.")
    if (first.lock.targets, first.lock.shapes) != (other.lock.targets, other.lock.shapes):
        raise SmidgenError(f"{both} are on different layers ({len(first.lock.targets)} and {len(other.lock.targets)}).")
    size = float(first.lock.pooled[0].clamp(min=1e-30))
    change = float((first.lock.pooled - other.lock.pooled)[1:].square().mean().sqrt()) / size
    if not change < base_lock.SAME:
        raise SmidgenError(
            f"{both} were made for different bases (weights differ by {change:.1e}); adapters of one base add."
        )
    own = ("alpha", "scaling") if a.residual else ()
    for kind in a.members:
        mine, its = (getattr(config, f"{kind}_options") for config in (a, b))
        for name in sorted({*mine, *its} - set(own)):
            if mine.get(name) != its.get(name):
                raise SmidgenError(
                    f"{both} differ in {name} of their {kind}: {mine.get(name)!r} and {its.get(name)!r}."
                )
    if a.store_factors != b.store_factors or a.store_factors:
        raise SmidgenError(f"{both} keep factors of their own (store_factors): save them without to combine them.")
    if a.seed != b.seed and a.residual == "seeded":
        raise SmidgenError(
            f"{both} have different seeds ({a.seed} and {b.seed}), so different directions: no exact sum."
        )
    for target in () if a.residual == LowRank.name else first.lock.targets:
        if rank_at(a, target) != rank_at(b, target):
            raise SmidgenError(f"{both} differ in r at {target!r} ({rank_at(a, target)} and {rank_at(b, target)}).")
    for name, value in first.tensors.items():
        its_value = other.tensors.get(name)
        if its_value is None or (a.residual != LowRank.name and its_value.shape != value.shape):
            raise SmidgenError(f"{both} do not hold the same numbers ({name!r}).")
        if not value.is_floating_point() and not torch.equal(value.long(), its_value.long()):
            raise SmidgenError(
                f"{both} have different {name.removeprefix('residual_')}, so different factors: no exact sum."
            )


def _check_linear(config: SmidgenConfig) -> None:
    """Refuses members that have no exact sum."""
    if config.transform and not TRANSFORMS[config.transform].linear:
        raise SmidgenError(
            f"Adapters of {config.label()} do not add: the {config.transform} transform is not linear in its numbers, so no "
            "adapter of this method is their sum. Load them side by side (smidgen.set_active), or combine svfit, loldu, seeded, "
            "diagonal or lora adapters."
        )
    if config.output and (config.transform or config.residual or not OUTPUTS[config.output].linear):
        raise SmidgenError(
            f"Adapters of {config.label()} do not add: the {config.output} output transform is not linear in its numbers, or acts on "
            "what others make of the weight. Load them side by side (smidgen.set_active), or combine ia3, svfit, loldu, seeded, "
            "diagonal or lora adapters."
        )
    residual = RESIDUALS[config.residual] if config.residual else None
    if residual is not None and not residual.linear and residual is not LowRank:
        raise SmidgenError(
            f"Adapters of {config.label()} do not add: the {config.residual} residual is not linear in its numbers. Load them "
            "side by side (smidgen.set_active)."
        )
    if config.residual_options.get("nonneg"):
        raise SmidgenError("Adapters with nonneg=True do not add: each clamps its own singular values at zero.")


def _residual(source: Source, target: str, shape: tuple[int, ...]) -> Residual:
    options = dict(source.config.residual_options)
    r = rank_at(source.config, target)
    return build(
        RESIDUALS, "residual", str(source.config.residual), *shape, **options | ({} if r is None else {"r": r})
    )  # type: ignore[no-any-return]


def split(source: Source, name: str) -> list[tuple[str, Any, Tensor]]:
    """(target, its residual, its share of a packed tensor) by target, as they lie in the file."""
    found, at = [], 0
    for target, shape in sorted(zip(source.lock.targets, source.lock.shapes, strict=True)):
        residual = _residual(source, target, shape)
        shapes = residual.shapes() | {pin: shape for pin, (shape, _) in residual.pins().items()}
        own = shapes[name.removeprefix("residual_")]
        count = int(torch.Size(own).numel())
        found.append((target, residual, source.tensors[name][at : at + count].reshape(own)))
        at += count
    if at != source.tensors[name].numel():
        raise SmidgenError(
            f"{source.path}: {name!r} has {source.tensors[name].numel()} numbers, its config calls for {at}."
        )
    return found


def _scaled(read: Sequence[Source], shares: Sequence[float], add: Add) -> Tensor:
    """The sum of the diagonals, packed, in units of the first adapter's alpha."""
    asked = [[source.config.residual_options.get(name) for name in ("alpha", "scaling")] for source in read]
    if all(own == asked[0] for own in asked):
        return add([source.tensors["residual_delta"] for source in read], shares)
    summed = []
    for pieces in zip(*(split(source, "residual_delta") for source in read), strict=True):
        unit = pieces[0][1].scale
        own = [share * residual.scale / unit for share, (_, residual, _) in zip(shares, pieces, strict=True)]
        summed.append(add([delta for _, _, delta in pieces], own))
    return torch.cat(summed)


def _merge(by: str, density: float, seed: int) -> Add:
    """One of peft's merges as a weighted sum of tensors."""
    from peft.utils import merge_utils

    if by not in MERGES:
        raise SmidgenError(
            f"by is 'sum' or one of {', '.join(MERGES)}, got {by!r}.{did_you_mean(by, ['sum', *MERGES])}"
        )
    if not 0 < density <= 1:
        raise SmidgenError(f"density is a share above 0 and at most 1, got {density!r}.")
    function = getattr(merge_utils, by)

    def merged(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return function(list(tensors), torch.tensor(weights), density).float()  # type: ignore[no-any-return]

    return merged


def _merged_products(
    read: Sequence[Source], shares: Sequence[float], merge: Add
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """LoRA's products of all adapters, merged, and cut to the sum of their ranks."""
    a, b = ([split(source, f"residual_{name}") for source in read] for name in "ab")
    downs, ups, ranks = [], [], {}
    for below, above in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        products = [up @ down * member.scale for (_, _, down), (_, member, up) in zip(below, above, strict=True)]
        whole = merge(products, shares).double()
        u, s, vh = leading_product(whole, min(sum(len(down) for _, _, down in below), *whole.shape))
        downs.append((s.sqrt()[:, None] * vh).float().flatten())
        ups.append((u * s.sqrt()).float().flatten())
        ranks[below[0][0]] = len(s)
    return {"residual_a": torch.cat(downs), "residual_b": torch.cat(ups)}, ranks


def _side_by_side(read: Sequence[Source], shares: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """LoRA's factors of all adapters as those of one without alpha: (packed tensors, rank by target)."""
    a, b = ([split(source, f"residual_{name}") for source in read] for name in "ab")
    downs, ups, ranks = [], [], {}
    for below, above in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        down = torch.cat([piece for _, _, piece in below])
        up = torch.cat([w * m.scale * piece.double() for w, (_, m, piece) in zip(shares, above, strict=True)], dim=1)
        downs.append(down.flatten())
        ups.append(up.float().flatten())
        ranks[below[0][0]] = len(down)
    return {"residual_a": torch.cat(downs), "residual_b": torch.cat(ups)}, ranks


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.float()


def _canary(read: Sequence[Source], shares: Sequence[float]) -> dict[str, Any] | None:
    """Probes add as the updates do; the norm is estimated from them."""
    kept = [source.config.canary for source in read]
    if any(canary is None for canary in kept):
        return None
    probes = _sum([read_canary(canary or {}) for canary in kept], shares)[1:]
    return {"sketch": encode(torch.cat([probes.square().mean().sqrt()[None], probes]), "<f4")}


def _heads(read: Sequence[Source], shares: Sequence[float], average: bool) -> dict[str, Tensor]:
    """The heads, where they are the same; their average where that is wished."""
    first = read[0].heads
    for source in read[1:]:
        if {n: t.shape for n, t in source.heads.items()} != {n: t.shape for n, t in first.items()}:
            raise SmidgenError(
                f"{read[0].path} and {source.path} keep different heads: {sorted(first)}, {sorted(source.heads)}."
            )
    differ = [name for name in first if any(not torch.equal(source.heads[name], first[name]) for source in read)]
    if not differ:
        return first
    if not average:
        raise SmidgenError(
            f"The heads differ ({differ[0]!r}), and heads do not add: --average-heads (average_heads=True) takes their mean, by weights "
            "that sum to one."
        )
    if abs(sum(shares) - 1) > 1e-6:
        raise SmidgenError(
            f"Heads do not add, and their mean ({differ[0]!r}) takes weights that sum to one, not {list(shares)}."
        )
    logger.warning("Heads are averaged (%s): what comes out is no sum of the adapters.", ", ".join(differ))
    return {name: _sum([source.heads[name] for source in read], shares).to(first[name].dtype) for name in first}
