"""What an open block keeps between its calls: the terms of its layers, for as long as nothing that they were made of changed.

The steps of a decoding batch ask each layer for the same: rows picked out of the bank, factors at their weight, and, where one
adapter has the whole batch for long, W + D. A term is kept with all that it was made of, each tensor with the count of its
changes in place, and given again only while these are the same. What trains is not kept: fused optimisers write without counting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from smidgen.adapters.tuner import compose
from smidgen.adapters.tuner.kinds import autocasting
from smidgen.adapters.tuner.layer import ShiftLayer, Term
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Slot

ROOM = 2**28  # bytes that a block keeps beside what the bank and the model hold


class Source(NamedTuple):
    """Something that terms were made of: what holds it, by which key, and its count of changes in place, None of what is no tensor."""

    holder: Mapping[Any, Any]
    key: Any
    value: Any
    version: int | None

    @classmethod
    def of(cls, holder: Mapping[Any, Any], key: Any) -> Source:
        value = holder.get(key)
        return cls(holder, key, value, value._version if isinstance(value, Tensor) else None)


@dataclass
class Entry:
    """The terms of one layer.

    Attributes:
        lanes: the rows that they are for.
        like: device and number format of the input.
        sources: what they were made of.
        terms: themselves.
        bytes: that they take of the room.
        tokens: that went through one term for the whole batch; None where W + D is made, or cannot be.
    """

    lanes: list[Rows]
    like: tuple[torch.device, torch.dtype]
    sources: list[Source]
    terms: list[Term]
    bytes: int
    tokens: int | None

    def good(self, lanes: list[Rows], x: Tensor) -> bool:
        """Whether they are the terms of a call now."""
        if self.lanes is not lanes or self.like != (x.device, x.dtype):
            return False
        for holder, key, value, version in self.sources:
            if version is not None and (value._version != version or value.requires_grad):
                return False
            if holder.get(key) is not value:
                return False
        return True


class Kept:
    """What a block keeps, within ``room`` bytes."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._entries: dict[nn.Module, Entry] = {}

    def find(self, layer: ShiftLayer, lanes: list[Rows], x: Tensor) -> list[Term] | None:
        """The terms of a layer for rows ``lanes`` of an input; None where they have to be made."""
        entry = self._entries.get(layer)
        if entry is None or not entry.good(lanes, x):
            return None
        if entry.tokens is not None:
            self._count(layer, entry, x)
        return entry.terms

    def keep(
        self,
        layer: ShiftLayer,
        slot: Slot,
        scaling: Mapping[nn.Module, Tensor],
        lanes: list[Rows],
        x: Tensor,
        make: Callable[[], list[Term]],
    ) -> list[Term]:
        """What ``make`` gives of a slot and the adapters' weights ``scaling``; kept where that can be."""
        before = self._entries.pop(layer, None)
        self.room += 0 if before is None else before.bytes
        held: list[tuple[Mapping[Any, Any], Any]] = [(slot._parameters, name) for name in slot._parameters]
        held += [(slot._buffers, name) for name in slot._buffers]
        held += [(vars(slot), name) for name in slot.pins]
        held.append((scaling, layer))
        values = [value for holder, key in held if (value := holder.get(key)) is not None]
        normed = slot.output is not None and slot.output.normed  # norms are of the base weight too
        if normed or slot.rounded is not None or not all(_counted(value) for value in values):
            return make()
        sources = [Source.of(holder, key) for holder, key in held]  # before: another thread may write meanwhile
        terms = [layer.made(term) for term in make()]
        size = _copied(terms, values)
        if size <= self.room:
            tokens = 0 if len(terms) == 1 and layer.sums(terms[0], x) else None
            self._entries[layer] = Entry(lanes, (x.device, x.dtype), sources, terms, size, tokens)
            self.room -= size
        return terms

    def _count(self, layer: ShiftLayer, entry: Entry, x: Tensor) -> None:
        """Where one adapter has the whole batch for long, makes W + D, beside the model's own W."""
        (term,), base = entry.terms, layer.base_layer
        tokens = (entry.tokens or 0) + x.numel() // max(x.shape[-1], 1)
        weight: Any = base._parameters.get("weight")
        if not layer.sums(term, x) or not _counted(weight) or weight.nbytes > self.room:
            entry.tokens = None
        elif not compose.repaid(tokens, *weight.shape):
            entry.tokens = tokens
        else:
            sources = [*entry.sources, Source.of(layer._modules, "base_layer"), Source.of(base._parameters, "weight")]
            total = entry.bytes + weight.nbytes
            self._entries[layer] = Entry(entry.lanes, entry.like, sources, [layer.summed(term)], total, None)
            self.room -= weight.nbytes


def possible(x: Tensor) -> bool:
    """Whether a call just computes: without a graph, and nothing casts, transforms or records its operations."""
    return not (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or autocasting(x.device.type)
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())  # the graph reads its memory for ever
    )


def _counted(value: Tensor) -> bool:
    """Whether all that changes a tensor in place is counted."""
    return type(value) in (nn.Parameter, Tensor) and not (value.requires_grad or value.is_inference())


def _copied(terms: Sequence[Term], sources: Sequence[Tensor]) -> int:
    """Bytes of terms that are no views of their sources."""
    seen = {value.untyped_storage().data_ptr() for value in sources}
    copied = 0
    for term in terms:
        for value in (*(term.trained or {}).values(), *(term.factors or ())):
            if value is not None and (storage := value.untyped_storage()).data_ptr() not in seen:
                seen.add(storage.data_ptr())
                copied += storage.nbytes()
    return copied
