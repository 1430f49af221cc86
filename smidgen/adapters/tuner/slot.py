"""A slot: the tensors of one adapter at one layer. Members are pure functions; a slot only holds their numbers.

Trained numbers are fp32 parameters, constants and factors are buffers that are rebuilt. Pins are in the state dict but are
neither: whole numbers that what averages, broadcasts or casts a model's buffers must leave alone. Names start with
``transform_``, ``residual_`` or ``output_``. Allocation is separate from initialisation: factors are decomposed when they are first needed, from the pins if a file brought them, so loading never decomposes for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smidgen.adapters.checkpoint.base_groups import samples
from smidgen.adapters.member import Factors, Member, Output, Residual, Tensors, Transform
from smidgen.errors import AdapterFileError

Spec = tuple[tuple[int, ...], torch.dtype]
NORMS = ("base_norms", "norms")  # |W| and |W T + D| row by row, for an output transform that follows them


class Members(NamedTuple):
    """The members of an adapter at one layer.

    Attributes:
        transform, residual, output: any may be None.
        groups: how many matrices the layer has: the groups of a convolution, or experts; above one the trained tensors of the
            two transforms have a leading axis [groups].
        stacked: whether the residual's tensors have that axis too (experts), or it is one for the whole weight.
    """

    transform: Transform | None
    residual: Residual | None
    output: Output | None = None
    groups: int = 1
    stacked: bool = False

    def lead(self, prefix: str) -> tuple[int, ...]:
        """The leading axis of a member's tensors."""
        return (self.groups,) if self.groups > 1 and (prefix != "residual" or self.stacked) else ()

    def each(self) -> list[tuple[str, Member]]:
        """(prefix, member) of those that are there."""
        sides = (("transform", self.transform), ("residual", self.residual), ("output", self.output))
        return [(prefix, member) for prefix, member in sides if member is not None]

    def trained(self) -> int:
        """How many numbers train."""
        return sum(member.count() * prod(self.lead(prefix)) for prefix, member in self.each())


def layout_of(members: Members, store_factors: bool = False) -> dict[str, Spec]:
    """Full name -> (shape, dtype) of everything a slot stores, without making any of it."""
    layout: dict[str, Spec] = {}
    for prefix, member in members.each():
        lead = members.lead(prefix)
        layout |= {f"{prefix}_{n}": ((*lead, *shape), torch.float32) for n, shape in member.shapes().items()}
    if members.residual is not None:
        found = pinned(members.residual, store_factors, members.lead("residual"))
        layout |= {f"residual_{n}": spec for n, spec in found.items()}
    return layout


def pinned(residual: Residual, store_factors: bool, lead: tuple[int, ...] = ()) -> dict[str, Spec]:
    """The frozen tensors of a residual that a file holds, by the residual's own names."""
    factors = residual.factor_shapes() if store_factors else {}
    found = residual.pins() | {name: (shape, torch.float32) for name, shape in factors.items()}
    return {name: ((*lead, *shape), dtype) for name, (shape, dtype) in found.items()}


class Slot(nn.Module):
    """Tensors of one adapter at one layer.

    Args:
        members: what it holds the tensors of.
        seed: text naming the adapter's seed and the target, for the start values.
        store_factors: keep the frozen factors among the stored tensors.
        size: number of adapters of a bank; every trained tensor then has a leading axis [size].
        ties: from a file, what the base weight does not determine of the factors.
    """

    def __init__(
        self,
        members: Members,
        seed: str,
        store_factors: bool = False,
        size: int | None = None,
        ties: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.size = members, size
        self.transform, self.residual, self.output, self.groups, _ = members
        self.seed, self.store_factors = seed, store_factors
        self.ready = self.residual is None or not self.residual.decomposes
        for name, value in self.starts().items():
            value = value if size is None else value.expand(size, *value.shape)
            self.register_parameter(name, nn.Parameter(value.clone()))
        for prefix, member in self.members():
            for name, value in member.constants(f"{seed}/{prefix}").items():
                self.register_buffer(f"{prefix}_{name}", value, persistent=False)
        self.pins = () if self.residual is None else tuple(f"residual_{n}" for n in self.residual.pins())
        for name, (shape, dtype) in self._pinned().items():
            if f"residual_{name}" in self.pins:  # gloo, and averages, know no uint16
                setattr(self, f"residual_{name}", torch.zeros(shape, dtype=torch.int32))
            else:
                self.register_buffer(f"residual_{name}", torch.zeros(shape, dtype=dtype), persistent=True)
        self.pinned = False
        self.awaits_file = self.emptied = False
        self.ties = ties
        self.made_from: tuple[Tensor, ...] = ()  # samples of the weight that the factors are of
        self.seen = (0, 0)  # that weight, and its count of changes in place
        self.rounded: tuple[Tensor, Tensor] | None = None  # up and down in bf16, while a training multiplies in it

    def members(self) -> Iterable[tuple[str, Member]]:
        """(prefix, member) of the members that are there."""
        return self.parts.each()

    def _pinned(self) -> dict[str, Spec]:
        if self.residual is None:
            return {}
        return pinned(self.residual, self.store_factors, self.parts.lead("residual"))

    # ---- the tensors by name -------------------------------------------------------------------------------------

    def trained(self) -> dict[str, Tensor]:
        """Trained tensors by full name."""
        return {name: value for name, value in self._parameters.items() if value is not None}

    def layout(self, store_factors: bool | None = None) -> dict[str, Spec]:
        """What a file holds of this slot, without a bank's leading axis; factors as the slot has it unless told."""
        return layout_of(self.parts, self.store_factors if store_factors is None else store_factors)

    def stored(self, store_factors: bool | None = None) -> dict[str, Tensor]:
        """What a file must hold: trained tensors and pins, by full name; factors as the slot has it unless told."""
        wanted = [name for name in self.layout(store_factors) if name not in self._parameters]
        return self.trained() | {name: getattr(self, name) for name in wanted}

    def frozen(self) -> dict[str, Tensor]:
        """Constants, factors as far as they are made, and pins, by full name."""
        return {n: v for n, v in self._buffers.items() if v is not None} | {n: getattr(self, n) for n in self.pins}

    def fill(self, tensors: Tensors) -> None:
        """Takes stored tensors (a whole set, checked by the caller) into the slot."""
        for name, value in tensors.items():
            old = getattr(self, name)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value.to(old.dtype).clone(), requires_grad=old.requires_grad)
            setattr(self, name, value if isinstance(value, nn.Parameter) else value.to(old.dtype).clone())
        self.mark_loaded()

    def await_file(self) -> None:
        """The numbers are in a file that is about to be read: until they arrive the adapter refuses to run."""
        self.awaits_file, self.ready = True, False

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """As any module's, but numbers that get storage without values (``to_empty``, or back from the meta device) are
        known to be missing."""
        super()._apply(fn, recurse)
        if self._on_meta() or "to_empty" in getattr(fn, "__qualname__", ""):
            self.emptied, self.ready = True, False
            self._fill_constants()
        return self

    def _on_meta(self) -> bool:
        return any(t.is_meta for t in self._parameters.values() if t is not None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts the trained numbers at their start, as torch's own layers do it after ``to_empty``."""
        for name, value in self.starts().items():
            getattr(self, name).copy_(value)
        self.emptied = self.pinned = False
        self.ready = self.residual is None or not self.residual.decomposes

    def _fill_constants(self) -> None:
        """Constants follow from the seed alone."""
        some = next(iter(self.parameters()))
        for prefix, member in self.members():
            for name, value in member.constants(f"{self.seed}/{prefix}").items():
                setattr(self, f"{prefix}_{name}", value.to(some.device))

    def mark_loaded(self) -> None:
        """Numbers came from a file: factors are rebuilt, from its pins, when next needed."""
        self.awaits_file, self.emptied, self.ready = False, False, True
        if self.residual is not None and self.residual.decomposes:
            self.pinned = True
            self.ready = self.store_factors

    def at_start(self) -> bool:
        """Whether no trained number has moved yet."""
        own = self.trained()
        return all(bool((own[name] == value.to(own[name])).all()) for name, value in self.starts().items())

    def forget_factors(self) -> None:
        """The factors are made anew, of the base weight of then, when next needed."""
        self.ready = self.pinned = False

    def starts(self) -> dict[str, Tensor]:
        """Trained tensors at the start, of one adapter."""
        return {
            f"{prefix}_{name}": value.expand(*self.parts.lead(prefix), *value.shape)
            for prefix, member in self.members()
            for name, value in member.start(f"{self.seed}/{prefix}").items()
        }

    def resize(self, size: int, keep: list[int]) -> None:
        """Makes room for ``size`` adapters of a bank: those at the places ``keep`` come first, the others at their start."""
        starts, self.size = self.starts(), size
        for name, old in self.trained().items():
            new = starts[name].to(old).expand(size, *old.shape[1:]).clone()
            new[: len(keep)] = old.detach()[keep]
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))

    # ---- frozen factors --------------------------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.inference_mode(False)  # factors first needed in a draw or an encoding must serve training later
    def prepare(self, weight_matrix: Callable[[], Tensor]) -> None:
        """Makes the frozen factors, from the pins if a file brought them, else from the base weight alone."""
        if self.ready:
            return
        if self.awaits_file:
            raise AdapterFileError(
                "This adapter was set up from a file's config but its numbers never arrived, so it would do nothing "
                "(transformers' model.load_adapter cannot read them); use smidgen.load(model, path) or "
                "peft.PeftModel.from_pretrained. For a fresh adapter set config.base_lock = None."
            )
        weight = weight_matrix()
        if weight.is_meta:  # shapes only; factors are made once the weight is there
            for name, shape in self.residual.factor_shapes().items() if self.residual is not None else ():
                empty = torch.empty((*self.parts.lead("residual"), *shape), device="meta")
                self.register_buffer(f"residual_{name}", empty, persistent=False)
            return
        if self.emptied:
            raise AdapterFileError(
                "The numbers of this adapter are gone: the model went through to_empty or the meta device and nothing was "
                "loaded since. Load its state dict, or call reset_parameters() on each of its modules for a fresh adapter."
            )
        assert self.residual is not None
        pins = {n: getattr(self, f"residual_{n}") for n in self.residual.pins()} if self.pinned else None
        if pins is not None and self.ties is not None:
            pins["ties"] = self.ties
        device = next(self.parameters()).device
        found = self._decompose(weight.detach().float().contiguous(), pins)
        self.ties = found.pop("ties", self.ties if pins is not None else None)
        self.made_from = (samples(weight).cpu(),)
        for name, value in found.items():
            value = value.detach().to(device)
            if (old := getattr(self, f"residual_{name}", None)) is not None:
                setattr(self, f"residual_{name}", value.to(old.dtype))
            else:
                self.register_buffer(f"residual_{name}", value, persistent=False)
        self.ready = self.pinned = True

    def _decompose(self, weight: Tensor, pins: Tensors | None) -> dict[str, Tensor]:
        """Factors and pins of a base weight [rows, cols], or of each of [experts, rows, cols]."""
        assert self.residual is not None
        if not self.parts.lead("residual"):
            factors, found = self.residual.decompose(weight, pins)
            return factors | found
        each = []
        for i, matrix in enumerate(weight):
            factors, found = self.residual.decompose(
                matrix, None if pins is None else {n: p[i] for n, p in pins.items()}
            )
            if (
                found.pop("ties", None) is not None
            ):  # of many experts nobody keeps them: what LAPACK gives is held to the canary
                factors, found = self.residual.decompose(matrix, found)
            each.append(factors | found)
        return {name: torch.stack([own[name] for own in each]) for name in each[0]}

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": getattr(self, name) for name in self.pins})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        pinned = {name: f"{prefix}{name}" for name in self.pins}
        own = {key: value for key, value in state_dict.items() if key not in pinned.values()}
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        for name, key in pinned.items():
            here = getattr(self, name)
            if key not in state_dict:
                missing.append(key)
            elif state_dict[key].shape != here.shape:
                errors.append(f"size mismatch for {key}: {tuple(state_dict[key].shape)}, here {tuple(here.shape)}.")
            else:
                setattr(self, name, state_dict[key].detach().to(here.device, here.dtype, copy=True))
        pins = any(f"{prefix}residual_{name}" in state_dict for name in self._pinned())
        waits = self.awaits_file or self.emptied
        if pins or (waits and all(f"{prefix}{name}" in state_dict for name in self.trained())):
            self._fill_constants()
            self.mark_loaded()

    # ---- maths over given tensors (the engine passes its own, or rows of a bank) -----------------------------------

    def tensors(self, prefix: str, trained: Tensors | None = None) -> dict[str, Tensor]:
        """A member's tensors by its own names; ``trained`` replaces the slot's trained tensors (rows of a bank)."""
        start = len(prefix) + 1
        own = {k[start:]: v for k, v in self._buffers.items() if k.startswith(prefix) and v is not None}
        own |= {name[start:]: getattr(self, name) for name in self.pins if name.startswith(prefix)}
        given = self._parameters if trained is None else trained
        return own | {k[start:]: v for k, v in given.items() if k.startswith(prefix) and v is not None}

    def transformed(self, x: Tensor, trained: Tensors | None = None) -> Tensor:
        """T x over features-last activations [..., width], or [..., groups, width] in a grouped convolution."""
        assert self.transform is not None
        return self._each_group(self.transform.apply, x, self.tensors("transform", trained), self.transform.shapes())

    def output_shift(self, y: Tensor, trained: Tensors | None = None) -> Tensor:
        """(S - I) y over features-last outputs [..., width], or [..., groups, width] in a grouped convolution; for an output
        transform that follows norms they are among ``trained``."""
        assert self.output is not None
        own = {*self.output.shapes(), *NORMS}
        return self._each_group(self.output.shift, y, self.tensors("output", trained), own)

    def _each_group(
        self, function: Callable[..., Tensor], x: Tensor, tensors: Tensors, own: Container[str], axis: int = -2
    ) -> Tensor:
        """A function of features, with each group's own tensors in a grouped convolution, whose groups are that axis."""
        if self.groups == 1:
            return function(x, tensors)
        dims = {name: 0 if name in own else None for name in tensors}
        return torch.vmap(function, in_dims=(axis, dims), out_dims=axis)(x, tensors)

    def output_excess(self, matrix: Tensor, trained: Tensors | None = None) -> Tensor:
        """(S - I) M of a matrix [rows, n], or of each of [groups, rows, n]."""
        if self.groups == 1:
            return self.output_shift(matrix.mT, trained).mT
        pieces = matrix.reshape(self.groups, -1, matrix.shape[-1])
        return self.output_shift(pieces.permute(2, 0, 1), trained).permute(1, 2, 0).reshape(matrix.shape)

    def row_shift(self, rows: Tensor, trained: Tensors | None = None) -> Tensor:
        """rows (T - I) of rows [groups, n, width], each group with its own T."""
        assert self.transform is not None
        return self._each_group(
            self.transform.row_shift, rows, self.tensors("transform", trained), self.transform.shapes(), axis=0
        )

    def factors(self, trained: Tensors | None = None) -> Factors:
        """The residual's factors, leading with an axis [experts] where it has that axis."""
        assert self.residual is not None
        residual, tensors = self.residual, self.tensors("residual", trained)
        if not self.parts.lead("residual"):
            return residual.factors(tensors)
        own = residual.shapes().keys() | residual.factor_shapes().keys() | residual.pins().keys()
        dims = {n: 0 if n in own else None for n in tensors}  # constants are the same for each

        def each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: t for n, t in residual.factors(tensors)._asdict().items() if t is not None}

        found = torch.vmap(each, in_dims=(dims,))(tensors)
        return Factors(found["up"], found.get("diagonal"), found["down"])

    def shaped_factors(self, trained: Tensors | None = None) -> Factors:
        """The factors of S D; norms as in :meth:`output_shift`."""
        found = self.factors(trained)
        return found if self.output is None else found._replace(up=found.up + self.output_excess(found.up, trained))
