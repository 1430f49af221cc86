"""The bank: many adapters of one config in one model, each row of a batch naming its own.

Trained tensors carry a leading axis [adapters, ...]; frozen factors are shared. One mechanism serves thousands of
users in one batch, trains many adapters at once on one frozen base, and runs seeds side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.peft_bridge import AdaptedLayer, adapted_layers, make_slot, stored_tensors
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Slot
from smidgen.errors import SmidgenError, did_you_mean


class Bank:
    """Adapters of one config, stacked, on the adapted layers of a model.

    Args:
        model: a model that carries at least one adapter of this config (see :func:`smidgen.adapt`); the bank sits on
            the same layers beside it.
        config: the config of every member of the bank.
        names: names of the members, in order.

    Example:
        >>> import smidgen
        >>> net = nn.Sequential(nn.Linear(8, 8))
        >>> model = smidgen.adapt(net, "lora", r=2, target_modules=["0"])
        >>> bank = Bank(model, model.peft_config["default"], ["ann", "bob"])
        >>> with bank.rows(["bob", None, "ann"]):
        ...     y = model(torch.randn(3, 8))
    """

    def __init__(self, model: nn.Module, config: SmidgenConfig, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or not names:
            raise SmidgenError(f"A bank needs distinct names, at least one; got {list(names)[:10]}.")
        self.names = list(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        self.layers: dict[str, AdaptedLayer] = adapted_layers(model)
        if not self.layers:
            raise SmidgenError("The model carries no adapted layer; call smidgen.adapt or smidgen.load first.")
        for name, layer in self.layers.items():
            layer.bank = make_slot(config, layer.get_base_layer(), name, size=len(self.names))
            layer.bank.to(next(layer.base_layer.parameters()).device)

    def put(self, name: str, model: nn.Module, adapter_name: str = "default") -> None:
        """Copies an adapter that sits in ``model`` into the bank's row ``name``.

        Raises:
            SmidgenError: the adapter is of another config than the bank; the row stays as it was.
        """
        row, sources = self.index(name), adapted_layers(model, adapter_name)
        found: dict[str, dict[str, Tensor]] = {}
        for target, layer in self.layers.items():
            reason = "it has none there"
            if target in sources:
                found[target] = stored_tensors(sources[target], adapter_name)
                reason = _misfit(self._slot(layer), sources[target].smidgen_slots[adapter_name])  # type: ignore[arg-type]
            if reason:
                raise SmidgenError(
                    f"Adapter {adapter_name!r} does not fit the bank at {target!r}: {reason}. A bank holds adapters of "
                    "one config."
                )
        if extra := sorted(sources.keys() - self.layers.keys()):
            raise SmidgenError(f"Adapter {adapter_name!r} does not fit the bank: it is also on {extra[0]!r}.")
        with torch.no_grad():
            for target, layer in self.layers.items():
                bank = self._slot(layer)
                for tensor, value in bank.trained().items():
                    value[row] = found[target][tensor].to(value)
                if not bank.ready:
                    self._share_factors(bank, sources[target].slot(adapter_name))

    def get(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Trained tensors of one member: target -> tensor name -> tensor."""
        row = self.index(name)
        return {t: {n: v[row].detach() for n, v in self._slot(la).trained().items()} for t, la in self.layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Trained tensors [adapters, ...] of all layers."""
        return [p for layer in self.layers.values() for p in self._slot(layer).parameters()]

    def index(self, name: str | None) -> int:
        """Row of a member; -1, the base model, for None."""
        if name is None:
            return -1
        if name not in self._index:
            raise SmidgenError(f"The bank holds no adapter {name!r}.{did_you_mean(name, self.names)}")
        return self._index[name]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within: row i of every batch goes through adapter ``names[i]``; None is the base model.

        A batch of k times as many rows repeats the names k times (classifier-free guidance stacks its halves so).
        """
        with self._set([self.index(name) for name in names], None):
            yield

    @contextmanager
    def holding(
        self, tensors: Mapping[str, Mapping[str, Tensor]], rows: Sequence[int | None] | None = None
    ) -> Iterator[None]:
        """Within: row i of every batch goes through adapter ``rows[i]`` of ``tensors`` instead of the bank's own.

        Gradients flow into ``tensors``, so a network may predict them; the backward pass belongs inside the block when
        the model checkpoints its activations.

        Args:
            tensors: target -> name -> tensor [G, *shape], all trained tensors of all layers, G any number
                (``Layout.unpack`` of rows [G, numbers] gives these).
            rows: of 0 .. G-1, None or -1 for the base model; each of the G once in order when left out. A batch of k
                times as many rows repeats them k times.

        Raises:
            SmidgenError: a target or tensor is missing, unknown or of another shape, or there is no such row.

        Example:
            >>> net = smidgen.adapt(nn.Sequential(nn.Linear(8, 8)), "lora", r=2, target_modules=["0"])
            >>> bank = Bank(net, net.peft_config["default"], ["ann"])
            >>> predicted = {"0": {"residual_a": torch.randn(3, 2, 8), "residual_b": torch.randn(3, 8, 2)}}
            >>> with bank.holding(predicted, rows=[2, None, 0, 0]):
            ...     y = net(torch.randn(4, 8))
        """
        count = self._check_held(tensors)
        indices = list(range(count)) if rows is None else [-1 if row is None else int(row) for row in rows]
        for row in indices:
            if not -1 <= row < count:
                raise SmidgenError(
                    f"There is no row {row}: the tensors hold rows 0 to {count - 1}, -1 is the base model."
                )
        with self._set(indices, tensors):
            yield

    @contextmanager
    def _set(self, rows: list[int], held: Mapping[str, Mapping[str, Tensor]] | None) -> Iterator[None]:
        before = {name: (layer.bank_rows, layer.bank_held) for name, layer in self.layers.items()}
        runs = Rows.of(rows)
        try:
            for name, layer in self.layers.items():
                layer.bank_rows, layer.bank_held = runs, held[name] if held is not None else None
            yield
        finally:
            for name, layer in self.layers.items():
                layer.bank_rows, layer.bank_held = before[name]

    def _check_held(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Number of adapters that ``tensors`` hold."""
        _check_names("target", tensors, self.layers)
        count = None
        for target, layer in self.layers.items():
            trained = self._slot(layer).trained()
            _check_names(f"tensor of {target!r}", tensors[target], trained)
            for name, value in tensors[target].items():
                count = count if count is not None or not value.ndim else len(value)
                wanted = (count or 1, *trained[name].shape[1:])
                if tuple(value.shape) != wanted:
                    raise SmidgenError(
                        f"{name!r} of {target!r} has shape {tuple(value.shape)}, it should be {wanted}: "
                        "[adapters, *shape of one], at least one adapter and the same number everywhere."
                    )
        assert count is not None
        return count

    @staticmethod
    def _slot(layer: AdaptedLayer) -> Slot:
        assert layer.bank is not None
        return layer.bank

    @staticmethod
    def _share_factors(bank, source) -> None:  # type: ignore[no-untyped-def]
        for name, value in source._buffers.items():
            if name in bank._buffers:
                setattr(bank, name, value)
            else:
                bank.register_buffer(name, value, persistent=False)
        bank.ready = bank.pinned = True


def _check_names(what: str, given: Collection[str], wanted: Collection[str]) -> None:
    if missing := sorted(set(wanted) - set(given)):
        raise SmidgenError(f"There is no {what} {missing[0]!r} among the given, and all of them are needed.")
    if extra := sorted(set(given) - set(wanted)):
        raise SmidgenError(f"The bank knows no {what} {extra[0]!r}.{did_you_mean(extra[0], wanted)}")


def _misfit(bank: Slot, source: Slot) -> str:
    """Why an adapter cannot share a bank's options and frozen tensors; "" if it can."""
    for kind in ("transform", "residual"):
        theirs, ours = getattr(source, kind), getattr(bank, kind)
        if type(theirs) is not type(ours):
            return f"its {kind} is {getattr(theirs, 'name', None)!r}, the bank's {getattr(ours, 'name', None)!r}"
        for option, value in vars(ours).items() if ours is not None else ():
            if vars(theirs)[option] != value:
                return f"its {kind} has {option}={vars(theirs)[option]!r}, the bank's {value!r}"
    fixed = [f"{p}_{n}" for p, m in bank.members() for n in m.constants(f"{bank.seed}/{p}")]
    fixed += [f"residual_{n}" for n in bank.residual.pins()] if bank.residual is not None and bank.ready else []
    for name in fixed:
        if not torch.equal(getattr(source, name).cpu(), getattr(bank, name).cpu()):
            return f"its {name!r} differs (another seed, or pivots of another base)"
    return ""
