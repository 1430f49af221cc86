"""The bank: thousands of adapters in one batch, training side by side, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.rows import LowRankShift
from smidgen.difflora.weightspace.layout import layout_of
from smidgen.errors import SmidgenError

from .helpers import Net, inputs, trained


def zoo(method: str, names: list[str]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], smidgen.Bank]:
    """A model with a bank of adapters, and each adapter's own output."""
    carrier = smidgen.adapt(Net(), method, target_modules=["q_proj", "v_proj"])
    bank = smidgen.Bank(carrier, carrier.peft_config["default"], names)
    outputs = {}
    for seed, name in enumerate(names):
        one = trained(method, seed=seed)
        outputs[name] = one(inputs()).detach()
        bank.put(name, one)
    return carrier, outputs, bank


@pytest.mark.parametrize("method", ["tlora(2,2)", "tlora_star", "svfit", "loldu", "lora", "oft"])
def test_a_bank_filled_from_other_models(method: str) -> None:
    model, outputs, bank = zoo(method, ["a", "b", "c"])
    rows = ["c", None, "a", "a"]
    with bank.rows(rows):
        found = model(inputs())
    plain = Net()(inputs())
    for i, name in enumerate(rows):
        testing.close(found[i], plain[i] if name is None else outputs[name][i], f"row {i}, {name}")
    testing.same(model(inputs()).detach(), plain.detach(), "outside of the block")


@pytest.mark.parametrize(
    "method",
    ["tlora(2,2)", "tlora_star", "svfit", "loldu", "lora", "oft", "seeded", "diagonal", "ia3", "dora", "oft_out"],
)
def test_a_member_that_changes_nothing_is_told(method: str) -> None:
    model = smidgen.adapt(Net(), method, target_modules=["q_proj", "v_proj"])
    bank = smidgen.Bank(model, model.peft_config["default"])
    bank.put("idle", model)
    bank.put("own", trained(method, seed=1))
    bank.check("own")
    with pytest.raises(SmidgenError, match="Every delta is zero"):
        bank.check("idle")


def test_a_batch_of_several_halves_repeats_the_names() -> None:
    model, outputs, bank = zoo("svfit", ["a", "b"])
    x = inputs(rows=2)
    with bank.rows(["b", "a"], copies=True):
        found = model(torch.cat([x, x]))
    wanted = torch.stack([outputs["b"][0], outputs["a"][1]])
    testing.close(found, torch.cat([wanted, wanted]), "two halves")
    with bank.rows(["a", "b", "a"]), pytest.raises(SmidgenError, match="do not divide a batch of 4"):
        model(inputs(rows=4))


@pytest.mark.parametrize("method", ["lora", "svfit", "tlora(2,2)"])
@pytest.mark.parametrize(
    "rows", [["b", "b", "a", "a"], ["a", "b"], ["b"], ["a", "a", None, None], [None, None, None, "b"]]
)
def test_runs_of_rows_through_one_adapter(method: str, rows: list[str | None]) -> None:
    model, _, bank = zoo(method, ["a", "b"])
    alone = {None: Net()} | {n: trained(method, seed=i, net=Net()) for i, n in enumerate(("a", "b"))}
    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(4), requires_grad=True)  # with an axis of tokens
    with bank.rows(rows, copies=True):
        found = model(x)
    wanted = torch.cat([alone[name](x[i : i + 1]) for i, name in enumerate(rows * (8 // len(rows)))])
    testing.close(found, wanted.detach(), "output")
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted))
    testing.close(ours, theirs, "gradient of the input", factor=5)


@pytest.mark.parametrize("r", [1, 3])
def test_gradients_of_the_low_rank_shift(r: int) -> None:
    shapes = (4, 3, 5), (4, 3, 6), (2, 5, r), (2, r, 6)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(LowRankShift.apply, tensors)


@pytest.mark.parametrize("method", ["lora", "svfit", "oft"])
def test_a_bank_in_mixed_precision(method: str) -> None:
    model, _, bank = zoo(method, ["a", "b"])
    with bank.rows(["b", "a", "a", None]):
        wanted = model(inputs()).detach()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(inputs())
        found.float().square().sum().backward()
    testing.close(found.float(), wanted, "in bf16", torch.bfloat16)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bank.parameters())


@torch.no_grad()
def test_an_open_block_keeps_its_adapters_whatever_the_bank_is_asked_for() -> None:
    model, outputs, bank = zoo("lora", ["a", "b", "c"])
    x = inputs()
    bank.evict("a")  # a free place below those in use
    with bank.rows(["b", "c", "b", None]):
        before = model(x)
        for name in ("b", "c"):
            with pytest.raises(SmidgenError, match=f"Member '{name}' is used by an open block"):
                bank.evict(name)
        with pytest.raises(SmidgenError, match="cannot get smaller"):
            bank.resize(2)
        bank.put("d", trained("lora", seed=9))
        bank.put("e", trained("lora", seed=10))  # no place is free: the bank grows
        testing.close(model(x), before, "after others came")
        with bank.rows(["d"]):
            pass
        bank.evict("d")
        testing.close(model(x), before, "after another went")
    testing.close(before[1], outputs["c"][1], "alone")
    bank.evict("b")
    bank.resize(2)
    with bank.rows(["c"] * 4):
        testing.close(model(x), outputs["c"], "moved together")


def test_blocks_nest_and_end_with_an_error() -> None:
    model, outputs, bank = zoo("lora", ["a", "b"])
    plain = Net()(inputs()).detach()
    with bank.rows(["a"]):
        with bank.rows(["b"]):
            testing.close(model(inputs()), outputs["b"], "inner block")
        testing.close(model(inputs()), outputs["a"], "outer block")
        with smidgen.disabled(model):
            testing.same(model(inputs()).detach(), plain, "disabled within a block")
    with pytest.raises(RuntimeError, match="stop"), bank.rows(["a"]):
        raise RuntimeError("stop")
    testing.same(model(inputs()).detach(), plain, "after an error")


def test_training_two_adapters_in_one_batch_is_training_each_alone() -> None:
    def targets(seed: int) -> torch.Tensor:
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))

    alone = {}
    for i, name in enumerate(("a", "b")):
        net = smidgen.adapt(Net(), "svfit", r=4, target_modules=["q_proj"])
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            (net(inputs()) - targets(i)).square().sum(-1).mean().backward()
            optimizer.step()
        alone[name] = {t: la.smidgen_slots["default"].trained() for t, la in adapted_layers(net).items()}
    net = smidgen.adapt(Net(), "svfit", r=4, target_modules=["q_proj"])
    bank = smidgen.Bank(net, net.peft_config["default"], ["a", "b"])
    bank.start()
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        with bank.rows(["a"] * 4 + ["b"] * 4):
            y = net(torch.cat([inputs(), inputs()]))
        ((y - torch.cat([targets(0), targets(1)])).square().sum(-1).sum() / 4).backward()
        optimizer.step()
    for name, wanted in alone.items():
        for target, tensors in bank.get(name).items():
            for key, value in tensors.items():
                testing.close(value, wanted[target][key].detach(), f"{name} {target} {key}", factor=5)


def test_what_a_bank_refuses() -> None:
    model, _, bank = zoo("lora", ["ann", "bob"])
    with pytest.raises(SmidgenError, match=r"no adapter 'anne'. Did you mean 'ann'"), bank.rows(["anne"]):
        pass
    for other, reason in (
        (trained("lora", r=2), "r=2, the bank's 8"),
        (trained("lora", alpha=4.0), "scale=0.5, the bank's 1.0"),
        (trained("svfit"), "residual is 'spectral', the bank's 'low_rank'"),
        (trained("lora", target_modules=["v_proj"]), "has none there"),
        (trained("lora", target_modules=["q_proj", "v_proj", "head"]), "also on 'head'"),
    ):
        with pytest.raises(SmidgenError, match=f"does not fit the bank.*{reason}"):
            bank.put("ann", other)
    with pytest.raises(SmidgenError, match="distinct names"):
        smidgen.Bank(model, model.peft_config["default"], ["a", "a"])
    with pytest.raises(SmidgenError, match="no adapted layer"):
        smidgen.Bank(Net(), model.peft_config["default"], ["a"])


def test_frozen_tensors_of_a_bank_are_shared_by_its_adapters_or_refused() -> None:
    _, _, bank = zoo("tlora(2,2)", ["a"])
    with pytest.raises(SmidgenError, match="'transform_start0' differs"):
        bank.put("a", smidgen.adapt(Net(), "tlora(2,2)", target_modules=["q_proj", "v_proj"], seed=9))
    _, _, bank = zoo("loldu", ["a"])
    other = trained("loldu")
    pivots = other.layers[0].q_proj.smidgen_slots["default"].residual_pivots
    pivots.copy_(pivots.int().flip(0).to(pivots.dtype))
    with pytest.raises(SmidgenError, match="'residual_pivots' differs"):
        bank.put("a", other)


def test_a_refused_adapter_leaves_its_row_as_it_was() -> None:
    _, _, bank = zoo("lora", ["ann"])
    before = {t: {k: v.clone() for k, v in own.items()} for t, own in bank.get("ann").items()}
    other = trained("lora", target_modules=["q_proj"])
    with pytest.raises(SmidgenError, match="does not fit"):
        bank.put("ann", other)
    for target, own in bank.get("ann").items():
        for key, value in own.items():
            testing.same(value, before[target][key], f"{target} {key}")


def test_a_bank_does_not_reach_the_file(tmp_path: Path) -> None:
    model, _, _ = zoo("loldu", ["a", "b"])
    testing.perturb(model, 8, adapter_name="default")
    wanted = model(inputs()).detach()
    smidgen.save(model, tmp_path)
    testing.close(smidgen.load(Net(), tmp_path)(inputs()), wanted, "the adapter beside a bank")


# ---- rows that no parameter holds ------------------------------------------------------------------------------------


def held(bank: smidgen.Bank, order: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Members of a bank as tensors of their own that take gradients."""
    members = [bank.get(name) for name in order]
    return {
        target: {key: torch.stack([m[target][key] for m in members]).requires_grad_() for key in own}
        for target, own in members[0].items()
    }


@pytest.mark.parametrize("method", ["tlora(2,2)", "svfit", "lora"])
def test_held_tensors_are_rows_of_the_bank_gradients_included(method: str) -> None:
    model, outputs, bank = zoo(method, ["a", "b"])
    names, order = ["b", None, "a", "b"], ["b", "a", "b"]  # more rows than the bank has members
    with bank.rows(names):
        wanted = model(inputs())
        wanted.square().sum().backward()
    tensors = held(bank, order)
    with bank.holding(tensors, rows=[0, None, 1, 2]):
        found = model(inputs())
        found.square().sum().backward()
        with bank.rows(["a"]):
            testing.close(model(inputs()), outputs["a"], "the bank's own member within")
    testing.close(found, wanted.detach(), "outputs")
    for target, slot in bank.slots.items():
        for key, parameter in slot.trained().items():
            grad = tensors[target][key].grad
            assert grad is not None and bool(grad.any()), f"no gradient for {key} of {target}"
            testing.close(grad[0] + grad[2], parameter.grad[1], f"gradient of {key} of {target}, b", factor=5)
            testing.close(grad[1], parameter.grad[0], f"gradient of {key} of {target}, a", factor=5)
    with bank.holding(held(bank, ["a"])):
        testing.close(model(inputs()), outputs["a"], "one row by default, repeated over the batch")
    testing.same(model(inputs()).detach(), Net()(inputs()).detach(), "outside of the block")


def test_a_network_learns_through_held_rows() -> None:
    model = smidgen.adapt(Net(), "lora", r=1, target_modules=["q_proj"])
    bank = smidgen.Bank(model, model.peft_config["default"], ["any"])
    layout = layout_of(model, model.peft_config["default"])
    network = torch.nn.Linear(5, layout.size)
    with bank.holding(layout.unpack(network(torch.randn(4, 5)))):
        checkpoint(model, inputs(), use_reentrant=False).square().sum().backward()  # runs the layers again
    assert network.weight.grad is not None and bool(network.weight.grad.any(1).all())


def test_what_holding_refuses_and_that_it_ends_with_an_error() -> None:
    model, _, bank = zoo("lora", ["a", "b"])
    plain, good = Net()(inputs()).detach(), held(bank, ["a", "b"])
    first = next(iter(good))
    own = good[first]
    for tensors, reason in (
        ({k: v for k, v in good.items() if k != first}, f"no target '{first}' among"),
        (good | {"layers.0.q_prj": own}, "knows no target 'layers.0.q_prj'. Did you mean 'layers.0.q_proj'"),
        (good | {first: {"residual_a": own["residual_a"]}}, f"no tensor of '{first}' 'residual_b' among"),
        (good | {first: own | {"residual_c": own["residual_a"]}}, "knows no tensor of .* 'residual_c'"),
        (good | {first: own | {"residual_b": own["residual_b"][..., :1]}}, r"has shape .*, it should be \(2, "),
        (good | {first: {k: v[:1] for k, v in own.items()}}, "the same number everywhere"),
        ({t: {k: v[:0] for k, v in own.items()} for t, own in good.items()}, "at least one adapter"),
    ):
        with pytest.raises(SmidgenError, match=reason), bank.holding(tensors):
            pass
    for row in (2, -2):
        match = f"no row {row}: the tensors hold rows 0 to 1"
        with pytest.raises(SmidgenError, match=match), bank.holding(good, rows=[0, row]):
            pass
    with pytest.raises(RuntimeError, match="stop"), bank.holding(good):
        raise RuntimeError("stop")
    testing.same(model(inputs()).detach(), plain, "after an error")


# ---- members that come and go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tlora(2,2)", "svfit", "loldu", "lora", "oft", "seeded"])
def test_adapters_from_files(method: str, tmp_path: Path) -> None:
    outputs = {}
    for seed, name in enumerate(("a", "b")):
        one = trained(method, seed=seed)
        smidgen.save(one, tmp_path / name)
        outputs[name] = smidgen.load(Net(), tmp_path / name)(inputs()).detach()  # some methods round in a file
    carrier = smidgen.adapt(Net(), method, target_modules=["q_proj", "v_proj"])
    bank = smidgen.Bank(carrier, carrier.peft_config["default"])
    for name in ("a", "b"):
        bank.put(name, tmp_path / name)
    with bank.rows(["b", None, "a", "b"]):
        found = carrier(inputs())
    for i, name in enumerate(("b", None, "a", "b")):
        wanted = Net()(inputs()).detach() if name is None else outputs[name]
        testing.close(found[i], wanted[i], f"row {i}, {name}")


def test_files_that_do_not_fit_a_bank_leave_it_as_it_was(tmp_path: Path) -> None:
    model, outputs, bank = zoo("loldu", ["a"])
    others = {
        "rank": (trained("lora", r=2), "residual is 'low_rank', the bank's 'triangular'"),
        "base": (trained("loldu", net=Net(seed=5)), "base"),
        "less": (trained("loldu", target_modules=["q_proj"]), "does not"),
    }
    for name, (other, reason) in others.items():
        smidgen.save(other, tmp_path / name)
        with pytest.raises(SmidgenError, match=reason):
            bank.put("new", tmp_path / name)
    with pytest.raises(SmidgenError, match="nothing_here"):
        bank.put("new", tmp_path / "nothing_here")
    assert bank.names == ["a"]
    with bank.rows(["a"]):
        testing.close(model(inputs()), outputs["a"], "the member that was there")


def test_a_file_of_other_layers_or_half_a_head_is_refused(tmp_path: Path) -> None:
    class Equal(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))

    smidgen.save(smidgen.adapt(Equal(), "lora", target_modules=["q", "k"]), tmp_path / "qk")
    config = tmp_path / "qk" / "adapter_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {"base_lock": None, "canary": None, "checksum": None, "target_modules": ["k", "q"]}
        )
    )
    model = smidgen.adapt(Equal(), "lora", target_modules=["q", "v"])
    with pytest.raises(SmidgenError, match="does not fit the bank at 'k'"):
        smidgen.Bank(model, model.peft_config["default"]).put("a", tmp_path / "qk")
    model = headed(1)
    weights = smidgen.save(model, tmp_path / "head") / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(weights).items() if not name.endswith("bias")}
    save_file(tensors, weights)
    with pytest.raises(SmidgenError, match="SHA-256"):
        smidgen.Bank(model, model.peft_config["default"]).put("a", tmp_path / "head")


def test_a_name_that_was_never_put_is_an_error() -> None:
    model = smidgen.adapt(Net(), "lora", target_modules=["q_proj"])
    bank = smidgen.Bank(model, model.peft_config["default"], ["ann", "bob"])
    for ask in (lambda: bank.rows(["ann"]).__enter__(), lambda: bank.get("ann")):
        with pytest.raises(SmidgenError, match="'ann' was never put into the bank"):
            ask()
    bank.put("bob", model)
    bank.start(["ann"])
    with bank.rows(["ann", "bob"] * 2):
        testing.same(model(inputs()).detach(), Net()(inputs()).detach(), "at the start")


def test_members_come_and_go() -> None:
    model, _, bank = zoo("svfit", ["a", "b", "c"])
    one = {name: trained("svfit", seed=seed) for seed, name in enumerate("abcdef")}
    wanted = {name: net(inputs()).detach() for name, net in one.items()}
    bank.evict("b")
    assert bank.names == ["a", "c"] and bank.size == 3
    with pytest.raises(SmidgenError, match="no adapter 'b'"):
        bank.index("b")
    bank.put("d", one["d"])  # b's place
    assert bank.size == 3
    for name in "ef":
        bank.put(name, one[name])  # the bank grows
    assert set(bank.names) == set("acdef") and bank.size >= 5
    for size in (9, 5):
        bank.resize(size)
        for name in bank.names:
            with bank.rows([name, None, None, "a"]):
                testing.close(model(inputs())[0], wanted[name][0], f"{name} in a bank of {size}")
    with pytest.raises(SmidgenError, match="holds 5 members; size=4"):
        bank.resize(4)
    assert {p.shape[0] for p in bank.parameters()} == {5}


def test_a_bank_that_is_removed_or_forgotten_leaves_the_model() -> None:
    model, _, bank = zoo("lora", ["a"])
    layers, hooks = list(bank.layers.values()), len(model._forward_pre_hooks)
    assert hooks == 1 and all(layer.banks for layer in layers)
    bank.remove()
    assert not any(layer.banks for layer in layers) and not model._forward_pre_hooks and not model._forward_hooks
    with pytest.raises(SmidgenError, match="was removed"), bank.rows(["a"]):
        pass
    other = smidgen.Bank(model, model.peft_config["default"], ["a"])
    assert all(list(layer.banks) == ["bank"] for layer in layers)
    del other
    assert not any(layer.banks for layer in layers)


def test_a_bank_moves_with_its_model() -> None:
    model, outputs, bank = zoo("svfit", ["a", "b"])
    model.double()
    assert {p.dtype for p in bank.parameters()} == {torch.float64}
    with bank.rows(["b", "a", "b", "a"]):
        found = model(inputs().double())
    testing.close(found[1].float(), outputs["a"][1], "in double")


# ---- heads ---------------------------------------------------------------------------------------------------------------


def headed(seed: int) -> torch.nn.Module:
    net = smidgen.adapt(Net(), "svfit", target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    testing.perturb(net, seed)
    with torch.no_grad():
        for p in net.head.modules_to_save["default"].parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return net


@pytest.mark.parametrize("from_file", [False, True])
def test_each_row_has_its_own_head(from_file: bool, tmp_path: Path) -> None:
    model = headed(9)
    bank = smidgen.Bank(model, model.peft_config["default"])
    wanted = {None: Net()(inputs()).detach()}
    for seed, name in enumerate(("a", "b")):
        one = headed(seed)
        wanted[name] = one(inputs()).detach()
        bank.put(name, smidgen.save(one, tmp_path / name) if from_file else one)
    own = model(inputs()).detach()
    for rows in (["b", None, "a", "b"], ["a"], [None], [("a",), (), "b", None]):
        with bank.rows(rows):
            found = model(inputs())
        for i in range(4):
            name = rows[i % len(rows)]
            name = name[0] if isinstance(name, tuple) and name else name or None
            testing.close(found[i], wanted[name][i], f"row {i}, {name!r}")
    with bank.rows([("a", "b"), None, None, None]), pytest.raises(SmidgenError, match="heads do not add"):
        model(inputs())
    testing.same(model(inputs()).detach(), own, "the model's own head outside")
    assert set(bank.get("a")["head"]) == {"weight", "bias"}
    plain = smidgen.adapt(Net(), "svfit", target_modules=["q_proj", "v_proj"])
    with pytest.raises(SmidgenError, match="brings a head 'head'"):
        smidgen.Bank(plain, plain.peft_config["default"]).put("a", one)
