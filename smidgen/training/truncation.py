"""An adapter's change as low-rank factors, with what that loses: transforms for tools that read LoRA and nothing else.

The change of a layer, C = W (T - I) + D, times its strength, is cut to U U^T C: U [rows, r] are the leading left singular
vectors of C, or of C X^T where rows X of the layer's inputs are given (Eckart and Young 1936, in the norm of the
activations). U is nested, so one decomposition serves every rank, and at full rank nothing is lost.

How much weight is lost says little of how much of the adapter is lost (docs/export.md), so what decides is the whole
model on inputs that nothing was fitted to: |f_cut - f_adapted| / |f_adapted - f_base|, 0 the adapter, 1 as far off as none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.adapters import export, passes
from smidgen.adapters.checkpoint.formats import Lora
from smidgen.adapters.components import parts
from smidgen.adapters.linalg.svd import truncated_svd
from smidgen.adapters.member import Factors
from smidgen.adapters.tuner.adapted_layer import AdaptedExperts, AdaptedLayer
from smidgen.adapters.tuner.kinds import Conv2dKind
from smidgen.errors import ConfigError, SmidgenError

Run = Callable[[], Any]  # makes forward passes over its own rows and returns their outputs
Layers = dict[
    str, AdaptedLayer
]  # by target name, in a pipeline's other components after the component's name and a slash

AUTO_LOSS = 0.05  # of the rank "auto"
MOST_RANK = 256  # that "auto" and max_error look at
_INPUT_NUMBERS = 2**27  # kept of all layers' inputs, 512 MB
_LEAST_ROWS, _MOST_ROWS = 256, 4096  # of a layer's inputs
_PLAIN_SHARE = 0.01  # of the plain norm beside that of the activations, so that directions no row showed are not free


# ---- one layer -------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The change of a layer in nested directions: ``up`` [rows, k] orthonormal, ``down`` [k, cols] = up^T change."""

    change: Tensor
    up: Tensor
    down: Tensor
    inputs: Tensor | None = None  # [n, cols], what ``up`` was fitted to

    def factors(self, rank: int) -> Factors:
        """The first ``rank`` directions as fp32 factors of like size, so that 16 bits hold both."""
        up, down = self.up[:, :rank], self.down[:rank]
        size = down.norm(dim=1).clamp(min=1e-30).sqrt()
        return Factors((up * size).float().contiguous(), None, (down / size[:, None]).float().contiguous())

    def errors(self) -> Tensor:
        """Relative error [k] at ranks 1 to k: of the activations over ``inputs``, of the weight where there are none."""
        shown = self.change if self.inputs is None else self.change @ self.inputs.mT.double()
        own = self.down if self.inputs is None else self.down @ self.inputs.mT.double()
        total = shown.square().sum()
        return (1 - own.square().sum(1).cumsum(0) / total.clamp(min=1e-300)).clamp(min=0).sqrt() * (total > 0)


def cut(change: Tensor, most: int, inputs: Tensor | None = None) -> Cut:
    """The leading directions of a change [rows, cols], at most ``most``; of its activations over ``inputs`` [n, cols] if given.

    Example:
        >>> change = torch.randn(6, 9)
        >>> found = cut(change, 6).factors(6)
        >>> torch.allclose(found.dense(), change, atol=1e-5)
        True
    """
    change = change.detach().double()
    tall = change.shape[0] > change.shape[1]
    within, seen = (
        torch.linalg.qr(change) if tall else (None, change)
    )  # where all directions are, so that all give all back
    if inputs is not None:
        x = inputs.to(change)
        plain = (_PLAIN_SHARE * x.square().mean() * len(x)).sqrt()
        seen = torch.cat([seen @ x.mT, plain * seen], dim=1)
    up = torch.linalg.qr(truncated_svd(seen, min(most, len(seen)))[0].double())[0]
    up = up if within is None else within @ up
    return Cut(change, up, up.mT @ change, inputs)


@dataclass(frozen=True)
class LayerLoss:
    """What a layer loses: |C - BA| / |C|, and the same of the activations (None where no held-out row reached it)."""

    rank: int
    weight: float
    activation: float | None


def layer_loss(change: Tensor, found: Factors, inputs: Tensor | None) -> LayerLoss:
    """Measured on the factors as they are; ``inputs`` [n, cols] are rows of the layer that nothing was fitted to."""
    change, rest = change.double(), change.double() - found.up.double() @ found.down.double()
    activation = None if inputs is None else _relative(rest @ inputs.mT.double(), change @ inputs.mT.double())
    return LayerLoss(len(found.down), _relative(rest, change), activation)


def _relative(a: Tensor, b: Tensor) -> float:
    size = float(b.norm())
    return float(a.norm()) / size if size else 0.0


# ---- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What an export loses.

    Attributes:
        layers: by target name.
        end_to_end: |f_export - f_adapted| / |f_adapted - f_base| over ``judged_on``; f_base keeps a trained head.
        interval: where it lies on other inputs of the kind, as far as these tell, at 95 %.
        judged_on: words for the held-out inputs.
        weighted_by: words for the calibration rows, "" where none were used.
    """

    layers: Mapping[str, LayerLoss]
    end_to_end: float
    interval: tuple[float, float]
    judged_on: str
    weighted_by: str = ""

    @property
    def ranks(self) -> dict[str, int]:
        return {name: loss.rank for name, loss in self.layers.items()}

    def _figures(self) -> dict[str, tuple[float, float, str]]:
        """kind of error -> (worst, median, name of the worst layer)"""
        found = {}
        for kind in ("weight", "activation"):
            own = {name: value for name, loss in self.layers.items() if (value := getattr(loss, kind)) is not None}
            if own:
                worst = max(own, key=own.__getitem__)
                found[kind] = own[worst], median(own.values()), worst
        return found

    def facts(self) -> dict[str, Any]:
        """What a file is to say of it: ``about`` of :func:`smidgen.adapters.export.export`."""
        told: dict[str, Any] = {"end_to_end": self.end_to_end, "judged_on": self.judged_on}
        told |= {"interval": list(self.interval)} if math.isfinite(self.interval[1]) else {}
        told |= {"weighted_by": self.weighted_by} if self.weighted_by else {}
        for kind, (worst, middle, name) in self._figures().items():
            told[f"{kind}_error"] = {"worst": worst, "worst_layer": name, "median": middle}
        ranks = sorted(set(self.ranks.values()))
        return {"loss": told | {"rank": ranks[0] if len(ranks) == 1 else [ranks[0], ranks[-1]]}}

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        weighted = f", weighted by {self.weighted_by}" if self.weighted_by else ""
        lines = [f"{len(self.layers)} layers cut to rank {rank}{weighted}"]
        for kind, (worst, middle, name) in self._figures().items():
            lines.append(f"  {kind} error".ljust(20) + f"median {middle:.3f}, worst {worst:.3f} ({name})")
        low, high = self.interval
        told = f"{self.end_to_end:.3f} of the adapter's effect ({low:.3f} to {high:.3f}), on {self.judged_on}"
        lines.append("  end to end".ljust(20) + told)
        return "\n".join(lines)


class Truncated(NamedTuple):
    """Factors by the layers' names, and what they lose. It is what :func:`smidgen.adapters.export.export` asks as ``approximate``."""

    factors: dict[str, Factors]
    loss: Loss
    layers: Layers

    def __call__(self, layer: Any, adapter_name: str) -> Lora:
        found = next(self.factors[name] for name, own in self.layers.items() if own is layer)
        return Lora(found.up, found.down)


def truncate(
    model: Any,
    held_out: Run,
    adapter_name: str = "default",
    *,
    rank: int | str | None = None,
    max_error: float | None = None,
    max_loss: float | None = None,
    calibration: Run | None = None,
    search: Run | None = None,
    groups: int | None = None,
    allow_loss: bool = False,
    judged_on: str = "held-out inputs",
    weighted_by: str = "calibration rows",
) -> Truncated:
    """An adapter of any method as the best low-rank factors of one rank, or of each layer's own.

    Args:
        model: a module or diffusers pipeline that carries the adapter, active and unmerged. It is left as it was.
        held_out: runs the model on rows that neither training nor calibration saw, and returns its outputs.
        adapter_name: which adapter; its present strength is in the factors.
        rank: of every layer, at most its narrow side; "auto" (also where neither rank nor max_error is given) is the least
            whose end-to-end loss is at most ``max_loss``.
        max_error: instead of a rank, each layer's relative error of the weight, of the activations where there is a calibration.
        max_loss: of "auto", 0.05 unless given.
        calibration: runs the model on other rows, whose activations weigh what is kept.
        search: runs it on a few such rows, by which "auto" looks for the rank that ``held_out`` then judges; all by default.
        groups: so many sources (prompts) take turns in the rows of ``held_out``; the interval counts each once. Every row by default.
        allow_loss: make it whatever it loses.
        judged_on, weighted_by: words for the two kinds of rows.

    Raises:
        ConfigError: settings without meaning.
        SmidgenError: an end-to-end loss above 0.15, or no rank that keeps below ``max_loss``; fused experts and grouped
            convolutions, a merged adapter, one without effect.

    Example:
        >>> import smidgen
        >>> model = smidgen.adapt(nn.Sequential(nn.Linear(8, 8)), "oft", block_size=4, target_modules=["0"])
        >>> _ = nn.init.normal_(next(p for p in model.parameters() if p.requires_grad), std=0.1)
        >>> rows = torch.randn(16, 8)
        >>> truncate(model, lambda: model(rows), rank=8).loss.end_to_end < 1e-5
        True
    """
    _check(rank, max_error, max_loss)
    most = rank if isinstance(rank, int) else MOST_RANK
    options: dict[str, Any] = {
        "most": most,
        "calibration": calibration,
        "search": search,
        "groups": groups,
        "judged_on": judged_on,
        "weighted_by": weighted_by,
    }
    own = Truncation(model, held_out, adapter_name, **options)
    if isinstance(rank, int):
        ranks = dict.fromkeys(own.cuts, rank)
    elif max_error is not None:
        ranks = {name: _rank_within(found, max_error, name) for name, found in own.cuts.items()}
    else:
        ranks = dict.fromkeys(own.cuts, own.least_rank(AUTO_LOSS if max_loss is None else max_loss))
    found = own.at(ranks)
    if found.loss.end_to_end > export.MOST_LOST and not allow_loss:
        raise SmidgenError(
            f"At rank {max(ranks.values())} the export does {found.loss.end_to_end:.0%} of the adapter's effect otherwise, more "
            f"than the {export.MOST_LOST:.0%} that pass unasked. Give a higher rank, or rank auto; weigh by a calibration; export as "
            "merged or full-diff, which lose nothing; or allow the loss (--allow-loss)."
        )
    return found


class Truncation:
    """An adapter's layers in nested directions, and the passes to judge any choice of ranks by; as :func:`truncate`."""

    def __init__(
        self,
        model: Any,
        held_out: Run,
        adapter_name: str = "default",
        *,
        most: int = MOST_RANK,
        calibration: Run | None = None,
        search: Run | None = None,
        groups: int | None = None,
        judged_on: str = "held-out inputs",
        weighted_by: str = "calibration rows",
    ) -> None:
        self.judged_on, self.weighted_by = judged_on, weighted_by if calibration else ""
        self.layers, self._modules = _layers(model, adapter_name), list(parts(model).values())
        with passes.at_rest(self._modules):
            inputs = {} if calibration is None else layer_inputs(self.layers, calibration)
            self._judge = _Judge(held_out, self.layers, adapter_name, groups)
            self._few = self._judge if search is None else _Judge(search, self.layers, adapter_name)
            self._rows = layer_inputs(self.layers, self._few.run)
        if not min(float(judge.effects.sum()) for judge in (self._judge, self._few)) > 0:
            raise SmidgenError("The adapter changes nothing of what the model answers: there is nothing to export.")
        self.cuts: dict[str, Cut] = {}
        for name, layer in self.layers.items():
            change = layer.delta_matrix(adapter_name, strength=layer.scaling[adapter_name])
            self.cuts[name] = cut(change.detach().cpu(), most, inputs.get(name))

    def factors(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Factors of these ranks; a layer gives at most as many as it has."""
        return {name: own.factors(ranks[name]) for name, own in self.cuts.items()}

    def _loss(self, judge: _Judge, ranks: Mapping[str, int]) -> tuple[float, tuple[float, float]]:
        """|f_cut - f_adapted| / |f_adapted - f_base| and its interval."""
        chosen = tuple(ranks[name] for name in self.cuts)
        if chosen not in judge.known:
            with passes.at_rest(self._modules), standing_in(self.layers, self.factors(ranks)):
                judge.known[chosen] = ratio(judge.gaps(passes.numbers(judge.run())), judge.effects)
        return judge.known[chosen]

    def at(self, ranks: Mapping[str, int]) -> Truncated:
        """The factors of these ranks, and what they lose."""
        found = self.factors(ranks)
        layers = {n: layer_loss(self.cuts[n].change, own, self._rows.get(n)) for n, own in found.items()}
        return Truncated(
            found, Loss(layers, *self._loss(self._judge, ranks), self.judged_on, self.weighted_by), self.layers
        )

    def least_rank(self, bound: float) -> int:
        """The least rank of all layers whose end-to-end loss is at most ``bound``: by bisection on the rows to search by, then
        as much higher as the held-out rows want it."""

        def at(rank: int, judge: _Judge) -> float:
            return self._loss(judge, dict.fromkeys(self.cuts, rank))[0]

        def refuse(best: float) -> SmidgenError:
            return SmidgenError(
                f"No rank up to {most} keeps the end-to-end loss at {bound:g} (there it is {best:.3f}): allow a larger "
                "max_loss, or export as merged or full-diff, which lose nothing."
            )

        most = max(len(own.down) for own in self.cuts.values())
        low, high = 0, most
        if (best := at(most, self._few)) > bound:
            raise refuse(best)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle, self._few) <= bound else (middle, high)
        while (best := at(high, self._judge)) > bound:
            if high == most:
                raise refuse(best)
            high = min(most, high + max(1, high // 16))
        return high


class _Judge:
    """Rows to judge by: the adapted model's answers to them, and the squared effect of the adapter on each row or group."""

    def __init__(self, run: Run, layers: Layers, adapter_name: str, groups: int | None = None) -> None:
        self.run, self.adapted, self.groups = run, passes.numbers(run()), groups
        self.known: dict[tuple[int, ...], tuple[float, tuple[float, float]]] = {}  # losses by the layers' ranks
        with passes.silent(layers.values(), adapter_name):
            self.effects = self.gaps(passes.numbers(run()))

    def gaps(self, answers: list[Tensor]) -> Tensor:
        """Squared differences from the adapted model's answers [rows, or groups]."""
        rows = passes.row_gaps(answers, self.adapted)
        return rows if self.groups is None or len(rows) % self.groups else rows.reshape(-1, self.groups).sum(0)


def ratio(errors: Tensor, effects: Tensor) -> tuple[float, tuple[float, float]]:
    """|error| / |effect| over all rows, of their squared lengths [rows] in each, and where it lies on other rows of the kind, at
    95 %: the ratio of two sums (Cochran, Sampling Techniques, 1977, 6.4), with its error on the scale of its logarithm.

    Example:
        >>> ratio(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0, 4.0]))
        (0.5, (0.5, 0.5))
    """
    total, rows = float(errors.sum()), len(errors)
    if total == 0:
        return 0.0, (0.0, 0.0)
    share = total / float(effects.sum())
    if rows < 2 or not math.isfinite(total):
        return share**0.5, (0.0, math.inf)
    spread = float((errors - share * effects).square().sum()) * rows / (rows - 1)
    off = math.exp(1.96 * 0.5 * spread**0.5 / total)  # half the relative error of the square
    return share**0.5, (share**0.5 / off, share**0.5 * off)


def _check(rank: int | str | None, max_error: float | None, max_loss: float | None) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank not in (None, "auto") and not whole:
        raise ConfigError(f"rank is a whole number of at least 1, or auto; got {rank!r}.")
    if max_error is not None and rank is not None:
        raise ConfigError("rank and max_error both choose the ranks; give one of them.")
    if max_loss is not None and (whole or max_error is not None):
        raise ConfigError("max_loss chooses the rank auto; leave it out beside a rank or max_error.")
    for name, value in (("max_error", max_error), ("max_loss", max_loss)):
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name} is a share between 0 and 1, got {value}.")


def inexact(model: Any, adapter_name: str = "default") -> Layers:
    """The adapted layers whose change is no product of the adapter's own factors."""
    return {
        str(place): layer
        for place, layer in export.layers(model, adapter_name).items()
        if isinstance(layer, AdaptedLayer) and export.exact(layer, adapter_name) is None
    }


def _layers(model: Any, adapter_name: str) -> Layers:
    found = inexact(model, adapter_name)
    if not found:
        raise SmidgenError(
            f"Every change that adapter {adapter_name!r} makes is of low rank by its own factors, which are exported as they are: "
            "there is nothing to cut."
        )
    for name, layer in found.items():
        if isinstance(layer, AdaptedExperts) or layer.slot(adapter_name).groups > 1:
            raise SmidgenError(
                f"{name!r} is a {'stack of fused experts' if isinstance(layer, AdaptedExperts) else 'convolution in groups'}, "
                "whose change is no one matrix that a LoRA could hold: export it as merged or full-diff."
            )
        if layer.merged:
            raise SmidgenError(
                f"The adapter is merged at {name!r}: unmerge it first (unmerge_adapter), or load it anew."
            )
    return found


def _rank_within(own: Cut, bound: float, name: str) -> int:
    errors = own.errors()
    within = (errors <= bound).nonzero()
    if not len(within):
        raise SmidgenError(
            f"No rank up to {len(errors)} keeps the error at {name!r} below {bound:g} (there it is {float(errors[-1]):.3f}): "
            "allow a larger max_error, give a rank, or export as merged or full-diff."
        )
    return int(within[0]) + 1


# ---- passes ----------------------------------------------------------------------------------------------------------


@contextmanager
def standing_in(layers: Layers, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Within, each layer is its base layer and its factors, whatever its adapters."""

    def instead(layer: AdaptedLayer, own: Factors) -> Callable[..., Tensor]:
        device = next(layer.parameters()).device
        own = Factors(own.up.to(device), None, own.down.to(device))

        def forward(x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            x = kwargs.pop("input") if x is None else x
            y = layer.base_layer(x, *args, **kwargs)
            return layer.kind.add_output_shift(y, own, x, layer.base_layer)

        return forward

    try:
        for name, layer in layers.items():
            layer.forward = instead(layer, factors[name])  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


class _Sample:
    """Rows [n, cols] drawn evenly from all that come, at most ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.random = most, torch.Generator().manual_seed(0)
        self.rows: list[Tensor] = []  # one tensor, once there is any
        self.keys = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.random)
        kept = keys.topk(min(self.most, len(rows)), largest=False).indices
        every = torch.cat([self.keys, keys[kept]])
        best = every.topk(min(self.most, len(every)), largest=False).indices
        own = rows[kept.to(rows.device)].detach().float().cpu()
        self.rows = [torch.cat([*self.rows, own])[best]]
        self.keys = every[best]


def layer_inputs(layers: Layers, run: Run) -> dict[str, Tensor]:
    """Rows [n, cols] of what each layer is given while ``run`` runs; of a convolution, the patches under its kernel."""
    cols = {name: layer.base_matrix().shape[-1] for name, layer in layers.items()}
    most = min(_MOST_ROWS, max(_LEAST_ROWS, _INPUT_NUMBERS // sum(cols.values())))
    found = {name: _Sample(most) for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Any = args[0] if args else kwargs.get("x", kwargs.get("input"))
            for rows in _rows(layer, x):
                found[name].add(rows)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        run()
    return {name: sample.rows[0] for name, sample in found.items() if sample.rows}


def _rows(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """A layer's input as rows [n, cols] that its weight as a matrix is multiplied with; an image at a time."""
    if not isinstance(layer.kind, Conv2dKind):
        yield x.reshape(-1, x.shape[-1])
        return
    base = layer.get_base_layer()
    padding: Any = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), 0
    for image in x if x.dim() == 4 else x[None]:
        yield F.unfold(image[None].float(), base.kernel_size, base.dilation, padding, base.stride)[0].mT
