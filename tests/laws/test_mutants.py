"""Planted mutants: each mistake below must be caught by the law that forbids it, on a case where the law holds otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod

import pytest
import torch

import smidgen
from smidgen import testing
from smidgen.adapters.residuals.triangular import Triangular
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.calls import Block
from smidgen.adapters.tuner.kept import Entry, Kept
from smidgen.adapters.tuner.kinds import LinearKind
from smidgen.adapters.tuner.layer import ShiftLayer, Term
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Slot
from smidgen.errors import SmidgenError

Patch = Callable[[pytest.MonkeyPatch], None]


def scale_twice_on_merge(patch: pytest.MonkeyPatch) -> None:
    right = ShiftLayer.delta_weight
    patch.setattr(ShiftLayer, "delta_weight", lambda self, name: self.scaling[name] * right(self, name))


def chained_instead_of_summed(patch: pytest.MonkeyPatch) -> None:
    def chained(self, x, terms):  # type: ignore[no-untyped-def]
        for term in terms:
            if term.slot.transform is not None:
                x = x + term.weight * (self.kind.transform(term.slot.transformed, x, self.base_layer) - x)
        return x

    patch.setattr(ShiftLayer, "_input", chained)


def pivots_ignored_at_load(patch: pytest.MonkeyPatch) -> None:
    right = Triangular.decompose
    patch.setattr(Triangular, "decompose", lambda self, weight, pins: right(self, weight, None))


def disable_forgets_the_transform(patch: pytest.MonkeyPatch) -> None:
    right = AdaptedLayer.forward

    def forward(self, x, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.disable_adapters:
            terms = [Term(self.slot(n), self.scaling[n]) for n in self.smidgen_slots]
            return self.base_layer(self._input(x, terms), *args, **kwargs)
        return right(self, x, *args, **kwargs)

    patch.setattr(AdaptedLayer, "forward", forward)


def bank_reads_one_row_for_all(patch: pytest.MonkeyPatch) -> None:
    right = Rows.pick

    def pick(self, value):  # type: ignore[no-untyped-def]
        return right(replace(self, index=self.index[:1].repeat(len(self.index)), first=None), value)

    patch.setattr(Rows, "pick", pick)


def start_is_not_the_identity(patch: pytest.MonkeyPatch) -> None:
    right = Slot.factors

    def factors(self, trained=None):  # type: ignore[no-untyped-def]
        found = right(self, trained)
        return found._replace(up=found.up + 1e-6)

    patch.setattr(Slot, "factors", factors)


def unmerge_subtracts_instead_of_restoring(patch: pytest.MonkeyPatch) -> None:
    def unmerge(self) -> None:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for name in self.merged_adapters:
                self.base_layer.weight -= self.delta_weight(name)
        self._kept = ()
        self.merged_adapters.clear()

    patch.setattr(AdaptedLayer, "unmerge", unmerge)


def conv_weights_read_transposed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinearKind, "unmatrix", lambda self, matrix, layer: matrix.flip(0))


def activations_read_as_if_contiguous(patch: pytest.MonkeyPatch) -> None:
    right = LinearKind._hidden

    def hidden(factors, x):  # type: ignore[no-untyped-def]
        return right(factors, torch.as_strided(x, x.shape, torch.empty(x.shape).stride()))

    patch.setattr(LinearKind, "_hidden", staticmethod(hidden))


def the_bias_is_scaled_too(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShiftLayer, "_without_bias", lambda self, y: y)


def an_output_transform_acts_on_what_others_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShiftLayer, "_saw", staticmethod(lambda term, terms: True))


def an_output_transform_forgets_the_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slot, "shaped_factors", Slot.factors)


def a_bank_follows_the_norms_of_one_row(patch: pytest.MonkeyPatch) -> None:
    right = ShiftLayer._normed

    def normed(self, term):  # type: ignore[no-untyped-def]
        found = right(self, term)
        if not isinstance(term.at, Rows) or found is term:
            return found
        first = {name: value[:1].expand_as(value) for name, value in found.trained.items() if name.endswith("norms")}
        return found._replace(trained={**found.trained, **first})

    patch.setattr(ShiftLayer, "_normed", normed)


def a_block_keeps_the_adapter_of_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Entry, "good", lambda self, lanes, x: self.lanes is lanes)


def a_block_keeps_what_was_for_other_rows(patch: pytest.MonkeyPatch) -> None:
    shared = Kept()
    patch.setattr(Block, "__init__", partialmethod(Block.__init__, kept=shared))
    patch.setattr(Entry, "good", lambda self, lanes, x: len(self.lanes) == len(lanes))


MUTANTS: list[tuple[Patch, str, str]] = [
    (scale_twice_on_merge, "merge", "tlora"),
    (scale_twice_on_merge, "shift = matrix", "lora"),
    (chained_instead_of_summed, "sum", "tlora"),
    (pivots_ignored_at_load, "recast", "loldu"),
    (disable_forgets_the_transform, "disable", "oft"),
    (bank_reads_one_row_for_all, "bank", "svfit"),
    (start_is_not_the_identity, "identity", "lora+2"),
    (unmerge_subtracts_instead_of_restoring, "merge", "lora"),
    (conv_weights_read_transposed, "shift = matrix", "svfit"),
    (activations_read_as_if_contiguous, "inputs", "svfit"),
    (the_bias_is_scaled_too, "shift = matrix", "ia3"),
    (an_output_transform_acts_on_what_others_moved, "sum", "ia3"),
    (an_output_transform_forgets_the_residual, "shift = matrix", "low_rank+scale"),
    (a_bank_follows_the_norms_of_one_row, "bank", "dora"),
    (a_block_keeps_the_adapter_of_before, "bank rows", "lora"),
    (a_block_keeps_what_was_for_other_rows, "bank rows", "svfit"),
]


@pytest.mark.parametrize(("mutant", "law", "method"), MUTANTS, ids=[f"{m.__name__}-{law}" for m, law, _ in MUTANTS])
def test_a_law_catches_the_mutant(mutant: Patch, law: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = smidgen.config("lora", r=2, alpha=4.0) if method == "lora+2" else smidgen.config(method)
    testing.LAWS[law](config, "linear")
    mutant(monkeypatch)
    with pytest.raises((AssertionError, SmidgenError)):  # the law, or a refusal on its way
        testing.LAWS[law](config, "linear")
