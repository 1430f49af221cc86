"""The adapted layer: one base layer and any number of adapters, by the shift law.

    y = base(x + sum_k s_k (T_k - I) x) + sum_k s_k ((S_k - I) W T_k x + S_k D_k x)

One call of the base layer whatever the number of adapters, and one more for each output transform S_k whose W T_k x is not
what that call gave without its bias; nothing reads the base weight but what follows its norms, so quantised layers work;
switched off it is exactly the base layer; the base weight is never rewritten except by an explicit merge, from which
``unmerge`` restores the kept bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as _module

from smidgen.adapters.checkpoint.base_groups import samples
from smidgen.adapters.member import Factors, Tensors
from smidgen.adapters.tuner import compose
from smidgen.adapters.tuner.kinds import Kind, LinearKind, autocasting
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.shards import whole
from smidgen.adapters.tuner.slot import NORMS, Slot
from smidgen.errors import SmidgenError

logger = logging.getLogger("smidgen")

ROUNDED = 5e-3  # largest change of a weight that may be its rounding to 16 bits
MERGE_WARN, MERGE_REFUSE = 0.2, 0.5  # relative error of a merged update in the weight's dtype


class Term(NamedTuple):
    """One adapter's part in the shift law.

    Attributes:
        slot: its tensors, prepared.
        weight: s of the law; in a bank each row's weight comes on top.
        places: in the first axis [n] that it is for; None is the whole batch.
        at: None, or rows of a bank, of the batch or of those places.
        trained: in place of the slot's own trained tensors, with a leading axis [runs] for rows of a bank.
        made: its norms are among them and its factors are here, where it has any; see :meth:`ShiftLayer.made`.
        factors: of S D at its weight; None where each row's are made within its product.
        summed: W + D in place of both, where it was worth making; see :meth:`ShiftLayer.summed`.
    """

    slot: Slot
    weight: float = 1.0
    places: Tensor | None = None
    at: Rows | None = None
    trained: Tensors | None = None
    made: bool = False
    factors: Factors | None = None
    summed: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether its rows are the whole batch at weight one, so that T x stands for x + (T - I) x."""
        return self.weight == 1 and self.places is None and (self.at is None or self.at.weight is None)

    @property
    def whole(self) -> bool:
        """Whether it has weight one wherever it has any."""
        return self.weight == 1 and not (self.at is not None and self.at.partial)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of activations that it is for."""
        return x if self.places is None else x[self.places]

    def apart(self, other: Term) -> bool:
        """Whether it is for other rows than another."""
        if self.places is None or other.places is None:
            return False
        return not bool(torch.isin(self.places, other.places).any())


class ShiftLayer(nn.Module):
    """The engine of an adapted layer, free of peft.

    Args:
        base_layer: the frozen layer.
        kind: how its weight and activations read.
        read_weight: gives the (dequantised) base weight.
        read_bias: gives the base layer's bias, None where it has none.
        swap_weight: puts a tensor in the place of the base weight's own and gives that back.
    """

    base_layer: nn.Module

    def setup(
        self,
        kind: Kind,
        read_weight: Callable[[], Tensor],
        read_bias: Callable[[], Tensor | None],
        swap_weight: Callable[[Tensor], Tensor],
    ) -> None:
        """Completes construction once ``base_layer`` is set."""
        self.kind = kind
        self._read_weight, self._read_bias, self._swap_weight = read_weight, read_bias, swap_weight
        self.smidgen_slots = nn.ModuleDict({})
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.banks = nn.ModuleDict({})  # label -> a bank's slot here; which rows are meant is not the layer's to know
        self._kept: tuple[Tensor, ...] = ()  # the base's own weight while merged; a module would register a bare one
        for name in getattr(
            self.base_layer, "__constants__", ()
        ):  # models ask a convolution for its stride, to pad for it
            if not hasattr(self, name):
                setattr(self, name, getattr(self.base_layer, name))

    # ---- slots -------------------------------------------------------------------------------------------------------

    def add_slot(self, name: str, slot: Slot) -> None:
        """Adds (or replaces) the adapter ``name``.

        Raises:
            SmidgenError: torch keeps that name for itself.
        """
        if name not in self.smidgen_slots and hasattr(self.smidgen_slots, name):
            raise SmidgenError(
                f"torch keeps the name {name!r} for itself (nn.ModuleDict); choose another adapter_name."
            )
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
        if slot.ready and slot.made_from and not torch.compiler.is_compiling():
            self._notice_change(slot)
        if not slot.ready:
            slot.prepare(self.base_matrix)
            slot.seen = self._seen()
        return slot

    def _seen(self) -> tuple[int, int]:
        """(the base weight, its count of changes in place); (0, 0) where nothing counts them."""
        layer: Any = self.base_layer
        while "base_layer" in layer._modules:  # at every call, and hasattr is slow
            layer = layer.base_layer
        weight = layer._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.is_inference() or self._kept:
            return 0, 0
        return id(weight), weight._version

    def _notice_change(self, slot: Slot) -> None:
        """A frozen base weight that was written in place (a checkpoint loaded into the adapted model): an adapter that
        has not been trained yet gets its factors of the new one, of any other they stay, which is said."""
        before, now = slot.seen, self._seen()
        if now[0] != before[0] or now[1] == before[1] or self.base_layer.weight.requires_grad:  # or it trains too
            return
        slot.seen = now
        moved = self.moved_since(slot)
        if moved and slot.at_start():
            slot.forget_factors()
        elif moved > ROUNDED:
            logger.warning(
                "The base weight of %r changed by %.1e after the adapter was put in and trained: its factors are of the "
                "weight of before, and will be written into its file.",
                slot.seed.partition("/")[2],
                moved,
            )

    def moved_since(self, slot: Slot) -> float:
        """|W - W'| / |W| over samples of the base weight since a slot's factors were made of it; 0 where there are none."""
        weight = self.base_matrix()
        if not slot.made_from or weight.is_meta:
            return 0.0
        before, now = slot.made_from[0], samples(weight).cpu()
        if before.shape != now.shape:
            return float("inf")
        return float((now - before).norm() / before.norm().clamp(min=1e-30))

    def base_matrix(self, weight: Tensor | None = None) -> Tensor:
        """The base weight (or the one given, laid out alike) as a matrix [rows, cols], the kept original when merged."""
        return self.kind.matrix(self._original() if weight is None else weight, self.base_layer)

    def _original(self) -> Tensor:
        """The base weight without what is merged, where and in the number format in which the base is now."""
        now = self._read_weight()
        return _following(self._kept[0].detach(), now) if self._kept else now

    # ---- forward -----------------------------------------------------------------------------------------------------

    def shifted(self, x: Tensor, active: Sequence[str], *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """The shift law over the active adapters that this layer carries."""
        return self.law(x, [self._term(name) for name in active if name in self.smidgen_slots], *args, **kwargs)

    def mixed(self, x: Tensor, names: Sequence[str], *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """Row i of the batch through adapter ``names[i]`` ("__base__" for none)."""
        places = {
            name: torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            for name in dict.fromkeys(names)
            if name in self.smidgen_slots
        }
        return self.law(x, [self._term(name, at) for name, at in places.items()], *args, **kwargs)

    def _term(self, name: str, places: Tensor | None = None) -> Term:
        return Term(self.slot(name), self.scaling[name], places)

    def law(self, x: Tensor, terms: Sequence[Term], *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """The shift law: x + sum of (T - I) x through the base layer, plus the sums of (S - I) W T x and S D x."""
        terms = [term if term.made else self.made(term) for term in terms if term.weight != 0]
        if len(terms) == 1 and not args and not kwargs:
            if terms[0].summed is not None and not hooked(self.base_layer):
                return F.linear(x, terms[0].summed, self.base_layer.bias)  # type: ignore[arg-type]
            if self._composes(terms[0], x):
                return self._composed(terms[0], x)
        y = base = self._base(self._input(x, terms), *args, **kwargs)
        of_x: Tensor | None = None  # what the base layer gives for x itself
        for term in terms:
            if term.slot.output is not None:
                if self._saw(term, terms):
                    seen = term.rows(base)
                elif term.slot.transform is not None:
                    seen = self._base(self._transformed(term.rows(x), term), *args, **kwargs)
                else:
                    of_x = self._base(x, *args, **kwargs) if of_x is None else of_x
                    seen = term.rows(of_x)
                y = self._with_output(y, self._without_bias(seen), term)
            if term.slot.residual is not None:
                y = self._with_residual(y, x, term)
        return y

    def made(self, term: Term) -> Term:
        """A term with what follows from its numbers and the base weight, whatever the input: norms, and factors at its weight."""
        term = self._normed(term)._replace(made=True)
        slot, rows = term.slot, term.at
        if slot.residual is None:
            return term
        if rows is None:
            factors = slot.shaped_factors(term.trained).weighed(term.weight)
            if slot.rounded is not None:
                up, down = slot.rounded
                factors = factors._replace(up=factors.up if slot.output is not None else up, down=down)
            return term._replace(factors=factors)
        if not (isinstance(self.kind, LinearKind) and slot.residual.stacks and slot.output is None):
            return term
        factors = slot.residual.stacked(slot.factors(term.trained))
        if factors.diagonal is None:
            factors = factors._replace(up=rows.weighed(factors.up))
        else:
            factors = factors._replace(diagonal=rows.weighed(factors.diagonal)).weighed()
        return term._replace(factors=factors)

    def _normed(self, term: Term) -> Term:
        """A term with the norms that its output transform follows among its tensors."""
        if term.slot.output is None or not term.slot.output.normed:
            return term
        trained, rows = term.slot.trained() if term.trained is None else term.trained, term.at
        if rows is not None:
            norms = torch.vmap(lambda own: self.norms(term.slot, own))(dict(trained))
        else:
            norms = self.norms(term.slot, trained)
        return term._replace(trained={**trained, **norms})

    def norms(self, slot: Slot, trained: Tensors, weight: Tensor | None = None) -> dict[str, Tensor]:
        """|W| and |W T + D| row by row, [rows] or [groups, rows]; the same bits where T = I and D = 0. Without T no dense D is
        made: |W_i + D_i|^2 = |W_i|^2 + 2 <W_i, D_i> + |D_i|^2.

        Args:
            slot, trained: of the adapter.
            weight: in place of the base weight [rows, cols].
        """
        w = self.base_matrix().detach() if weight is None else weight
        if not w.numel():
            raise SmidgenError(
                "A magnitude (dora) needs the base weight in each forward pass, and it is not here whole (DeepSpeed ZeRO-3 keeps it in "
                "pieces): train with ZeRO-2, FSDP2 or on one device, or take lora or ia3."
            )
        device = w.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else nullcontext():
            wide = torch.promote_types(w.dtype, torch.float32)
            before = torch.linalg.vector_norm(w, dim=-1, dtype=wide).square()
            if slot.transform is not None:
                moved = self._moved(slot, trained, w.to(wide))
                after = before + ((2 * w + moved) * moved).sum(-1)
            elif slot.residual is not None:
                own = slot.factors(trained).weighed()
                up = own.up if own.diagonal is None else own.up * own.diagonal[..., None, :]
                both = 2 * (w @ own.down.to(w.dtype).mT) + up @ (own.down @ own.down.mT)
                after = before + (both * up).sum(-1)
            else:
                after = before
        lead = (slot.groups, -1) if slot.groups > 1 else (-1,)
        return {f"output_{name}": _root(t).reshape(lead) for name, t in zip(NORMS, (before, after), strict=True)}

    def _moved(self, slot: Slot, trained: Tensors, w: Tensor, strength: float = 1.0) -> Tensor:
        """s (W (T - I) + D) of a base weight [rows, cols] in fp32 or better."""
        total = torch.zeros_like(w)
        if slot.transform is not None:
            moved = self.kind.transform_matrix(w, lambda rows: slot.row_shift(rows, trained), self.base_layer)
            total = moved if strength == 1 else strength * moved
        return total if slot.residual is None else total + slot.factors(trained).weighed(strength).dense().to(w.dtype)

    @staticmethod
    def _saw(term: Term, terms: Sequence[Term]) -> bool:
        """Whether the base layer's one call saw T x of a term, wherever that goes."""
        moved = [other for other in terms if other is not term and other.slot.transform is not None]
        return (term.slot.transform is None or term.whole) and all(term.apart(other) for other in moved)

    def _without_bias(self, y: Tensor) -> Tensor:
        bias = self._read_bias()
        return y if bias is None else y - self.kind.as_outputs(bias).to(y.device, y.dtype)

    def _with_output(self, y: Tensor, plain: Tensor, term: Term) -> Tensor:
        """y + (S - I) W T x, given W T x of the rows that the term is for."""
        if term.places is not None:
            some = self._with_output(y[term.places], plain, term._replace(places=None))
            return y.index_copy(0, term.places, some)
        slot, rows = term.slot, term.at

        def shift(a: Tensor, trained: Tensors | None) -> Tensor:
            return self.kind.transform(lambda b: slot.output_shift(b, trained), a, self.base_layer)

        if rows is None:
            moved = shift(plain, term.trained)
            return y + (moved if term.weight == 1 else term.weight * moved)
        assert term.trained is not None
        moved = rows.weighed(rows.apply(shift, rows.leading(plain), term.trained))
        return y + rows.leading(moved)

    def _base(self, x: Tensor, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        """The base layer, with its own weight when adapters are merged into it."""
        if not self._kept:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        name, layer = "weight", self.base_layer
        while hasattr(layer, "base_layer"):
            name, layer = f"base_layer.{name}", layer.base_layer  # type: ignore[assignment]
        return functional_call(self.base_layer, {name: self._original().to(x.device)}, (x, *args), kwargs)  # type: ignore[no-any-return]

    def _input(self, x: Tensor, terms: Sequence[Term]) -> Tensor:
        terms = [term for term in terms if term.slot.transform is not None]
        if len(terms) == 1 and terms[0].exact:
            return self._transformed(x, terms[0])
        shifted = x
        for term in terms:
            some = x if term.places is None else x[term.places]
            moved = self._transformed(some, term) - some
            moved = moved * term.weight if term.at is None else _each(term.at.weighed, moved, term.at)
            shifted = shifted + moved if term.places is None else shifted.index_add(0, term.places, moved)
        return shifted

    def _transformed(self, x: Tensor, term: Term) -> Tensor:
        """T x, row by row in a bank."""
        if term.at is not None:
            rows = term.at
            return _each(lambda own: rows.apply(lambda run, t: self._t(run, term.slot, t), own, term.trained), x, rows)  # type: ignore[arg-type]
        return self._t(x, term.slot, term.trained)

    def _t(self, x: Tensor, slot: Slot, trained: Tensors | None) -> Tensor:
        return self.kind.transform(lambda a: slot.transformed(a, trained), x, self.base_layer)

    def _with_residual(self, y: Tensor, x: Tensor, term: Term) -> Tensor:
        """y + D x, in one pass over y where that can be."""
        if term.places is not None:
            some = self._with_residual(y[term.places], x[term.places], term._replace(places=None))
            return y.index_copy(0, term.places, some)
        slot, rows = term.slot, term.at
        if term.factors is not None and rows is None:
            return self.kind.add_output_shift(y, term.factors, x, self.base_layer)
        assert term.trained is not None and rows is not None
        if term.factors is not None:
            assert isinstance(self.kind, LinearKind)
            return rows.leading(self.kind.add_output_shifts(rows.leading(y), term.factors, rows.leading(x)))
        weight = torch.ones(len(rows.index)) if rows.weight is None else rows.weight

        def of_run(run: Tensor, own: Tensors) -> Tensor:
            return self.kind.output_shift(slot.shaped_factors(own).weighed(own["weight"]), run, self.base_layer)

        shift = rows.apply(of_run, rows.leading(x), {**term.trained, "weight": weight.to(x.device)})
        return y + rows.leading(shift).to(y.dtype)

    def _composes(self, term: Term, x: Tensor) -> bool:
        """Whether the composed form is exact here and cheaper: a diagonal, many tokens."""
        residual = term.slot.residual
        if residual is None or not residual.diagonal_between or not self.sums(term, x):
            return False
        rows, cols = self.base_layer.weight.shape  # type: ignore[misc,union-attr]
        return compose.worth(x.numel() // max(x.shape[-1], 1), rows, cols, self.r_of(term.slot))

    def sums(self, term: Term, x: Tensor) -> bool:
        """Whether x (W + D)^T is what the layer gives: a plain frozen linear layer and nothing but one D for the whole batch."""
        slot, base = term.slot, self.base_layer
        if term.places is not None or term.at is not None or self._kept:
            return False
        if slot.transform is not None or slot.output is not None or slot.residual is None or slot.rounded is not None:
            return False
        if type(self.kind) is not LinearKind or type(base) is not nn.Linear or "weight" not in base._parameters:
            return False  # made by the layer's call
        weight: Tensor = base.weight
        if type(weight) not in (nn.Parameter, Tensor):  # torchao's have no addmm
            return False
        if weight.requires_grad or autocasting(x.device.type) or (weight.dtype, weight.device) != (x.dtype, x.device):
            return False
        if hooked(base):
            return False
        return weight.dtype in (torch.float32, torch.float64)  # 16 bits would round W + D

    def summed(self, term: Term) -> Term:
        """A made term that :meth:`sums`, with W + D at hand; for calls without a graph."""
        weight, up, diagonal, down = self._parts(term)
        return term._replace(summed=torch.addmm(weight, up if diagonal is None else up * diagonal, down))

    def _parts(self, term: Term) -> list[Any]:
        """W, and up, diagonal and down of a made term in its number format."""
        assert term.factors is not None
        weight: Any = self.base_layer.weight
        return [weight, *(t if t is None else t.to(weight.dtype) for t in term.factors[:3])]

    @staticmethod
    def r_of(slot: Slot) -> int:
        """Number of trained directions of a slot."""
        return getattr(slot.residual, "r", 0)

    def _composed(self, term: Term, x: Tensor) -> Tensor:
        weight, *factors = self._parts(term)
        return compose.ComposedLinear.apply(x, weight, self.base_layer.bias, *factors)  # type: ignore[no-any-return]

    # ---- the matrix form -------------------------------------------------------------------------------------------

    def delta_matrix(
        self, name: str, trained: Tensors | None = None, weight: Tensor | None = None, strength: float = 1.0
    ) -> Tensor:
        """s (S (W T + D) - W) as a matrix [rows, cols] in fp32 or better, at strength one unless given.

        Args:
            name: of the adapter.
            trained: in place of its own trained tensors.
            weight: in place of the base weight.
            strength: s.
        """
        slot = self.slot(name)
        device = next(slot.parameters()).device
        trained = {n: whole(v).to(device) for n, v in (slot.trained() if trained is None else trained).items()}
        if slot.transform is None and slot.output is None:
            return slot.factors(trained).weighed(strength).dense()
        some = next(iter(trained.values()))
        w = self.base_matrix(weight).detach().to(some.device)
        w = w.to(torch.promote_types(torch.promote_types(w.dtype, some.dtype), torch.float32))
        total = self._moved(slot, trained, w, strength)
        if slot.output is None:
            return total
        norms = self.norms(slot, trained, w) if slot.output.normed else {}
        return total + slot.output_excess(strength * w + total, {**trained, **norms})

    def shifted_weight(self, names: Sequence[str]) -> Tensor:
        """W + the deltas of the named adapters that this layer carries, in the weight's own layout and number format,
        rounded once; W itself when nothing is to be added. Gradients flow to the trained numbers."""
        original = self._original()
        names = [name for name in names if name in self.smidgen_slots and self.scaling[name] != 0]
        if not names:
            return original
        device = original.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else nullcontext():
            delta = sum(self.delta_weight(name) for name in names)
            assert isinstance(delta, Tensor)
            return (original.to(delta.dtype) + delta).to(original.dtype)

    def delta_weight(self, name: str) -> Tensor:
        """The update of an adapter in the base weight's own layout, with its strength."""
        return self.kind.unmatrix(self.delta_matrix(name, strength=self.scaling[name]), self.base_layer)

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

    def put_merged(self, weight: Tensor) -> None:
        """Puts a merged weight in the base weight's place, as a tensor of its own: a layer that shares the base weight
        keeps it. What was there is kept for :meth:`restore`."""
        before = self._swap_weight(weight)
        self._kept = self._kept or (before,)

    def restore(self) -> None:
        """Puts the kept weight back: the same bits, cast or moved as the model was in the meantime."""
        if self._kept:
            kept, now = self._kept[0], self._swap_weight(self._kept[0])
            moved = _following(kept.detach(), now)
            if (moved.dtype, moved.device) != (kept.dtype, kept.device):
                self._swap_weight(moved)
            self._kept = ()

    def forget_kept(self) -> None:
        """Makes what is merged the base weight for good."""
        self._kept = ()


def _following(kept: Tensor, now: Tensor) -> Tensor:
    """A kept weight in the number format and on the device of the one in its place; meta holds nothing to follow."""
    return kept.to(device=kept.device if now.is_meta else now.device, dtype=now.dtype)


def hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to be told of a layer's calls, or has put a call of their own in its place."""
    own = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(own or _module._global_forward_hooks or _module._global_forward_pre_hooks)


def _root(squares: Tensor) -> Tensor:
    """Square roots, zero with a finite gradient where rounding left nothing or less."""
    there = squares > 0
    return squares.where(there, 1.0).sqrt().where(there, 0.0)


def _each(function: Callable[[Tensor], Tensor], x: Tensor, rows: Rows) -> Tensor:
    """A function of activations whose first axis are the rows, over activations as the layer has them."""
    return rows.leading(function(rows.leading(x)))
