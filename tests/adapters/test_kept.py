"""What an open block of a bank keeps between calls: the same answers as a block that was just opened, whatever changes meanwhile."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import smidgen
from smidgen import testing
from smidgen.adapters.tuner import calls
from smidgen.adapters.tuner.kept import Kept
from smidgen.adapters.tuner.layer import ShiftLayer

from .helpers import Net, inputs, trained
from .test_bank import zoo

ROWS = [["a"] * 4, ["a"], ["a", "b", "c", "a"], ["b", "c", None, None], [("a", "b"), "c", None, "a"]]
METHODS = ["svfit", "lora", "loldu", "dora", "tlora_star", "oft", "ia3", "tlora(2,2)"]
each_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", ["svfit", "lora", "tlora_star"])
each_rows = pytest.mark.parametrize("rows", ROWS, ids=str)
LONG = 6  # calls of four rows after which W + D of the little layers is made


def frozen(method: str) -> tuple[nn.Module, smidgen.Bank]:
    model, _, bank = zoo(method, ["a", "b", "c"])
    return model.requires_grad_(False), bank


@contextmanager
def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[str]]:
    """Within, each call of a function is noted."""
    seen: list[str] = []
    right = getattr(owner, name)
    with patch.context() as inner:
        inner.setattr(owner, name, lambda *a, **k: (seen.append(name), right(*a, **k))[1])
        yield seen


def check(model: nn.Module, bank: smidgen.Bank, rows: Any, what: str, x: Tensor | None = None) -> Tensor:
    """What the open block gives is what a block gives that was just opened."""
    x = inputs() if x is None else x
    found = [model(x) for _ in range(LONG)]
    with bank.rows(rows):
        fresh = model(x)
    for one in found:
        testing.close(one, fresh, what)
    return fresh


@each_method
@each_rows
@torch.no_grad()
def test_steps_after_the_first_make_nothing_again(method: str, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = frozen(method)
    with bank.rows(rows):
        with counted(monkeypatch, calls, "_terms") as made:
            first = model(inputs())
            assert len(made) == len(bank.layers)
            for _ in range(LONG):
                testing.close(model(inputs()), first, "a later call")
        again = len(made) - len(bank.layers)
        assert again == (LONG * len(bank.layers) if method == "dora" else 0)  # its norms follow the base weight
        check(model, bank, rows, "the same")


def _other_adapters(bank: smidgen.Bank, method: str) -> None:
    for place, name in enumerate("abc"):
        bank.put(name, trained(method, seed=7 + place))


def _strengths(bank: smidgen.Bank, method: str) -> None:
    for place, name in enumerate("abc"):
        source = trained(method, seed=place)
        smidgen.set_strength(source, {"default": 0.5})
        bank.put(name, source)


Change = Callable[[smidgen.Bank, str], object]


def _each(change: Callable[[Any, Any], object]) -> Change:
    """A change at each layer and its slot."""
    return lambda bank, method: [change(layer, bank.slots[name]) for name, layer in bank.layers.items()]


def _other_base_layer(layer: Any, slot: Any) -> None:
    other = nn.Linear(layer.base_layer.in_features, layer.base_layer.out_features)
    other.load_state_dict(layer.base_layer.state_dict())
    other.weight.add_(0.1)
    layer.base_layer = other.requires_grad_(False)


def _other_weight(layer: Any, slot: Any) -> None:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight + 0.1, requires_grad=False)


def _loaded(layer: Any, slot: Any) -> None:
    slot.load_state_dict({k: v * 0.5 if k in slot.trained() else v for k, v in slot.state_dict().items()})


def _replaced(layer: Any, slot: Any) -> None:
    for name, value in slot.trained().items():
        setattr(slot, name, nn.Parameter(value * 0.5, requires_grad=False))


def _factors(layer: Any, slot: Any) -> None:
    for name, value in list(slot._buffers.items()):
        setattr(slot, name, value * 0.5)
    for name in slot.trained():
        getattr(slot, name).mul_(0.5)


def _in_inference_mode(layer: Any, slot: Any) -> None:
    with torch.inference_mode():
        for value in slot.trained().values():
            value.mul_(0.5)


def _resized(bank: smidgen.Bank, method: str) -> None:
    bank.resize(9)
    bank.put("a", trained(method, seed=8))
    bank.put("b", trained(method, seed=9))


CHANGES: dict[str, Change] = {
    "other adapters under the same names": _other_adapters,
    "other strengths": _strengths,
    "a larger bank": _resized,
    "parameters in place": lambda bank, method: [p.mul_(0.5) for p in bank.parameters()],
    "parameters in place, in inference mode": _each(_in_inference_mode),
    "parameters replaced": _each(_replaced),
    "factors replaced": _each(_factors),
    "a state dict": _each(_loaded),
    "a base weight in place": _each(lambda layer, slot: layer.base_layer.weight.add_(0.1)),
    "a base weight replaced": _each(_other_weight),
    "a base layer replaced": _each(_other_base_layer),
    "a bias in place": _each(lambda layer, slot: layer.base_layer.bias.add_(0.1)),
}


@some_methods
@each_rows
@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_what_is_kept_follows_what_it_was_made_of(method: str, rows: Any, change: str) -> None:
    model, bank = frozen(method)
    with bank.rows(rows):
        before = check(model, bank, rows, "before")
        CHANGES[change](bank, method)
        after = check(model, bank, rows, change)
    assert not torch.equal(before, after)


@some_methods
@each_rows
@torch.no_grad()
def test_modes_of_a_model_hold_for_what_is_kept(method: str, rows: Any) -> None:
    model, bank = frozen(method)
    x = inputs()
    with bank.rows(rows):
        kept = check(model, bank, rows, "before")
        with smidgen.disabled(model):
            testing.same(model(x), Net()(x), "switched off")
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(check(model, bank, rows, "autocast").float(), kept)
        model.double()
        testing.close(check(model, bank, rows, "in fp64", x.double()).float(), kept, "in fp64")
        model.float()
        testing.close(check(model, bank, rows, "in fp32 again"), kept, "in fp32 again")
        for layer in bank.layers.values():
            layer.merge()
        testing.close(check(model, bank, rows, "beside a merged adapter"), kept, "beside a merged adapter", factor=5)
        for layer in bank.layers.values():
            layer.unmerge()
        testing.close(check(model, bank, rows, "and without it"), kept, "and without it")
        with bank.rows(["c"]):
            check(model, bank, ["c"], "an inner block")
        testing.close(model(x), kept, "the outer block again")
        if len(rows) == 1:
            check(model, bank, rows, "a longer batch", torch.cat([x, x]))
        testing.close(model(x), kept, "the first batch again")


@some_methods
@each_rows
def test_gradients_flow_in_a_block_that_keeps(method: str, rows: Any) -> None:
    model, bank = frozen(method)
    with bank.rows(rows):
        with torch.no_grad():
            kept = check(model, bank, rows, "frozen")
        for parameter in bank.parameters():
            parameter.requires_grad_(True)
        testing.close(model(inputs()).detach(), kept, "with a graph")
        model(inputs()).square().sum().backward()
        assert any(bool(p.grad.any()) for p in bank.parameters())  # type: ignore[union-attr]


@some_methods
@each_rows
@pytest.mark.parametrize("begin", ["training", "frozen"])
def test_what_trains_is_not_kept(method: str, rows: Any, begin: str) -> None:
    """Fused optimisers, ours among them, write without torch's counting."""
    model, bank = frozen(method)
    for parameter in bank.parameters():
        parameter.requires_grad_(begin == "training")
    with bank.rows(rows):
        with torch.no_grad():
            before = check(model, bank, rows, "before")
        for parameter in bank.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, fused=True)
        model(inputs()).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(check(model, bank, rows, "after a step"), before)


@torch.no_grad()
def test_a_base_that_trains_goes_into_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = frozen("lora")
    for layer in bank.layers.values():
        layer.base_layer.requires_grad_(True)
    with bank.rows(["a"] * 4), counted(monkeypatch, ShiftLayer, "summed") as summed:
        check(model, bank, ["a"] * 4, "a base that trains")
    assert not summed


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("method", ["lora", "svfit", "loldu"])
@torch.no_grad()
def test_one_adapter_for_the_whole_batch_goes_into_the_weight(
    method: str, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = frozen(method)
    if room is not None:
        monkeypatch.setattr(calls.Block, "__init__", partialmethod(calls.Block.__init__, kept=Kept(room)))
    with bank.rows(["a"] * 4):
        check(model, bank, ["a"] * 4, "alone")
        with counted(monkeypatch, ShiftLayer, "_with_residual") as through:
            model(inputs())
    assert len(through) == (len(bank.layers) if room == 0 else 0)


@torch.no_grad()
def test_what_a_block_keeps_stays_within_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = frozen("lora")
    size = (
        4 * 4 * sum(p[0].numel() for p in next(iter(bank.slots.values())).parameters())
    )  # four rows of a layer in fp32
    for layers in (0, 1, 3):
        kept = Kept(layers * size + size // 2)
        with monkeypatch.context() as patch, bank.rows(["b", "a", "c", "a"]):
            patch.setattr(calls._OPEN.get()[0], "kept", kept)
            for _ in range(3):
                check(model, bank, ["b", "a", "c", "a"], f"room for {layers} layers")
                assert (len(kept._entries), kept.room) == (layers, size // 2)
                for parameter in bank.parameters():
                    parameter.mul_(0.9)


@pytest.mark.parametrize("method", ["lora", "svfit"])
@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_hooks_of_a_base_layer_are_called_for_as_long_as_they_are_there(method: str, everywhere: bool) -> None:
    model, bank = frozen(method)
    bases = [layer.base_layer for layer in bank.layers.values()]
    heard: list[nn.Module] = []

    def hear(module: nn.Module, *_: Any) -> None:
        if module in bases:
            heard.append(module)

    def listen() -> list[Any]:
        if everywhere:
            return [torch_module.register_module_forward_pre_hook(hear)]
        return [base.register_forward_hook(hear) for base in bases]

    with bank.rows(["a"] * 4):
        for _ in range(2):
            check(model, bank, ["a"] * 4, "without hooks")
            handles = listen()
            heard.clear()
            model(inputs())
            assert heard == bases
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("method", ["lora", "svfit"])
@torch.no_grad()
def test_what_records_or_transforms_a_call_leaves_nothing_behind(method: str) -> None:
    model, bank = frozen(method)
    x, rows = inputs(), ["a"] * 4
    own = {name: torch.stack([p, p * 0.5]) for name, p in model.named_parameters() if ".banks." in name}

    def each(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, own, (x,))

    with bank.rows(rows):
        both = torch.vmap(each)(own)
        kept = check(model, bank, rows, "afterwards")
        testing.close(both[0], kept, "vmap")
        assert not torch.equal(both[0], both[1])
        testing.close(torch.vmap(each)(own)[1], both[1], "vmap again")
        traced = torch.jit.trace(model, x)
        testing.close(check(model, bank, rows, "after a trace"), kept, "after a trace")
        testing.close(traced(x), kept, "what was traced")
        for parameter in bank.parameters():
            parameter.mul_(0.5)
        testing.close(traced(x), both[1], "what was traced reads the bank's parameters")


@each_rows
@torch.no_grad()
def test_threads_that_share_a_block(rows: Any) -> None:
    model, bank = frozen("lora")
    alone = {}
    for times in (1, 0.5):
        with bank.rows(rows):
            alone[times] = model(inputs())
        for parameter in bank.parameters():
            parameter.mul_(0.5)
    for parameter in bank.parameters():
        parameter.mul_(4)
    with bank.rows(rows), ThreadPoolExecutor(4) as pool:
        for times in (1, 0.5):
            contexts = [contextvars.copy_context() for _ in range(60)]
            ran = [pool.submit(context.run, torch.no_grad()(model), inputs()) for context in contexts]
            for one in ran:
                testing.close(one.result(), alone[times], f"numbers times {times}")
            for parameter in bank.parameters():
                parameter.mul_(0.5)
