"""The bank: many adapters of one config in one model, each row of a batch naming its own.

Trained tensors carry a leading axis [adapters, ...]; frozen factors are shared. One mechanism serves thousands of
users in one batch, trains many adapters at once on one frozen base, and runs seeds side by side. A model may carry any
number of banks; which rows are meant is known to the block that says so, in its thread, and to nobody else.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.checkpoint import base_groups, base_lock, packing
from smidgen.adapters.tuner import calls, renames
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.base import base_matrix
from smidgen.adapters.tuner.building import make_slot, members_of
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.experts import is_stack
from smidgen.adapters.tuner.heads import saved_modules
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Members, Slot
from smidgen.adapters.tuner.stored import stored_tensors
from smidgen.errors import SmidgenError, did_you_mean

Row = str | None | Sequence[str]
_OF_ONE_FILE = ("checksum", "canary", "ties", "labels", "problem_type", "base_model_name_or_path", "revision")
_WRAP = "base_model.model."  # as peft's files name a model's modules


class MisfitError(SmidgenError):
    """An adapter is of another config than a bank's; it may be right for another bank."""


class Bank:
    """Adapters of one config, stacked, on the adapted layers of a model.

    Args:
        model: a model that carries at least one adapter of this config (see :func:`smidgen.adapt`); the bank sits on
            the same layers beside it, until it is garbage or :meth:`remove` takes it off.
        config: the config of every member of the bank.
        names: names to keep places for; :meth:`put` takes others too.
        adapter_name: the adapter on whose layers it sits; None: on all adapted layers.

    Example:
        >>> import smidgen
        >>> net = nn.Sequential(nn.Linear(8, 8))
        >>> model = smidgen.adapt(net, "lora", r=2, target_modules=["0"])
        >>> bank = Bank(model, model.peft_config["default"])
        >>> bank.put("ann", model)
        >>> bank.put("bob", model)
        >>> with bank.rows(["bob", None, "ann"]):
        ...     y = model(torch.randn(3, 8))
    """

    def __init__(
        self, model: nn.Module, config: SmidgenConfig, names: Sequence[str] = (), adapter_name: str | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SmidgenError(
                f"A bank is of a module, such as the UNet or transformer of a pipeline, got a {type(model).__name__}."
            )
        if not isinstance(config, SmidgenConfig):
            raise SmidgenError(
                f"A bank is made of a config of Smidgen's, such as model.peft_config['default']; got {config!r}."
            )
        if len(set(names)) != len(names):
            raise SmidgenError(f"A bank needs distinct names; got {list(names)[:10]}.")
        self.config = config
        self.layers: dict[str, AdaptedLayer] = adapted_layers(model, adapter_name)
        if not self.layers:
            raise SmidgenError("The model carries no adapted layer; call smidgen.adapt or smidgen.load first.")
        if fused := [name for name, layer in self.layers.items() if is_stack(layer)]:
            raise SmidgenError(
                f"A bank cannot hold adapters on fused experts ({fused[0]!r}): tokens of one row go to several experts, and an "
                "expert's weight is one for the whole batch. Adapt other layers, or run one adapter at a time."
            )
        self._places = {name: i for i, name in enumerate(names)}
        self._filled: set[str] = set()
        self._using, self._rows_open = threading.Lock(), Counter[int]()  # places that open blocks of any thread use
        self.size = max(len(names), 1)
        taken = {label for layer in self.layers.values() for label in layer.banks}
        self.label = next(label for k in range(len(taken) + 1) if (label := f"bank{k or ''}") not in taken)
        self.slots: dict[str, Slot] = {}
        for name, layer in self.layers.items():
            self.slots[name] = make_slot(config, layer.get_base_layer(), name, size=self.size)
        self._on: dict[nn.Module, Slot] = {layer: self.slots[name] for name, layer in self.layers.items()}
        self._scaling: dict[nn.Module, Tensor] = {}
        self._wrappers = {name.removeprefix(_WRAP): head for name, head in saved_modules(model).items()}
        self._heads: dict[nn.Module, dict[int, dict[str, Tensor]]] = {head: {} for head in self._wrappers.values()}
        self._named = {module: name for name, module in (*self.layers.items(), *self._wrappers.items())}
        self._tested: set[tuple[Any, ...]] = set()
        self._fittings: dict[str, api.Fitting] = {}  # by the configs of files that were found to fit
        self._resting: dict[str, list[tuple[str, Tensor]]] = {}
        self._model = weakref.ref(model)
        self._around = frozenset(_around(model, self._named))
        handles = [handle for module in self._around for handle in _watch(module)]
        handles += [head.register_forward_hook(calls.heads, with_kwargs=True) for head in self._wrappers.values()]
        for name, layer in self.layers.items():
            layer.banks[self.label] = self.slots[name].to(next(layer.base_layer.parameters()).device)
        self._off = weakref.finalize(self, _take_off, list(self.layers.values()), self.label, handles)
        self._off.atexit = False

    # ---- members -----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the members, in the order of their places."""
        return sorted(self._places, key=self._places.__getitem__)

    @property
    def count(self) -> int:
        """How many members there are."""
        return len(self._places)

    @property
    def in_use(self) -> bool:
        """Whether a block is open whose rows go through members, in any thread."""
        with self._using:
            return bool(+self._rows_open)

    def put(self, name: str, source: nn.Module | str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Copies an adapter into the bank under ``name``: its parameters, heads and strength.

        A new name takes a free place; the bank grows when there is none.

        Args:
            source: a model that carries the adapter, an adapter folder, or a ``.recipe`` of ``smidgen predict``.
            adapter_name: its name in the model.

        Raises:
            MisfitError: the adapter is of another config than the bank; the bank stays as it was.
            SmidgenError: it is damaged or of another base; the bank stays as it was.
        """
        if not isinstance(name, str) or not name:
            raise SmidgenError(f"A member of a bank has a name, a text that is not empty; got {name!r}.")
        if not isinstance(source, nn.Module | str | os.PathLike):
            raise SmidgenError(f"A member comes from a model or from an adapter's folder; got {source!r}.")
        if isinstance(source, nn.Module):
            tensors, heads, scaling, misfit = self._from_model(source, adapter_name)
        else:
            tensors, heads, scaling, misfit = self._from_file(source)
            api.say_others(Path(source))
        what = f"Adapter {adapter_name!r}" if isinstance(source, nn.Module) else f"The adapter in {source}"
        if misfit:
            raise MisfitError(f"{what} does not fit the bank{misfit}. A bank holds adapters of one config.")
        if unknown := heads.keys() - self._wrappers.keys():
            raise MisfitError(
                f"{what} brings a head {sorted(unknown)[0]!r}, and the bank's model has none in modules_to_save; make the "
                "bank on a model that carries an adapter with this head."
            )
        row = self._place(name)
        with torch.no_grad():
            for target, slot in self.slots.items():
                for key, value in slot.trained().items():
                    value[row] = tensors[target][key].to(value)
                self._ready(target, tensors[target])
        for target, weight in scaling.items():
            self._scale(self.layers[target], row, weight)
        for name_, head in self._wrappers.items():
            self._heads[head].pop(row, None)
            if name_ in heads:
                like = dict(head.original_module.state_dict())
                self._heads[head][row] = {
                    key: value.detach().to(like[key], copy=True) for key, value in heads[name_].items()
                }
        self._filled.add(name)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Refuses a member whose own numbers change no layer: what ``smidgen.verify`` finds out with passes of the model, without
        any, where another adapter of the config has shown that its layers are called.

        Of a residual it is seen in D x of a fixed x, of transforms in whether they left their start.

        Raises:
            SmidgenError: it is off, or a head of it is.
        """
        row = self.index(name)
        if not any(self._moves(target, slot, row) for target, slot in self.slots.items()):
            raise SmidgenError("Every delta is zero: the adapter does nothing (it was saved before any training step).")
        for where, head in self._wrappers.items():
            values = [value for value in self._heads[head].get(row, {}).values() if value.numel()]
            if values and not any(bool(value.any()) for value in values):
                raise SmidgenError(f"Head {where!r} holds nothing but zeros: it gives the same answer to every input.")

    def _moves(self, target: str, slot: Slot, row: int) -> bool:
        """Whether a member changes a layer."""
        own = {key: value[row] for key, value in slot.trained().items()}
        if any(not torch.equal(own[key], value.to(own[key])) for key, value in self._at_rest(target)):
            return True
        if slot.residual is None:
            return False
        found = self.layers[target].prepared(slot).factors(own).weighed()
        hidden = found.down @ _signs(found.down.shape[-1]).to(found.down)
        return bool((found.up @ (hidden if found.diagonal is None else hidden * found.diagonal)).any())

    def _at_rest(self, target: str) -> list[tuple[str, Tensor]]:
        """The numbers at which the transforms of a layer do nothing, by name."""
        if target not in self._resting:
            slot = self.slots[target]
            sides = [(prefix, member) for prefix, member in slot.members() if prefix != "residual"]
            starts = slot.starts() if sides else {}
            self._resting[target] = [(n, v) for n, v in starts.items() if not n.startswith("residual_")]
        return self._resting[target]

    def start(self, names: Iterable[str] | None = None) -> None:
        """Members at their start, where they change nothing: for training. All that were not put yet unless named."""
        for name in [n for n in self.names if n not in self._filled] if names is None else list(names):
            self._reset(self._place(name))
            self._filled.add(name)
        for target in self.layers:
            self._ready(target, None)

    def get(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Trained tensors of one member: target (or head) -> tensor name -> tensor."""
        row = self.index(name)
        found = {t: {n: v[row].detach() for n, v in slot.trained().items()} for t, slot in self.slots.items()}
        return found | {t: dict(self._heads[h][row]) for t, h in self._wrappers.items() if row in self._heads[h]}

    def evict(self, name: str) -> None:
        """Forgets a member; its place is free for another.

        Raises:
            SmidgenError: an open block uses it, in this thread or another.
        """
        row = self.index(name, filled=False)
        with self._using:
            if self._rows_open[row]:
                raise SmidgenError(
                    f"Member {name!r} is used by an open block; leave `bank.rows(...)` before it is evicted."
                )
        self._reset(row)
        del self._places[name]
        self._filled.discard(name)

    def resize(self, size: int) -> None:
        """Room for ``size`` members, at least those that are there. Parameters are new tensors afterwards: tell optimisers. With less
        room than before members move together, which no open block may use meanwhile."""
        if size < max(len(self._places), 1):
            raise SmidgenError(
                f"The bank holds {len(self._places)} members; size={size} is too small, evict some first."
            )
        order, keep = self.names, list(range(self.size))
        if size < self.size:
            keep = [self._places[name] for name in order]
            if self.in_use:
                raise SmidgenError("A bank with an open block cannot get smaller; leave `bank.rows(...)` first.")
            self._places = {name: i for i, name in enumerate(order)}
        for slot in self.slots.values():
            slot.resize(size, keep)
        for layer, weights in self._scaling.items():
            self._scaling[layer] = torch.cat([weights[keep], torch.ones(size - len(keep))])
        for own in self._heads.values():
            moved = {keep.index(row): value for row, value in own.items()}
            own.clear()
            own.update(moved)
        self.size = size

    def remove(self) -> None:
        """Takes the bank off the model; a ``with`` block over the bank ends so."""
        self._off()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def parameters(self) -> list[nn.Parameter]:
        """Trained tensors [adapters, ...] of all layers."""
        return [p for slot in self.slots.values() for p in slot.parameters()]

    def index(self, name: str | None, filled: bool = True) -> int:
        """Place of a member; -1, the base model, for None.

        Raises:
            SmidgenError: there is no such member, or nothing was ever put in its place.
        """
        if name is None:
            return -1
        if name not in self._places:
            raise SmidgenError(f"The bank holds no adapter {name!r}.{did_you_mean(name, self.names)}")
        if filled and name not in self._filled:
            raise SmidgenError(
                f"Adapter {name!r} was never put into the bank; call bank.put({name!r}, ...), or bank.start([{name!r}]) to "
                "train it from the start."
            )
        return self._places[name]

    # ---- rows --------------------------------------------------------------------------------------------------------

    @contextmanager
    def rows(
        self, names: Sequence[Row], copies: bool = False, weights: Sequence[float | Sequence[float]] | None = None
    ) -> Iterator[None]:
        """Within: row i of every batch goes through adapter ``names[i]``; None is the base model.

        Beams and return sequences of ``generate``, several pictures a prompt, and tokens, windows or time steps that
        layers fold into their first axis follow by themselves. In a packed batch [1, tokens], name each token's
        adapter. Whatever fits no rule is an error.

        Args:
            names: of members; several at once (a tuple of names) add up.
            copies: a call with k times as many rows holds them in k stacked copies, as guidance stacks the batch.
            weights: of each row's adapter, or of each adapter of each row; on top of its own strength.
        """
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(map(_is_row, names)):
            raise SmidgenError(
                f"Rows are a list of names, one for each row and None for the base model; got {names!r}."
            )
        many = [(name,) if isinstance(name, str) or name is None else tuple(name) for name in names]
        given = weights if weights is not None else [1.0] * len(many)
        if len(given) != len(many):
            raise SmidgenError(f"There are {len(given)} weights for {len(many)} rows.")
        each = [
            tuple(w) if isinstance(w, Sequence) else (float(w),) * len(own) for w, own in zip(given, many, strict=True)
        ]
        if wrong := [i for i, (w, own) in enumerate(zip(each, many, strict=True)) if len(w) != len(own)]:
            raise SmidgenError(f"Row {wrong[0]} has {len(many[wrong[0]])} adapters and {len(each[wrong[0]])} weights.")
        indices = [[self.index(name) for name in own] for own in many]
        width = max((len(own) for own in indices), default=1) or 1
        lanes = [
            Rows.of([own[k] if k < len(own) else -1 for own in indices], [w[k] if k < len(w) else 1.0 for w in each])
            for k in range(width)
        ]
        with self._opened(lanes, copies, None):
            yield

    @contextmanager
    def holding(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        rows: Sequence[int | None] | None = None,
        copies: bool = False,
    ) -> Iterator[None]:
        """Within: row i of every batch goes through adapter ``rows[i]`` of ``tensors`` instead of the bank's own.

        Gradients flow into ``tensors``, so a network may predict them; the backward pass belongs inside the block when
        the model checkpoints its activations.

        Args:
            tensors: target -> name -> tensor [G, *shape], all trained tensors of all layers, G any number
                (``Layout.unpack`` of rows [G, parameters] gives these).
            rows: of 0 .. G-1, None or -1 for the base model; each of the G once in order when left out.
            copies: as in :meth:`rows`.

        Raises:
            SmidgenError: a target or tensor is missing, unknown or of another shape, or there is no such row.

        Example:
            >>> net = smidgen.adapt(nn.Sequential(nn.Linear(8, 8)), "lora", r=2, target_modules=["0"])
            >>> bank = Bank(net, net.peft_config["default"])
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
        held: dict[nn.Module, Any] = {layer: tensors[target] for target, layer in self.layers.items()}
        with self._opened([Rows.of(indices)], copies, held):
            yield

    @contextmanager
    def _opened(self, lanes: list[Rows], copies: bool, held: Mapping[nn.Module, Any] | None) -> Iterator[None]:
        if not self._off.alive:
            raise SmidgenError("This bank was removed from its model.")
        scaling, heads = ({}, {}) if held is not None else (self._scaling, self._heads)
        block = calls.Block(self._on, self._named, self._around, lanes, copies, held, scaling, heads, self._tested)
        rows = {row for lane in lanes for row in lane.index.tolist() if row >= 0} if held is None else set()
        with self._using:
            self._rows_open.update(rows)
        try:
            with calls.opened(block):
                yield
        finally:
            with self._using:
                self._rows_open.subtract(rows)

    def _check_held(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Number of adapters that ``tensors`` hold."""
        _check_names("target", tensors, self.layers)
        count = None
        for target, slot in self.slots.items():
            trained = slot.trained()
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

    # ---- where adapters come from --------------------------------------------------------------------------------------

    def _from_model(self, model: nn.Module, adapter_name: str) -> tuple[Any, Any, dict[str, float], str]:
        """(tensors by target, heads, strengths, why it does not fit) of an adapter that a model carries."""
        sources = adapted_layers(model, adapter_name)
        self._check_base(sources)
        tensors: dict[str, dict[str, Tensor]] = {}
        for target, slot in self.slots.items():
            if target not in sources:
                return {}, {}, {}, f" at {target!r}: it has none there"
            tensors[target] = stored_tensors(sources[target], adapter_name)
            own = sources[target].smidgen_slots[adapter_name]
            assert isinstance(own, Slot)
            if reason := _unlike(slot, own) or self._other_tensors(slot, partial(getattr, own)):
                return {}, {}, {}, f" at {target!r}: {reason}"
        if extra := sorted(sources.keys() - self.layers.keys()):
            return {}, {}, {}, f": it is also on {extra[0]!r}"
        heads = {
            name.removeprefix(_WRAP): head.modules_to_save[adapter_name].state_dict()
            for name, head in saved_modules(model, adapter_name).items()
        }
        for target, layer in sources.items():
            if not self.slots[target].ready:
                tensors[target] = layer.slot(adapter_name).frozen() | tensors[target]
        return tensors, heads, {target: layer.scaling[adapter_name] for target, layer in sources.items()}, ""

    def _check_base(self, sources: Mapping[str, AdaptedLayer]) -> None:
        """A live adapter is of the bank's base, as one of a file is."""
        others = [name for name, layer in sources.items() if name in self.layers and layer is not self.layers[name]]
        if not others:
            return
        own = [base_groups.samples(base_matrix(self.layers[name])).cpu() for name in others]
        its = [base_groups.samples(base_matrix(sources[name])).cpu() for name in others]
        if [part.shape for part in own] != [part.shape for part in its]:
            return  # which the slots say better
        off = float((torch.cat(its) - torch.cat(own)).norm() / torch.cat(own).norm().clamp(min=1e-30))
        if off > base_lock.CAST:
            raise SmidgenError(
                f"The adapter is of another base than the bank's: the weights of its layers differ by {off:.0%} (at most "
                f"{base_lock.CAST:.0%} are taken for a cast or a fine-tune)."
            )

    def _from_file(self, path: str | os.PathLike[str]) -> tuple[Any, Any, dict[str, float], str]:
        """The same of an adapter folder; a config that fits, its base lock among it, is checked once."""
        own, packed = api.read_adapter(path)
        form = structure(own)
        fitting = self._fittings.get(form)
        if fitting is None:
            called = renames.follow(own, self._base())
            for target, layer in self.layers.items():
                members = members_of(own, layer.get_base_layer(), target)
                if reason := _unlike(self.slots[target], members):
                    return {}, {}, {}, f" at {target!r}: {reason}"
            fitting = api.fitting(self._base(), own, str(path), called)
            if not called:
                self._fittings = {**self._fittings, form: fitting} if len(self._fittings) < 64 else {}
        tensors, stored = fitting.unpack(packed, str(path))
        if tensors.keys() != self.layers.keys():
            return {}, {}, {}, f" at {min(tensors.keys() ^ self.layers.keys())!r}: only one of the two is there"
        heads: dict[str, dict[str, Tensor]] = {}
        for name, value in stored.items():
            head, _, key = name.removeprefix(_WRAP).rpartition(".")
            for known in self._wrappers:
                if name.startswith(f"{_WRAP}{known}."):
                    head, key = known, name.removeprefix(f"{_WRAP}{known}.")
            heads.setdefault(head, {})[key] = value
        for target, slot in self.slots.items():
            given: dict[str, Tensor] = dict(tensors[target])
            for prefix, member in slot.members():
                if own.seed != self.config.seed:
                    fixed = member.constants(f"{own.seed}/{target}/{prefix}")
                    given |= {f"{prefix}_{name}": value for name, value in fixed.items()}
            ties = packing.decode_ties(own.ties[target], target) if target in own.ties else None
            if not (slot.ready or slot.pinned):
                slot.ties = ties
            elif (ties is None) != (slot.ties is None) or (ties is not None and not torch.equal(ties, slot.ties)):  # type: ignore[arg-type]
                return {}, {}, {}, f" at {target!r}: its factors follow other ties (config.ties)"
            if reason := self._other_tensors(slot, given.get):
                return {}, {}, {}, f" at {target!r}: {reason}"
        return tensors, heads, dict.fromkeys(self.layers, 1.0), ""

    @staticmethod
    def _other_tensors(slot: Slot, given: Any) -> str:
        """Which tensor that members share an adapter has otherwise; ``given(name)`` is its own, None for the bank's."""
        fixed = [f"{p}_{n}" for p, m in slot.members() for n in m.constants(f"{slot.seed}/{p}")]
        fixed += [f"residual_{n}" for n in slot._pinned()] if slot.ready or slot.pinned else []
        for name in fixed:
            value = given(name)
            if value is not None and not torch.equal(value.cpu(), getattr(slot, name).to("cpu", value.dtype)):
                return f"its {name!r} differs (another seed, or pivots of another base)"
        return ""

    def _ready(self, target: str, tensors: Mapping[str, Tensor] | None) -> None:
        """Frozen factors for a slot that has none: the source's, those of an adapter beside it, or soon from the pins;
        without a source, the pins of an adapter beside it will do."""
        slot, layer = self.slots[target], self.layers[target]
        if slot.ready or slot.pinned:
            return
        assert slot.residual is not None
        wanted = {f"residual_{name}" for name in slot.residual.factor_shapes()}
        pins = {f"residual_{name}" for name in slot._pinned()}
        beside = [own for own in layer.smidgen_slots.values() if isinstance(own, Slot) and own.ready]
        beside = [own for own in beside if not _unlike(slot, own)]
        for source in (tensors or {}, *(own.frozen() for own in beside)):
            same = tensors is None or all(torch.equal(source[n].cpu(), tensors[n].cpu()) for n in pins & source.keys())  # type: ignore[union-attr]
            if (wanted | pins) <= source.keys() and same:
                for name in wanted | pins:
                    _register(slot, name, source[name].to(next(slot.parameters()).device))  # type: ignore[arg-type]
                slot.ready = slot.pinned = True
                return
        if tensors is not None:
            for name in pins:
                _register(slot, name, tensors[name].to(getattr(slot, name)))
            slot.mark_loaded()

    # ---- places ------------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> int:
        if name not in self._places:
            free = sorted(set(range(self.size)) - set(self._places.values()))
            if not free:
                self.resize(self.size + max(1, self.size // 2))
                free = [len(self._places)]
            self._places[name] = free[0]
        return self._places[name]

    def _reset(self, row: int) -> None:
        with torch.no_grad():
            for target, slot in self.slots.items():
                for name, value in slot.starts().items():
                    slot.trained()[name][row] = value.to(slot.trained()[name])
                self._scale(self.layers[target], row, 1.0)
        for own in self._heads.values():
            own.pop(row, None)

    def _scale(self, layer: nn.Module, row: int, weight: float) -> None:
        if weight != 1 or layer in self._scaling:
            self._scaling.setdefault(layer, torch.ones(self.size))[row] = weight

    def _base(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise SmidgenError("The model of this bank is gone.")
        return model


def _is_row(name: Any) -> bool:
    several = isinstance(name, Sequence) and all(isinstance(one, str) or one is None for one in name)
    return name is None or isinstance(name, str) or several


def structure(config: SmidgenConfig) -> str:
    """What decides whether the file of an adapter fits a bank: its config but for what differs from file to file."""
    own = {key: value for key, value in config.to_dict().items() if key not in _OF_ONE_FILE}
    return json.dumps(
        own, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def _around(model: nn.Module, inside: Collection[nn.Module]) -> list[nn.Module]:
    """The modules of a model that hold some of ``inside``."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if module in inside]
    parents = {name[:at] for name in names for at, letter in enumerate(name) if letter == "."} | ({""} - set(names))
    return [modules[name] for name in parents]


def _watch(module: nn.Module) -> list[Any]:
    before = module.register_forward_pre_hook(calls.enter, with_kwargs=True, prepend=True)
    return [before, module.register_forward_hook(calls.leave, always_call=True)]


def _take_off(layers: Sequence[AdaptedLayer], label: str, handles: Sequence[Any]) -> None:
    for layer in layers:
        if label in layer.banks:
            del layer.banks[label]
    for handle in handles:
        handle.remove()


@cache
def _signs(width: int) -> Tensor:
    """An input [width] of +-1 that no layer has reason to map to 0."""
    return base_lock.signs(width, 1)[:, 0].float()


def _register(slot: Slot, name: str, value: Tensor) -> None:
    if hasattr(slot, name):
        setattr(slot, name, value)
    else:
        slot.register_buffer(name, value, persistent=False)


def _check_names(what: str, given: Collection[str], wanted: Collection[str]) -> None:
    if missing := sorted(set(wanted) - set(given)):
        raise SmidgenError(f"There is no {what} {missing[0]!r} among the given, and all of them are needed.")
    if extra := sorted(set(given) - set(wanted)):
        raise SmidgenError(f"The bank knows no {what} {extra[0]!r}.{did_you_mean(extra[0], wanted)}")


def _unlike(slot: Slot, other: Slot | Members) -> str:
    """Why an adapter of the members of another slot cannot share a bank's options; "" if it can."""
    for kind in ("transform", "residual", "output"):
        ours, theirs = getattr(slot, kind), getattr(other, kind)
        if type(theirs) is not type(ours):
            return f"its {kind} is {getattr(theirs, 'name', None)!r}, the bank's {getattr(ours, 'name', None)!r}"
        for option, value in vars(ours).items() if ours is not None else ():
            if vars(theirs)[option] != value:
                return f"its {kind} has {option}={vars(theirs)[option]!r}, the bank's {value!r}"
    return ""
