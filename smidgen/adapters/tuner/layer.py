"""The adapted layer: one base layer and any number of adapters, by the shift law.

    y = base(x + sum_k s_k (T_k - I) x) + sum_k s_k D_k x

One call of the base layer whatever the number of adapters; nothing reads the base weight, so quantised layers work;
switched off it is exactly the base layer; the base weight is never rewritten except by an explicit merge, from which
``unmerge`` restores the kept bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smidgen.adapters.member import Factors, Tensors
from smidgen.adapters.tuner import compose
from smidgen.adapters.tuner.kinds import Kind, LinearKind, autocasting
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Slot

logger = logging.getLogger("smidgen")

MERGE_WARN, MERGE_REFUSE = 0.2, 0.5  # relative error of a merged update in the weight's dtype


class ShiftLayer(nn.Module):
    """The engine of an adapted layer, free of peft.

    Args:
        base_layer: the frozen layer.
        kind: how its weight and activations read.
        read_weight: gives the (dequantised) base weight.
        write_weight: puts a merged weight in place.
    """

    base_layer: nn.Module

    def setup(self, kind: Kind, read_weight: Callable[[], Tensor], write_weight: Callable[[Tensor], None]) -> None:
        """Completes construction once ``base_layer`` is set."""
        self.kind = kind
        self._read_weight, self._write_weight = read_weight, write_weight
        self.smidgen_slots = nn.ModuleDict({})
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.bank: Slot | None = None
        self.bank_rows: Rows | None = None
        self.bank_held: Tensors | None = None  # in place of the bank's own trained tensors
        self._kept: Tensor | None = None

    # ---- slots -------------------------------------------------------------------------------------------------------

    def add_slot(self, name: str, slot: Slot) -> None:
        """Adds (or replaces) the adapter ``name``."""
        self.smidgen_slots[name] = slot
        self.scaling[name] = 1.0
        self.r[name] = self.r_of(slot)

    def slot(self, name: str) -> Slot:
        """The slot of an adapter with its factors at hand."""
        slot = self.smidgen_slots[name]
        assert isinstance(slot, Slot)
        return self.prepared(slot)

    def prepared(self, slot: Slot) -> Slot:
        """The same slot, its frozen factors made if they were not."""
        if not slot.ready:
            slot.prepare(self.base_matrix)
        return slot

    def base_matrix(self) -> Tensor:
        """The base weight as a matrix [rows, cols], the kept original when merged."""
        return self.kind.matrix(self._original(), self.base_layer)

    def _original(self) -> Tensor:
        return self._read_weight() if self._kept is None else self._kept

    # ---- forward -----------------------------------------------------------------------------------------------------

    def shifted(self, x: Tensor, active: Sequence[str], *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """The shift law over the active adapters that this layer carries."""
        terms = [(self.slot(name), self.scaling[name]) for name in active if name in self.smidgen_slots]
        terms = [(slot, s) for slot, s in terms if s != 0]
        if len(terms) == 1 and not args and not kwargs and self._composes(terms[0][0], x):
            return self._composed(*terms[0], x)
        y = self.base_layer(self._input(x, terms), *args, **kwargs)
        for slot, s in terms:
            if slot.residual is not None:
                y = self.kind.add_output_shift(y, _strength(slot.factors(), s), x, self.base_layer)
        return y

    def _input(self, x: Tensor, terms: list[tuple[Slot, float]]) -> Tensor:
        terms = [(slot, s) for slot, s in terms if slot.transform is not None]
        if len(terms) == 1 and terms[0][1] == 1:
            return self.kind.transform(terms[0][0].transformed, x, self.base_layer)
        shifted = x
        for slot, s in terms:
            shifted = shifted + s * (self.kind.transform(slot.transformed, x, self.base_layer) - x)
        return shifted

    def _composes(self, slot: Slot, x: Tensor) -> bool:
        """Whether the composed form is exact here and cheaper: a plain frozen linear layer, a diagonal, many tokens."""
        if slot.transform is not None or type(self.kind) is not LinearKind or type(self.base_layer) is not nn.Linear:
            return False
        weight, shape = self.base_layer.weight, (self.base_layer.out_features, self.base_layer.in_features)
        diagonal = slot.residual is not None and slot.residual.diagonal_between
        if not diagonal or weight.requires_grad or autocasting(x.device.type):
            return False
        if weight.dtype != x.dtype or weight.dtype not in (torch.float32, torch.float64):  # 16 bits would round W + D
            return False
        return compose.worth(x.numel() // max(x.shape[-1], 1), *shape, self.r_of(slot))

    @staticmethod
    def r_of(slot: Slot) -> int:
        """Number of trained directions of a slot."""
        return getattr(slot.residual, "r", 0)

    def _composed(self, slot: Slot, strength: float, x: Tensor) -> Tensor:
        factors = _strength(slot.factors(), strength)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        up, diagonal, down = (t.to(x.dtype) for t in factors if t is not None)
        return compose.ComposedLinear.apply(x, weight, bias, up, diagonal, down)  # type: ignore[no-any-return,arg-type]

    def mixed(self, x: Tensor, names: Sequence[str], *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """Row i of the batch through adapter ``names[i]`` ("__base__" for none), one call of the base layer."""
        groups = {
            name: torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            for name in dict.fromkeys(names)
            if name in self.smidgen_slots
        }
        shifted = x
        for name, rows in groups.items():
            if self.slot(name).transform is not None:
                moved = self._input(x[rows], [(self.slot(name), self.scaling[name])])
                shifted = shifted.index_copy(0, rows, moved)
        y = self.base_layer(shifted, *args, **kwargs)
        for name, rows in groups.items():
            slot = self.slot(name)
            if slot.residual is not None:
                shift = self.kind.output_shift(_strength(slot.factors(), self.scaling[name]), x[rows], self.base_layer)
                y = y.index_add(0, rows, shift.to(y.dtype))
        return y

    def banked(self, x: Tensor, rows: Rows, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """Row i of the batch through its adapter of the bank, or of ``bank_held``."""
        assert self.bank is not None
        rows = rows.over(len(x))
        if not rows.adapted:
            return self.base_layer(x, *args, **kwargs)
        slot = self.prepared(self.bank)
        given = slot.trained() if self.bank_held is None else self.bank_held
        picked = {name: rows.pick(value) for name, value in given.items()}
        shifted = x
        if slot.transform is not None:
            moved = rows.apply(lambda run, t: self._row_transform(slot, run, t), x, picked)
            shifted = x + rows.masked(moved - x) if rows.plain else moved
        y = self.base_layer(shifted, *args, **kwargs)
        if slot.residual is None:
            return y
        if isinstance(self.kind, LinearKind) and slot.residual.stacks:
            up, diagonal, down = slot.factors(picked)
            masked = (rows.masked(up), None, down) if diagonal is None else (up, rows.masked(diagonal), down)
            return self.kind.add_output_shifts(y, Factors(*masked), x)
        shift = rows.apply(lambda run, t: self.kind.output_shift(slot.factors(t), run, self.base_layer), x, picked)
        return y + rows.masked(shift).to(y.dtype)

    def _row_transform(self, slot: Slot, row: Tensor, trained: Tensors) -> Tensor:
        return self.kind.transform(lambda a: slot.transformed(a, trained), row, self.base_layer)

    # ---- the matrix form -------------------------------------------------------------------------------------------

    def delta_matrix(self, name: str) -> Tensor:
        """W (T - I) + D as a matrix [rows, cols] in fp32 or better, without the adapter's strength."""
        slot = self.slot(name)
        total = None
        if slot.transform is not None:
            excess = slot.transform_excess()
            w = self.base_matrix().detach().to(excess.device)
            w = w.to(torch.promote_types(torch.promote_types(w.dtype, excess.dtype), torch.float32))
            total = self.kind.transform_matrix(w, excess.to(w.dtype), self.base_layer)
        if slot.residual is not None:
            dense = slot.factors().dense()
            total = dense if total is None else total + dense.to(total.dtype)
        assert total is not None
        return total

    def delta_weight(self, name: str) -> Tensor:
        """The update of an adapter in the base weight's own layout, with its strength."""
        return self.scaling[name] * self.kind.unmatrix(self.delta_matrix(name), self.base_layer)

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> tuple[Tensor, float]:
        """(base weight plus the named deltas in the weight's dtype, relative error of the update after rounding)."""
        original = self._original()
        delta = sum(self.delta_weight(name) for name in names)
        assert isinstance(delta, Tensor)
        exact = original.to(delta) + delta
        merged = exact.to(original.dtype)
        size = delta.norm()
        error = float((merged.to(delta) - exact).norm() / size) if size > 0 else 0.0
        return merged.contiguous(), error

    def keep(self) -> None:
        """Keeps the base weight's bits for :meth:`restore`."""
        if self._kept is None:
            self._kept = self._read_weight().detach().clone()

    def restore(self) -> None:
        """Puts the kept bits back."""
        if self._kept is not None:
            self._write_weight(self._kept)
            self._kept = None


def _strength(factors, s: float):  # type: ignore[no-untyped-def]
    """The factors of s D."""
    if s == 1:
        return factors
    if factors.diagonal is not None:
        return factors._replace(diagonal=factors.diagonal * s)
    return factors._replace(up=factors.up * s)
