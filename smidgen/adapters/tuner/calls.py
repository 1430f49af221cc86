"""Which adapter goes on which row: the open blocks of banks, the call that a layer is in, and the rule between the two.

A block (``bank.rows``, ``bank.holding``) lives in a ContextVar, so threads and tasks do not see each other's. The
outermost module of a model that is called fixes the call's batch; the block's rows become rows of that batch by one of

    equal, each row repeated, the rows stacked in copies, rows of tokens in a packed batch of one

and rows of the batch become rows of a layer's input by one of

    each row repeated (tokens or windows folded into the first axis; once is "equal"), stacked copies, the second axis.

No rule is guessed. A call with more rows than the block needs evidence in its inputs, or is told. A layer's rule is
found by running the model with one row changed, and seeing which rows of the layer's input change with it, and with the rows in
reverse, which they must follow. It holds for calls of one form: shapes, flags, and whether rows have masks of their own.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from smidgen.adapters.member import Tensors
from smidgen.adapters.tuner.kept import Kept, possible
from smidgen.adapters.tuner.layer import ShiftLayer, Term
from smidgen.adapters.tuner.rows import Rows
from smidgen.adapters.tuner.slot import Slot
from smidgen.errors import SmidgenError

REPEATED, COPIES, SECOND = "each row repeated", "stacked copies", "second axis"
_ABOUT = (
    "mask",
    "position",
    "label",
    "past_",
    "cache",
    "img_ids",
    "txt_ids",
)  # inputs that say where tokens are; FLUX reads row 0's
_TIMES = ("step", "time", "sigma")  # whole numbers that change from call to call
_SAME = 1e-2  # of the largest number of an input: rows that differ by less are one row
_CHANGED = 1e-3  # of the largest change at a layer: below is rounding of kernels that see the whole batch


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Block:
    """What ``bank.rows`` opened.

    Args:
        slots: the bank's slot on each layer.
        names: targets and heads by name, for errors.
        around: the modules that hold them.
        lanes: one choice of rows for each of the adapters that a row has at most, each of the length of the block.
        stacked: the call holds the rows in stacked copies.
        held: target layer -> tensors in place of the bank's own.
        scaling: target layer -> weight of each adapter [adapters], where one is not 1.
        heads: head -> tensors of each adapter that brought one, by its row in the bank.
        tested: the bank's (module, form of input) whose rows were looked at.
    """

    slots: Mapping[nn.Module, Slot]
    names: Mapping[nn.Module, str]
    around: Collection[nn.Module]
    lanes: list[Rows]
    stacked: bool
    held: Mapping[nn.Module, Tensors] | None
    scaling: Mapping[nn.Module, Tensor]
    heads: Mapping[nn.Module, Mapping[int, Tensors]]
    tested: set[tuple[Any, ...]]
    last: Call | None = None
    several: bool = False  # calls of different shapes were made in it
    made: dict[tuple[Any, ...], list[Rows]] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)

    @property
    def size(self) -> int:
        return len(self.lanes[0])

    @cached_property
    def constant(self) -> bool:
        """All rows go through the same: then nothing has to be known of a layer."""
        return all(len(lane.index) == 1 for lane in self.lanes)

    @cached_property
    def anywhere(self) -> bool:
        """Whether it holds for a batch of any length, so that nothing has to be known of a call."""
        return self.constant and self.size == 1


_OPEN: ContextVar[tuple[Block, ...]] = ContextVar("smidgen_bank_blocks", default=())
_BY_THREAD: dict[int, tuple[Block, ...]] = {}  # for threads of autograd, which see no context


@contextmanager
def opened(block: Block) -> Iterator[None]:
    """Within, the block's rows hold, in place of an outer block of the same bank, beside those of other banks."""
    before, thread = _OPEN.get(), threading.get_ident()
    now = (*(other for other in before if other.slots is not block.slots), block)
    token = _OPEN.set(now)
    _BY_THREAD[thread] = now
    try:
        yield
    finally:
        _OPEN.reset(token)
        if before:
            _BY_THREAD[thread] = before
        else:
            _BY_THREAD.pop(thread, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _blocks() -> tuple[Block, ...]:
    found = _OPEN.get()
    if found or not _BY_THREAD or not _in_backward():
        return found
    threads = list(_BY_THREAD.values())  # a checkpointed forward is run again by a thread of autograd
    if len(threads) > 1:
        raise SmidgenError(
            f"A checkpointed layer runs again in a thread of autograd while {len(threads)} threads have rows of a bank "
            "open, and whose they are is not known there; train in one thread at a time."
        )
    return threads[0]


# ---- calls -----------------------------------------------------------------------------------------------------------


class Call:
    """A call of the outermost module of a model that carries banks: its batch, and the blocks' rows in it."""

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: Sequence[Block]
    ) -> None:
        self.module, self.stack, self.blocks = module, [module], blocks
        self.args, self.kwargs = args, kwargs
        self.main, self.lists, self.listed = _main_input(module, args, kwargs)
        self._fits: dict[Block, tuple[int, int, bool]] = {}

    def fit(self, block: Block) -> tuple[int, int, bool]:
        """(copies, repeats, whether rows are tokens of a packed batch): how the block's rows fill this call's batch."""
        if block not in self._fits:
            self._fits[block] = self._fit(block)
        return self._fits[block]

    def _fit(self, block: Block) -> tuple[int, int, bool]:
        n, x = block.size, self.main
        if x is None:
            if block.constant:
                return 1, 1, False
            raise SmidgenError(f"A {type(self.module).__name__} was called without a batch to see rows in.")
        batch = len(x)
        if self.listed and not self.lists and batch != n and not block.constant:
            raise SmidgenError(
                f"A {type(self.module).__name__} takes a list of tensors, of which it is not known whether they are rows: give all rows the same "
                "adapter, or call it for one at a time."
            )
        generation = None if block.constant else _generation()
        if generation is not None and generation[0] != n and batch % generation[0] == 0:
            raise SmidgenError(
                f"The bank has {n} rows set and `generate` runs on {generation[0]}: which of them these are is not known (some models drop "
                "rows that are done). Name a row for each prompt, give all rows the same adapter, or generate for one adapter at a time."
            )
        if n in (1, batch):
            return 1, batch // n, False
        tokens = x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())
        if batch == 1 and tokens and x.shape[1] == n:
            return 1, 1, True
        if batch % n:
            raise SmidgenError(f"The bank has {n} rows set, which do not divide a batch of {batch}.")
        if block.constant:
            return 1, batch // n, False
        times = batch // n
        if generation is not None:  # that rows are repeated needs no evidence, what is more than that does
            fits = [(times // generation[1], generation[1])] if times % generation[1] == 0 else []
        elif block.stacked:
            fits = [(times, 1)]
        else:
            fits = [(copies, times // copies) for copies in range(1, times + 1) if times % copies == 0]
        told = block.stacked or fits == [(1, times)]
        shown = [fit for fit in fits if told or self._shows(*fit)]
        if len(shown) == 1 and (told or len(fits) == 1 or not self._doubtful(shown[0][0], fits)):
            return *shown[0], False
        found = "its inputs show both" if len(shown) > 1 else "its inputs do not show which"
        raise SmidgenError(
            f"The bank has {n} rows set and the call a batch of {batch}: each row {batch // n} times in turn, or the rows in "
            f"stacked copies? {found[0].upper()}{found[1:]}. Name each of the {batch} rows, or, where guidance stacks copies of the rows, say "
            "copies=True."
        )

    def _shows(self, copies: int, repeats: int) -> bool:
        """Whether some input consists of that many equal copies, and some of rows that are equal in runs of ``repeats``."""
        # Masks show nothing, nor does what is equal everywhere.
        inputs = [t for t in self._of_rows() if not (_two_values(t) or _alike(t, len(t)))]
        return (copies == 1 or any(_alike(t, copies) for t in inputs)) and (
            repeats == 1 or any(bool((t == t[:, :1]).all()) for t in (t.unflatten(0, (-1, repeats)) for t in inputs))
        )

    def _doubtful(self, copies: int, fits: Sequence[tuple[int, int]]) -> bool:
        """Whether a fit with as many copies is shown by what another would give as well: of two people at one prompt and one noise
        guidance stacks [none, none, prompt, prompt], and two pictures of each at the same noises lie as its copies do."""
        assert self.main is not None
        inputs = [t for t in self._of_rows() if t.shape[1] > 1]
        if copies > 1:
            return all(_alike(t, copies) for t in inputs) and any(_alike(t, len(t)) for t in inputs)
        return any(_alike(self.main.detach(), more) for more, _ in fits if more > copies)

    def _of_rows(self) -> list[Tensor]:
        """The inputs with a row for each of the batch, [rows, numbers]."""
        assert self.main is not None
        given = [*self.args, *self.kwargs.values()]
        found = [_padded(value) if _is_list(value) else value for value in given] if self.lists else given
        inputs = [t.detach() for t in _tensors(found) if t.dim() and len(t) == len(self.main)]
        return [t.flatten(1) if t.dim() > 1 else t[:, None] for t in inputs]

    def rows(self, block: Block, layer: nn.Module, x: Tensor) -> list[Rows]:
        """The rows of a layer's input through the adapters of a block."""
        copies, repeats, packed = fit = self.fit(block)
        key = (layer, layer is self.module, x.shape, fit)
        if key in block.made:
            return block.made[key]
        batch, known = block.size * copies * repeats, _known(layer, self.module)
        ways = _ways(known, x, batch, packed)
        if len(ways) != 1:
            if not bool(x.any()):
                return []  # no adapter moves zeros
            raise SmidgenError(_no_rule(block.names.get(layer, "a layer"), known, x, batch, ways))
        kind, times = ways.pop()
        lanes = [lane.repeated(repeats).stacked(copies) for lane in block.lanes]
        lanes = [lane.stacked(times) if kind == COPIES else lane.repeated(times) for lane in lanes]
        block.made[key] = [replace(lane, axis=1) for lane in lanes] if kind == SECOND else lanes
        return block.made[key]


def _eager(function: Any) -> Any:
    """Left out of compiled graphs; torch's own decorator alone costs as much as a small product at every call."""
    outside = torch.compiler.disable(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


_CALLS: ContextVar[tuple[Call, ...]] = ContextVar("smidgen_bank_calls", default=())
_PROBE: ContextVar[Probe | None] = ContextVar("smidgen_bank_probe", default=None)


@_eager
def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module that holds adapted layers: the outermost one fixes the call."""
    probe = _PROBE.get()
    if probe is not None:
        probe.stack.append(module)
        return
    blocks = [block for block in _OPEN.get() if not block.anywhere and module in block.around]
    if not blocks or _in_backward():  # a checkpointed part runs again: it belongs to the call that it ran in
        return
    calls = _CALLS.get()
    for call in calls:
        if any(block in call.blocks for block in blocks):
            call.stack.append(module)
    blocks = [block for block in blocks if not any(block in call.blocks for call in calls)]
    if not blocks:
        return
    call = Call(module, args, kwargs, blocks)
    _CALLS.set((*calls, call))
    for block in blocks:
        fit = call.fit(block)
        block.several |= block.last is not None and block.last.fit(block) != fit
        block.last = call
        if not block.constant:
            _learn(call, block, block.size * fit[0] * fit[1], fit[2])


@_eager
def leave(module: nn.Module, args: Any, output: Any) -> None:
    """After it, errors included."""
    probe, calls = _PROBE.get(), _CALLS.get()
    for stack in [probe.stack] if probe is not None else [call.stack for call in calls]:
        if stack and stack[-1] is module:
            stack.pop()
    if probe is None and not all(call.stack for call in calls):
        for call in calls:
            if not call.stack:
                call.args, call.kwargs = (), {}
        _CALLS.set(tuple(call for call in calls if call.stack))


@_eager
def terms(layer: ShiftLayer, x: Tensor) -> list[Term] | None:
    """What the open banks put on a layer: None when no block is open that knows the layer, [] for the base alone."""
    probe = _PROBE.get()
    if probe is not None:
        probe.record(layer, x)
        return []
    blocks = [block for block in _blocks() if layer in block.slots]
    if not blocks:
        return None
    found: list[Term] = []
    for block in blocks:
        slot = layer.prepared(block.slots[layer])
        lanes = block.lanes if block.constant else _call_of(block, layer, x).rows(block, layer, x)
        keeps = block.held is None and possible(x)
        own = block.kept.find(layer, lanes, x) if keeps else None
        if own is None:
            make = partial(_terms, block, layer, slot, lanes, x)
            own = block.kept.keep(layer, slot, block.scaling, lanes, x, make) if keeps else make()
        found += own
    return found


def _terms(block: Block, layer: ShiftLayer, slot: Slot, lanes: list[Rows], x: Tensor) -> list[Term]:
    """The terms of a block on a layer."""
    trained = slot.trained() if block.held is None else block.held[layer]
    scaling, found = block.scaling.get(layer), []
    for rows in lanes:
        if scaling is not None:
            rows = rows.scaled(scaling)
        if not rows.adapted:
            continue
        if len(rows.index) == 1:
            one = {name: value[int(rows.index)] for name, value in trained.items()}
            found.append(Term(slot, 1.0 if rows.weight is None else float(rows.weight), trained=one))
            continue
        places, rows = rows.part or (None, rows)
        places = places if places is None else places.to(x.device)
        found.append(Term(slot, 1.0, places, rows, {name: rows.pick(value) for name, value in trained.items()}))
    return found


def _call_of(block: Block, layer: nn.Module, x: Tensor) -> Call:
    call = next((call for call in _CALLS.get() if block in call.blocks), None)
    if call is None and _in_backward():
        call = block.last
        if block.several:
            raise SmidgenError(
                "A checkpointed layer runs again after calls with different batches in one block of a bank's rows, and "
                "whose it is cannot be told; open a block for each call, with its backward pass inside."
            )
    return call or Call(layer, (x,), {}, [block])


def heads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After a trained head: the rows of a bank go through their adapters' own heads."""
    probe = _PROBE.get()
    if probe is not None:
        probe.record(module, args[0])
        return None
    wrapper: Any = module
    blocks = [block for block in _blocks() if module in block.heads]
    if not blocks or wrapper.disable_adapters:
        return None
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        raise SmidgenError(
            f"A bank can run heads of one tensor only; this {type(wrapper.original_module).__name__} takes more."
        )
    x, own, whose = args[0], [block.heads[module] for block in blocks], []
    n = 1 if all(block.constant for block in blocks) else len(x)
    for block, tensors in zip(blocks, own, strict=True):
        lanes = block.lanes if block.constant else _call_of(block, module, x).rows(block, module, x)
        if any(lane.axis for lane in lanes):
            raise SmidgenError(
                "Heads of their own for the tokens of a packed batch are not known; run them one adapter at a time."
            )
        each = [lane.index.repeat_interleave(lane.length).tolist() for lane in lanes]
        each = [rows[:1] * n if len(rows) != n else rows for rows in each]
        whose.append([[(tensors, row) for row in some if row in tensors] for some in zip(*each, strict=True)])
    groups: dict[tuple[int, int] | None, list[int]] = {}
    by_key: dict[tuple[int, int] | None, Tensors] = {None: {}}
    for place, some in enumerate(zip(*whose, strict=True)):
        found = [entry for entries in some for entry in entries]
        if len(found) > 1:
            raise SmidgenError(f"Row {place} has {len(found)} adapters that each bring a head; heads do not add.")
        key = (id(found[0][0]), found[0][1]) if found else None
        by_key[key] = found[0][0][found[0][1]] if found else {}
        groups.setdefault(key, []).append(place)
    run = lambda key, part: torch.func.functional_call(wrapper.original_module, dict(by_key[key]), (part,))  # noqa: E731
    if len(groups) == 1:
        return run(next(iter(groups)), x)
    parts = [run(key, x[places]) for key, places in groups.items()]
    order = torch.tensor([place for places in groups.values() for place in places], device=x.device)
    return torch.cat(parts)[order.argsort()]


# ---- what is known of a layer ------------------------------------------------------------------------------------------


@dataclass
class Known:
    """Which rules a layer's input obeyed in every test so far, or why there is none."""

    kinds: frozenset[str] = frozenset((REPEATED, COPIES, SECOND))
    why: str = ""


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_TESTED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], WeakSet[nn.Module]]] = WeakKeyDictionary()
_LOCK = threading.RLock()


def _known(layer: nn.Module, outermost: nn.Module) -> Known:
    if layer is outermost:  # called by itself: its batch is the call's
        return Known()
    return _KNOWN.get(layer, Known(frozenset(), "it was not called when the model was tested with such inputs"))


def _ways(known: Known, x: Tensor, batch: int, packed: bool) -> set[tuple[str, int]]:
    """(rule, times) by which ``batch`` rows fill the input of a layer; one rule by two names counts once."""
    ways: set[tuple[str, int]] = set()
    if packed:
        if SECOND in known.kinds and x.dim() == 3 and x.shape[:2] == (1, batch):
            ways.add((SECOND, 1))
        if REPEATED in known.kinds and len(x) == batch:
            ways.add((REPEATED, 1))
        return ways
    if len(x) % batch == 0 and len(x):
        ways |= {(kind, len(x) // batch) for kind in (REPEATED, COPIES) if kind in known.kinds}
        if len(x) == batch and ways:
            ways = {(REPEATED, 1)}
    if SECOND in known.kinds and x.dim() == 3 and x.shape[1] == batch:
        ways.add((SECOND, 1))
    return ways


def _no_rule(name: str, known: Known, x: Tensor, batch: int, ways: set[tuple[str, int]]) -> str:
    found = f"two rules fit ({' and '.join(sorted(kind for kind, _ in ways))})" if ways else known.why or "no rule fits"
    return (
        f"Which rows of the input {list(x.shape)} of {name!r} belong to which of the {batch} rows of the call is not known: "
        f"{found}. Give all rows of a call the same adapter, or take adapters that do not target this layer."
    )


def _learn(call: Call, block: Block, batch: int, packed: bool) -> None:
    """Tests the module of a call with inputs of this form, once for the layers of a block."""
    module, main = call.module, call.main
    assert main is not None
    shape = (packed, batch > 1, main.dim(), *(size > 1 for size in main.shape[1:]))
    named = [*(("", value) for value in call.args), *sorted(call.kwargs.items(), key=lambda item: item[0])]
    own = [(name, value) for name, value in vars(module).items() if isinstance(value, bool) and name != "training"]
    key = (*shape, *own, *(_form(name, value, batch, call.lists) for name, value in named))
    if (module, key) in block.tested or isinstance(module, ShiftLayer):
        return
    with _LOCK:
        seen = _TESTED.setdefault(module, {}).setdefault(key, WeakSet())
        if not block.names.keys() <= set(seen):
            for layer, known in _test(call, batch, packed).items():
                before = _KNOWN.get(layer, Known())
                both = before.kinds & known.kinds
                _KNOWN[layer] = Known(both, before.why or known.why if not both else "")
            seen.update(block.names)
            block.made.clear()
        block.tested.add((module, key))


def _form(name: str, value: Any, batch: int, lists: bool) -> tuple[Any, ...]:
    """What of an input may decide how a model lays its rows: a setting's value, or that rows are masked or as long differently."""
    if lists and _is_list(value):
        return name, len({one.shape for one in value}) > 1
    if isinstance(value, bool | str) or (value is None and not any(word in name for word in _ABOUT)):
        return name, value
    if isinstance(value, int):  # of frames, not of tokens or time
        return name, value if name and 0 <= value <= 64 and not any(word in name for word in _TIMES) else None
    if _is_of_rows(value, batch):
        return name, any(one != value[0] for one in value)
    masks = isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch
    masks = masks and ("mask" in name if name else value.dim() == 2 and _two_values(value))
    return name, masks and not bool((value == value[:1]).all())


class Probe:
    """Prints of the inputs of adapted layers and heads in one pass of the base model, in the order of the calls."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.prints: dict[nn.Module, list[Tensor]] = {}
        self.routed: set[nn.Module] = set()
        self.chosen: list[tuple[nn.Module | None, int]] = []  # (module that picked values by their content, how many)

    def record(self, layer: nn.Module, x: Tensor) -> None:
        """Keeps [first axis, second axis, 16] of an input: sums over the rest with weights that tell places apart."""
        x = x.detach().float()
        flat = x.flatten(2) if x.dim() > 2 else x.reshape(len(x), 1, -1) if x.numel() else x.new_empty(len(x), 1, 0)
        place, wave = torch.arange(flat.shape[-1], device=x.device)[:, None], torch.arange(16, device=x.device)
        weights = torch.cos(place * (1.7 + 0.37 * wave) + wave)
        self.prints.setdefault(layer, []).append((flat @ weights).nan_to_num())
        lengths = {len(flat), len(flat) * flat.shape[1]}
        if any(owner in self.stack and length in lengths for owner, length in self.chosen):
            self.routed.add(layer)


class _Choices(TorchDispatchMode):
    """Notes operations whose number of results depends on values: tokens that a router picks for an expert."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        masked = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if masked or name in ("nonzero", "masked_select"):
            self.probe.chosen.append((self.probe.stack[-1] if self.probe.stack else None, len(out)))
        return out


def _test(call: Call, batch: int, packed: bool) -> dict[nn.Module, Known]:
    """Runs the base model on the call's inputs, with the first row changed, the last one, and all."""
    given = call.args, call.kwargs
    try:
        change = partial(_changed, given, batch, packed, call.lists)
        plain = _pass(call.module, change(None), choices=True)
        try:
            others = [_pass(call.module, change(rows)) for rows in (0, batch - 1, slice(None))]
        except IndexError:  # a number that is looked up in a table may have no other value
            others = [_pass(call.module, change(rows, call.main)) for rows in (0, batch - 1, slice(None))]
    except Exception as error:
        raise SmidgenError(
            "Which rows of the batch a layer sees is found by running the base model with a row changed, and that "
            f"failed ({type(error).__name__}: {error}). Give all rows of a call the same adapter."
        ) from error
    turned = Probe()
    # A model may want its rows in an order, as packed sequences do, or keep a cache of its own: then this shows nothing.
    with suppress(Exception):
        reverse = None if packed or batch == 1 else _reversed(given, batch, call.lists)
        turned = turned if reverse is None else _pass(call.module, reverse)
    layers = plain.prints.keys() | others[2].prints.keys()
    return {layer: _judged(layer, plain, others, turned, batch, packed) for layer in layers}


def _pass(module: nn.Module, inputs: tuple[Any, Any], choices: bool = False) -> Probe:
    """The prints of one pass of the base model."""
    probe = Probe()
    token = _PROBE.set(probe)
    try:
        watch = _Choices(probe) if choices else nullcontext()
        with _quiet(module), torch.no_grad(), torch.random.fork_rng(_devices(module)), watch:
            module(*inputs[0], **inputs[1])
    finally:
        _PROBE.reset(token)
    return probe


def _judged(layer: nn.Module, plain: Probe, others: Sequence[Probe], turned: Probe, batch: int, packed: bool) -> Known:
    routed = Known(frozenset(), "what reaches it is picked by its content, as a router picks tokens for an expert")
    shapes = [[tuple(print.shape) for print in probe.prints.get(layer, [])] for probe in (plain, *others)]
    if layer in plain.routed or any(own != shapes[0] for own in shapes):
        return routed
    kinds = Known().kinds
    for number, print in enumerate(plain.prints[layer]):
        first, last = ((probe.prints[layer][number] - print).abs().amax(-1) for probe in others[:2])
        kinds &= _obeyed(print, first, last, batch, packed)
        if len(turned.prints.get(layer, [])) == len(shapes[0]):
            kinds = frozenset(kind for kind in kinds if _follows(print, turned.prints[layer][number], kind, batch))
    return Known(kinds, "" if kinds else "its rows do not change with those of the call in a way that is known")


def _obeyed(print: Tensor, first: Tensor, last: Tensor, batch: int, packed: bool) -> frozenset[str]:
    """The rules that an input obeys, by what changed in it [first axis, second axis] with the first and the last row."""
    n, m, _ = print.shape
    if packed:  # what a token changes may reach its neighbours by attention, but itself it changes most
        kinds = [(REPEATED, n == batch, first.amax(1), last.amax(1)), (SECOND, (n, m) == (1, batch), first[0], last[0])]
        found = [
            k for k, fits, a, b in kinds if fits and a.any() and (int(a.argmax()), int(b.argmax())) == (0, batch - 1)
        ]
        return frozenset(found)
    if not first.any() and not last.any():
        same = n == batch and bool((print == print[:1]).all())  # one value for the whole batch, such as the time
        return frozenset((REPEATED, COPIES)) if same else frozenset()
    # One of the two may be masked, and change nothing.
    hits = [(change > _CHANGED * change.max(), own) for change, own in ((first, 0), (last, batch - 1))]
    found = []
    row = torch.arange(n, device=print.device)
    if n % batch == 0:
        for kind, owner in ((REPEATED, row // (n // batch)), (COPIES, row % batch)):
            if all(bool((owner[hit.any(1)] == own).all()) for hit, own in hits):
                found.append(kind)
    column = torch.arange(m, device=print.device)
    if m == batch and all(bool((column[hit.any(0)] == own).all()) for hit, own in hits):
        found.append(SECOND)
    return frozenset(found)


def _follows(print: Tensor, turned: Tensor, kind: str, batch: int) -> bool:
    """Whether an input with the call's rows in reverse is not that of other rows than a rule says: a model that sorts its rows
    has an order of its own."""
    if turned.shape != print.shape:
        return True
    rows = [_by_row(value, kind, batch) for value in (print, turned)]
    off = torch.stack([(rows[1] - row).abs().amax(1) for row in rows[0]], 1)  # [turned, plain]
    alike = off <= _SAME * print.abs().max()
    return bool((alike.flip(1).diagonal() | ~alike.any(1)).all())


def _by_row(print: Tensor, kind: str, batch: int) -> Tensor:
    """[rows of the call, ...] of a print [first axis, second axis, 16] by a rule."""
    if kind == SECOND:
        return print.transpose(0, 1).flatten(1)
    if kind == COPIES:
        return print.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1)
    return print.unflatten(0, (batch, -1)).flatten(1)


# ---- inputs ------------------------------------------------------------------------------------------------------------


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _main_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, bool, bool]:
    """(the tensor whose first axis is the batch: the model's main input by its own word, or the first one with two axes; whether
    lists hold a tensor for each row, as Z-Image takes its latents and prompts; whether the main input is one of a list at all).

    A list is one of rows where another input is as long; else it may hold levels of a pyramid.
    """
    named = kwargs.get(getattr(module, "main_input_name", ""))
    if isinstance(named, Tensor):
        return named, False, False
    ordered, values = _tensors((args, kwargs)), [*args, *kwargs.values()]
    main = next((t for t in ordered if t.dim() > 1), ordered[0] if ordered and ordered[0].dim() else None)
    holder = next((value for value in values if _is_list(value) and any(main is one for one in value)), None)
    if holder is None:
        return main, False, False
    others = [v for v in values if v is not holder and (_is_list(v) or (isinstance(v, Tensor) and v.dim()))]
    if any(len(other) == len(holder) for other in others):
        return _padded(holder), True, True
    return main, False, True


def _is_list(value: Any) -> bool:
    """Whether a value is a list of tensors."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Tensor) and one.dim() for one in value)


def _padded(rows: list[Tensor]) -> Tensor:
    """[rows, numbers] of a list of tensors; what is shorter ends in zeros."""
    return nn.utils.rnn.pad_sequence([row.detach().flatten() for row in rows], batch_first=True)


def _alike(t: Tensor, copies: int) -> bool:
    """Whether the first axis holds that many equal parts."""
    parts = t.unflatten(0, (copies, -1))
    return bool((parts == parts[:1]).all())


def _two_values(t: Tensor) -> bool:
    return t.dtype == torch.bool or bool(((t == t.min()) | (t == t.max())).all())


def _generation() -> tuple[int, int] | None:
    """(rows that a text model's innermost ``generate`` was given, how often it repeats each for its beams and return sequences);
    None outside one. It hands on neither, so they are looked up where it keeps them."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and {"generation_config", "batch_size"} <= set(code.co_varnames):
            known = frame.f_locals
            given, settings = known.get("batch_size"), known.get("generation_config")
            if isinstance(given, int) and given > 0 and hasattr(settings, "num_beams"):
                return given, max(settings.num_beams or 1, settings.num_return_sequences or 1)
        frame = frame.f_back
    return None


def _changed(
    inputs: Any, batch: int, packed: bool, lists: bool, rows: int | slice | None, only: Tensor | None = None
) -> Any:
    """Inputs with some rows changed, as far as they have rows; of whole numbers those of the input ``only``, where it is given. Caches
    are copied, so that a test leaves none behind."""
    generator = torch.Generator().manual_seed(0)
    chosen = range(batch)[rows] if isinstance(rows, slice) else [rows]

    def change(leaf: Any, about: bool = False) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf) if _is_cache(leaf) else leaf
        axis = 1 if packed and leaf.dim() > 1 else 0
        if only is not None and leaf is not only and not leaf.is_floating_point():
            return leaf
        if rows is None or about or leaf.dtype == torch.bool or leaf.dim() <= axis or leaf.shape[axis] != batch:
            return leaf
        new = leaf.detach().clone()
        moved(new[(slice(None), rows)] if axis else new[rows])
        return new

    def moved(part: Tensor) -> Tensor:
        """The same tensor, its numbers others."""
        if part.is_floating_point():
            size = float(part.float().std()) if part.numel() > 1 else 0.0
            part += ((size or 1.0) * torch.randn(part.shape, generator=generator)).to(part)
        else:
            part.copy_(torch.where(part > 0, part - 1, torch.where(part == 0, 1, part)))
        return part

    def given(value: Any, about: bool = False) -> Any:
        if lists and _is_list(value):
            rowed = rows is not None and not about and len(value) == batch
            return [moved(one.detach().clone()) if rowed and at in chosen else one for at, one in enumerate(value)]
        return tree_map(partial(change, about=about), value)

    args, kwargs = inputs
    about = {name: any(word in name for word in _ABOUT) for name in kwargs}
    return tuple(map(given, args)), {name: given(value, about[name]) for name, value in kwargs.items()}


def _reversed(inputs: Any, batch: int, lists: bool) -> Any:
    """Inputs with their rows in reverse; None where something cannot be turned: a filled cache, or rows folded into an axis."""
    args, kwargs = inputs
    held = [value for value in (*args, *kwargs.values()) if not (lists and _is_list(value))]
    leaves = tree_leaves(held)
    if any(isinstance(t, Tensor) and t.dim() and len(t) > batch and len(t) % batch == 0 for t in leaves):
        return None
    if any(_is_cache(leaf) and leaf.get_seq_length() for leaf in leaves):
        return None

    def turn(leaf: Any, name: str = "") -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf) if _is_cache(leaf) else leaf
        shared = leaf.dim() == 1 and any(word in name for word in _ABOUT)  # places of tokens, the same for all rows
        return leaf.flip(0) if leaf.dim() and len(leaf) == batch and not shared else leaf

    def turned(value: Any, name: str = "") -> Any:
        if lists and _is_list(value):
            return value[::-1] if len(value) == batch else value
        value = value[::-1] if _is_of_rows(value, batch) else value
        return tree_map(partial(turn, name=name), value)

    return tuple(map(turned, args)), {name: turned(value, name) for name, value in kwargs.items()}


def _is_of_rows(value: Any, batch: int) -> bool:
    """Whether a value is a list of a number or word for each row, as lengths are given; a tuple is a size."""
    return isinstance(value, list) and len(value) == batch and all(isinstance(one, int | float | str) for one in value)


def _is_cache(leaf: Any) -> bool:
    return any(c.__name__.endswith("Cache") for c in type(leaf).__mro__)


def _devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Within, a module is in evaluation; a module that is already is not touched, so that other threads may use it."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True
