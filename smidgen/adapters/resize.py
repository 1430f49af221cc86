"""Another rank for an adapter file, without the base model: what is cut off is told, what is added does nothing yet.

A lora adapter keeps the leading singular directions of each update (Eckart and Young, 1936). An svfit or loldu one keeps the
first entries of its diagonals, whose directions come in a fixed order; larger, an svfit one gets zeros.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smidgen.adapters import api
from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.combine import Source, read_source, split
from smidgen.adapters.components import part_folders
from smidgen.adapters.linalg.least_squares import leading_product
from smidgen.adapters.linalg.svd import energy_rank
from smidgen.adapters.member import stable_noise
from smidgen.adapters.residuals.diagonal_in_basis import DiagonalInBasis
from smidgen.adapters.residuals.low_rank import LowRank
from smidgen.adapters.residuals.spectral import Spectral
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.numbers import Numbers, rounded
from smidgen.errors import ConfigError, SmidgenError

_Layer = dict[str, Tensor]


@dataclass(frozen=True)
class Resized:
    """What became of an adapter: ranks by layer before and after, and |cut off| / |update| of the whole and of the layer that
    lost most; of diagonals in units of the trained numbers."""

    folder: Path
    before: dict[str, int]
    after: dict[str, int]
    error: float
    worst: tuple[str, float]

    def __str__(self) -> str:
        def ranks(found: dict[str, int]) -> str:
            low, high = min(found.values()), max(found.values())
            return str(low) if low == high else f"{low} to {high}"

        lost = f"{self.error:.2%} of the update is lost (most at {self.worst[0]!r}, {self.worst[1]:.2%})"
        return f"{self.folder}: rank {ranks(self.before)} -> {ranks(self.after)}; {lost if self.error else 'nothing is lost'}."


def resize(
    adapter: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """Writes an adapter with another rank.

    Args:
        adapter: folder of a lora, svfit or loldu adapter; of a pipeline, all its parts.
        out: folder of the new one.
        rank: of every layer, as far as the layer has one.
        energy: instead, the least rank of each layer that holds this share of its squared update.

    Raises:
        SmidgenError: another method, a factor that has no shorter form without the base, or neither or both of ``rank`` and
            ``energy``. Nothing is written.

    Example:
        >>> import smidgen, tempfile
        >>> small, large = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> model = smidgen.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora", r=2, target_modules=["0"])
        >>> resize(smidgen.save(model, small), out=large, rank=4).after
        {'0': 4}
    """
    if (rank is None) == (energy is None):
        raise ConfigError("Give either a rank or an energy, such as rank=4 or energy=0.99.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is a share above 0 and at most 1, got {energy!r}.")
    content, layers = {}, dict[str, _Became]()
    for where, folder in part_folders(Path(adapter)).items():
        source = read_source(folder)
        _check(source)
        content[where], own = _resized(source, rank, energy)
        layers |= {f"{where}.{name}" if where else name: became for name, became in own.items()}
    api.write_parts(Path(out), content, part_folders(Path(out)).keys() - content.keys())
    whole = sum(one.size**2 for one in layers.values()) ** 0.5 or 1.0
    error = sum(one.lost**2 for one in layers.values()) ** 0.5 / whole
    name, worst = max(((name, one.lost / (one.size or 1.0)) for name, one in layers.items()), key=lambda own: own[1])
    before, after = ({n: getattr(one, side) for n, one in layers.items()} for side in ("before", "after"))
    return Resized(Path(out), before, after, error, (name, worst))


class _Became(NamedTuple):
    """Ranks of a layer before and after, |cut off| and |update|."""

    before: int
    after: int
    lost: float
    size: float


def _resized(
    source: Source, rank: int | None, energy: float | None
) -> tuple[tuple[SmidgenConfig, dict[str, Tensor], None], dict[str, _Became]]:
    """What the files of a part hold, and what became of its layers."""
    lora = source.config.residual == LowRank.name
    layers, before = _layers(source)
    found, became = dict[str, _Layer](), dict[str, _Became]()
    for name, (member, own) in layers.items():
        found[name], lost, size = (_lora if lora else _diagonal)(name, source, member, own, rank, energy)
        became[name] = _Became(before[name], len(found[name]["a" if lora else "delta"]), lost, size)
    return _content(source, found, became, lora), became


def _check(source: Source) -> None:
    own = source.config
    if (
        own.transform
        or own.output
        or own.residual not in (LowRank.name, *(kind.name for kind in DiagonalInBasis.__subclasses__()))
    ):
        raise SmidgenError(
            f"{source.path} is {own.label()}, whose numbers have no rank to change; lora, svfit and loldu adapters have one."
        )
    if own.store_factors:
        raise SmidgenError(f"{source.path} keeps factors of its own (store_factors): save it without to resize it.")
    if own.ties:
        raise SmidgenError(
            f"{source.path} is on weights that do not determine their singular directions, which only the base can order anew "
            f"({len(own.ties)} layers with ties): load it, and extract it from the merged model instead."
        )


def _layers(source: Source) -> tuple[dict[str, tuple[Any, _Layer]], dict[str, int]]:
    names = [name for name in source.tensors if name.startswith("residual_")]
    found: dict[str, tuple[Any, _Layer]] = {}
    for name in names:
        for target, member, piece in split(source, name):
            found.setdefault(target, (member, {}))[1][name.removeprefix("residual_")] = piece
    return found, {target: member.r for target, (member, _) in found.items()}


def _lora(
    name: str, source: Source, member: Any, own: _Layer, rank: int | None, energy: float | None
) -> tuple[_Layer, float, float]:
    """(factors without alpha, |cut off|, |update|)."""
    b, a = own["b"].double() * member.scale, own["a"].double()
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = leading_product(left.R @ right.R.mT, min(len(a), *left.R.shape, *right.R.shape))
    wanted = rank or (energy_rank(s, energy or 1.0) if float(s.sum()) else 1)
    kept = min(wanted, int((s > 1e-12 * s.max()).sum()) or 1)
    half = s[:kept].sqrt()
    down = half[:, None] * (vh[:kept] @ right.Q.mT)
    up = left.Q @ u[:, :kept] * half
    if wanted > kept:  # directions that start where a fresh adapter's do
        fresh = stable_noise(
            f"{source.config.seed}/{name}/residual/a", (wanted - kept, member.cols), (3 * member.cols) ** -0.5
        )
        down, up = torch.cat([down, fresh.double()]), torch.cat([up, up.new_zeros(len(up), wanted - kept)], 1)
    return {"a": down.float(), "b": up.float()}, float(s[kept:].norm()) if wanted <= kept else 0.0, float(s.norm())


def _diagonal(
    name: str, source: Source, member: Any, own: _Layer, rank: int | None, energy: float | None
) -> tuple[_Layer, float, float]:
    delta = own["delta"].double() * member.scale
    if energy is not None:
        share = delta.square().flip(0).cumsum(0).flip(0) / delta.square().sum().clamp(
            min=1e-300
        )  # what is cut from i on
        wanted = max(1, int((share > 1 - energy + 1e-12).sum()))
    else:
        wanted = min(rank or 1, member.rows, member.cols)
    if wanted > len(delta) and not isinstance(member, Spectral):
        raise SmidgenError(
            f"{source.path} cannot grow beyond rank {len(delta)} at {name!r} without its base, which knows the next pivots."
        )
    kept = delta[:wanted]
    found = {"delta": torch.cat([kept, delta.new_zeros(wanted - len(kept))]).float()}
    found |= {pin: own[pin][:wanted] for pin in own if pin != "delta"}
    return found, float(delta[wanted:].norm()), float(delta.norm())


def _content(
    source: Source, found: dict[str, _Layer], became: dict[str, _Became], lora: bool
) -> tuple[SmidgenConfig, dict[str, Tensor], None]:
    own, after = source.config, {name: one.after for name, one in became.items()}
    changed = any(one.lost for one in became.values())
    options = {n: v for n, v in own.residual_options.items() if n not in ("alpha", "scaling")}
    most = max(after.values())
    pattern = {name: r for name, r in after.items() if r != most}
    canary = own.canary
    stored = {name: {f"residual_{n}": v for n, v in own_.items()} for name, own_ in found.items()}
    kept = rounded(Numbers(stored, source.heads), own.store_dtype, source.path)
    if lora:
        deltas = [base_lock.sketch(own_["residual_b"] @ own_["residual_a"]) for _, own_ in sorted(kept.stored.items())]
        canary = {**(own.canary or {}), "sketch": base_lock.encode(base_lock.pool(torch.stack(deltas)), "<f4")}
    elif changed or own.store_dtype in packing.CODES:  # other neighbours are rounded together
        canary = None  # of what the base alone could tell
    own = replace(own, r=most, rank_pattern=pattern, residual_options=options, checksum=None, canary=canary)
    tensors = packing.encode(packing.pack(kept.stored), own.store_dtype)
    return own.mark_current(), tensors | kept.heads, None
