"""The bank: many adapters of one config in one model, each row of a batch naming its own.

Trained tensors carry a leading axis [adapters, ...]; frozen factors are shared. One mechanism serves thousands of
users in one batch, trains many adapters at once on one frozen base, and runs seeds side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.peft_bridge import AdaptedLayer, adapted_layers, make_slot
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
            SmidgenError: the adapter's tensors do not fit the bank's.
        """
        row = self.index(name)
        sources = adapted_layers(model, adapter_name)
        for target, layer in self.layers.items():
            bank = self._slot(layer)
            source = sources[target].smidgen_slots[adapter_name].trained() if target in sources else {}  # type: ignore[operator]
            with torch.no_grad():
                for tensor, value in bank.trained().items():
                    if tensor not in source or source[tensor].shape != value.shape[1:]:
                        found = tuple(source[tensor].shape) if tensor in source else "nothing"
                        raise SmidgenError(
                            f"Adapter {adapter_name!r} does not fit the bank at {target!r}: tensor {tensor!r} is {found}, "
                            f"the bank holds {tuple(value.shape[1:])}. A bank holds adapters of one config."
                        )
                    value[row] = source[tensor].to(value)
            if not bank.ready and target in sources:
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
        rows = torch.tensor([self.index(name) for name in names])
        before = {name: layer.bank_rows for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.bank_rows = rows
            yield
        finally:
            for name, layer in self.layers.items():
                layer.bank_rows = before[name]

    @staticmethod
    def _slot(layer: AdaptedLayer):  # type: ignore[no-untyped-def]
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
