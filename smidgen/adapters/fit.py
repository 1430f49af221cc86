"""One adapter at one layer, fitted to a change of its weight: each member by its own least squares (``Member.fit``).

A transform and a residual take turns, each fitted to what the other leaves; on a change that the pair made the rest falls
by a constant factor a turn, to rounding. So it does for a ring alone, which is fitted core by core. Behind an output transform they
are fitted to S^-1 W', and S to what they make of W.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from smidgen.adapters.linalg.least_squares import levenberg
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.slot import Slot
from smidgen.errors import ConfigError

TURNS = 40
_EXACT, _SETTLED = 1e-9, 3e-3  # relative rest, and relative gain of a turn, that end the turns
_LEAST = 1e-6  # of a factor in front of a row, which the others are divided by
_SMALL = 2**18  # numbers of a Jacobian that may be held to end what alternates slowly


@torch.no_grad()
def fit(layer: AdaptedLayer, adapter_name: str, change: Tensor) -> float:
    """Sets the trained numbers of an adapter so that its delta is nearest to ``change`` [rows, cols].

    Returns:
        |change - delta|^2 in float64, of the numbers as the adapter keeps them (fp32).

    Raises:
        ConfigError: a member that cannot be fitted, or an output transform beside others that is no diagonal.
    """
    slot = layer.slot(adapter_name)
    if slot.output is not None and not slot.output.diagonal and len(list(slot.members())) > 1:
        raise ConfigError(f"A {slot.output.name!r} output transform has a fit alone, not beside other members.")
    found = _Turns(layer, slot, change.double()).run()
    for name, value in found.items():
        slot.get_parameter(name).copy_(value)
    return float((change.double() - layer.delta_matrix(adapter_name).double()).square().sum())


class _Turns:
    """The members of a slot in float64, and what each contributes to what is inside the output transform."""

    def __init__(self, layer: AdaptedLayer, slot: Slot, change: Tensor) -> None:
        self.layer, self.kind, self.base, self.slot = layer, layer.kind, layer.get_base_layer(), slot
        self.change = change
        self.weight = layer.base_matrix().detach().double()
        self.trained = _wide(slot.starts())
        self.frozen = {prefix: _wide(slot.tensors(prefix, {})) for prefix, _ in slot.members()}
        self.parts = dict.fromkeys((p for p in self.frozen if p != "output"), torch.zeros((), dtype=torch.float64))

    def run(self) -> dict[str, Tensor]:
        history: list[float] = []
        size = float(self.change.norm())
        again = len(self.frozen) > 1 or any(member.alternating for _, member in self.slot.members())
        while not _ended(history, size, again):
            for prefix in self.parts:
                rest = self._inside() - sum(part for other, part in self.parts.items() if other != prefix)
                found = self._transform(rest) if prefix == "transform" else self._residual(rest)
                trained = self.trained | {f"{prefix}_{name}": value for name, value in found.items()}
                part = self._delta(trained, prefix)
                if bool((rest - part).norm() <= (rest - self.parts[prefix]).norm()):  # a half turn has no Cayley form
                    self.trained, self.parts[prefix] = trained, part
            if self.slot.output is not None:
                self.trained |= self._output()
            history.append(float((self.change - self._whole(self.trained)).norm()))
        if (
            1e-7 * size < history[-1] < 0.1 * size
            and sum(v.numel() for v in self.trained.values()) * self.change.numel() <= _SMALL
        ):
            self._polish()
        return self.trained

    def _inside(self) -> Tensor:
        """The change that is asked of what is inside the output transform: S^-1 W' - W."""
        if self.slot.output is None:
            return self.change
        scales = 1 + self._excess(torch.ones_like(self.weight[..., :1]), self.trained)
        scales = scales.where(scales.abs() > _LEAST, _LEAST)
        return (self.weight + self.change) / scales - self.weight

    def _excess(self, matrix: Tensor, trained: dict[str, Tensor]) -> Tensor:
        """(S - I) of a matrix."""
        output = self.slot.output
        norms = self.layer.norms(self.slot, trained, self.weight) if output is not None and output.normed else {}
        return self.slot.output_excess(matrix, {**trained, **norms})

    def _output(self) -> dict[str, Tensor]:
        """Trained numbers of the output transform, fitted to what the others make of the weight."""
        member, groups = self.slot.output, self.slot.groups
        assert member is not None
        made = self.weight + sum(self.parts.values())
        rows = (m.reshape(groups, -1, m.shape[-1]) for m in (made, self.weight + self.change - made, self.weight))
        each = [
            member.fit(one, rest, self.frozen["output"] | {"base_norms": weight.norm(dim=1)})
            for one, rest, weight in zip(*rows, strict=True)
        ]
        return {
            f"output_{name}": torch.stack([found[name] for found in each]) if groups > 1 else each[0][name]
            for name in each[0]
        }

    def _whole(self, trained: dict[str, Tensor]) -> Tensor:
        """The change that trained numbers make: S (W T + D) - W."""
        inner = sum((self._delta(trained, prefix) for prefix in self.parts), torch.zeros_like(self.weight))
        return inner if self.slot.output is None else inner + self._excess(self.weight + inner, trained)

    def _own(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) + 1 :]: v for name, v in self.trained.items() if name.startswith(f"{prefix}_")}

    def _transform(self, rest: Tensor) -> dict[str, Tensor]:
        member = self.slot.transform
        assert member is not None
        rows, wanted = (self.kind.transform_rows(m, self.base) for m in (self.weight, rest))
        own, frozen = self._own("transform"), self.frozen["transform"]
        if self.slot.groups == 1:
            return member.fit(rows[0], wanted[0], frozen | own)
        each = [
            member.fit(rows[g], wanted[g], frozen | {name: value[g] for name, value in own.items()})
            for g in range(self.slot.groups)
        ]
        return {name: torch.stack([found[name] for found in each]) for name in own}

    def _residual(self, rest: Tensor) -> dict[str, Tensor]:
        assert self.slot.residual is not None
        return self.slot.residual.fit(rest, self.frozen["residual"] | self._own("residual"))

    def _delta(self, trained: dict[str, Tensor], prefix: str) -> Tensor:
        if prefix == "transform":
            return self.kind.transform_matrix(self.weight, lambda rows: self.slot.row_shift(rows, trained), self.base)
        assert self.slot.residual is not None
        own = {name[len("residual_") :]: v for name, v in trained.items() if name.startswith("residual_")}
        return self.slot.residual.factors(self.frozen["residual"] | own).dense()

    def _polish(self) -> None:
        names, shapes = list(self.trained), [value.shape for value in self.trained.values()]

        def named(flat: Tensor) -> dict[str, Tensor]:
            pieces = flat.split([prod(shape) for shape in shapes])
            return {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

        def delta(flat: Tensor) -> Tensor:
            return self._whole(named(flat)).flatten()

        start = torch.cat([value.flatten() for value in self.trained.values()])
        self.trained = named(levenberg(delta, start, self.change.flatten()))


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A layer like another, without its hooks and its bias, that holds ``weight``; the other may be on the meta device."""
    copied = object.__new__(type(layer))
    copied.__dict__ = {
        **layer.__dict__,
        "_parameters": {"weight": nn.Parameter(weight, requires_grad=False), "bias": None},
    }
    return copied


def _wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (v.detach().double() if v.is_floating_point() else v) for n, v in tensors.items()}


def _ended(history: list[float], size: float, again: bool) -> bool:
    if not history:
        return False
    settled = len(history) > 2 and history[-3] - history[-1] < _SETTLED * history[-1]
    return not again or settled or len(history) >= TURNS or history[-1] <= _EXACT * size
