"""The laws, one function each: ``law_NAME(config, kind)`` raises ``AssertionError`` with what it found.

Laws that compare two ways of computing the same run in float64, where the table of tolerances leaves no room for a
wrong formula; those that promise bits compare bits.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import smidgen
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer, adapted_layer
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.experts import is_stack
from smidgen.errors import BaseLockError, SmidgenError
from smidgen.testing.samples import (
    adapted,
    base,
    close,
    differs,
    perturb,
    same,
    snapshot,
    target_of,
    targeted,
    unchanged,
)

Law = Callable[[SmidgenConfig, str], None]
WEIGHTS = "adapter_model.safetensors"
RECAST = 0.05  # relative error of an update on the same base rounded to bfloat16


def _layer(model: nn.Module) -> AdaptedLayer:
    return adapted_layers(model)["layer"]


@torch.no_grad()
def _off(model: nn.Module, x: Tensor) -> Tensor:
    """The base model's output, from a copy that carries no adapter."""
    return _with(model, _layer(model).base_layer)(x)


def _with(model: nn.Module, layer: nn.Module) -> nn.Module:
    """A copy of a model with a layer in the target's place."""
    bare = copy.deepcopy(model)
    bare.layer = copy.deepcopy(layer)
    return bare


def _out(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives: for an input, or to those who own its weight."""
    return layer() if is_stack(layer) else layer(x)


def law_identity(config: SmidgenConfig, kind: str) -> None:
    """At the start the adapted model equals the base model, bit for bit, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = base(kind, dtype)
        model.requires_grad_(False)  # torch takes other paths for a layer that trains
        strided = x.movedim(1, -1).contiguous().movedim(-1, 1)  # same numbers, another order in memory
        strided = x if kind == "conv1d" else strided  # which cannot take any other
        wanted = model(x), model(strided)
        smidgen.adapt(model, targeted(config))
        same(model(x), wanted[0], f"output at the start in {dtype}")
        same(model(strided), wanted[1], f"output at the start for a strided input in {dtype}")


def _forms(x: Tensor) -> dict[str, Tensor]:
    """A layer's input in the other forms that torch's layers take."""
    if x.dim() == 4:  # pictures
        return {
            "one picture": x[0],
            "no pictures": x[:0],
            "channels last": x.to(memory_format=torch.channels_last),
            "one picture, channels last": x.movedim(-3, -1).contiguous().movedim(-1, -3)[0],
            "a slice": torch.cat([x, x], -1)[..., : x.shape[-1]],
        }
    rows = x.flatten(0, -2)
    return {
        "one vector": rows[0],
        "rows": rows,
        "no rows": x[:0],
        "rows of no tokens": rows[None, :0].expand(3, 0, -1),
        "three axes": rows[None],
        "four axes": rows[None, None],
        "one row repeated": rows[:1].expand(3, -1),
        "columns of a wider one": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }


def law_inputs(config: SmidgenConfig, kind: str) -> None:
    """Whatever form of input the base layer takes, one vector or picture, an empty batch, more axes, channels last, the
    adapted layer takes: the base's bits at the start, the layer of weight W + delta afterwards, in the base's own layout."""
    start, x = base(kind)
    smidgen.adapt(start, targeted(config))
    model, wide = adapted(config, kind, torch.float64)
    smidgen.adapt(model, smidgen.config("tlora(2,1)", target_modules=["layer"]), adapter_name="other")
    perturb(model, 5, adapter_name="other")
    model = model.double()
    layer, forms = _layer(model), _forms(x)
    for names in (["default"], ["other", "default"]):
        smidgen.set_active(model, names)
        smidgen.set_strength(model, {"default": 0.7 if len(names) > 1 else 1.0})
        bare = copy.deepcopy(layer.base_layer)
        with torch.no_grad():
            bare.weight += sum(layer.delta_weight(name) for name in names)
        for form, given in _forms(wide).items():
            try:
                plain = start.layer.base_layer(forms[form])
            except (RuntimeError, ValueError):
                continue  # a form that the base layer does not take
            found = start.layer(forms[form])
            same(found, plain, f"{form}: output at the start")
            assert found.stride() == plain.stride(), f"{form}: strides {found.stride()}, of the base {plain.stride()}"
            found = layer(given.detach().requires_grad_())
            close(found, bare(given), f"{form}: output with {' and '.join(names)}")
            assert found.stride() == plain.stride(), f"{form}: strides {found.stride()}, of the base {plain.stride()}"
            found.square().sum().backward()
    grads = [p.grad for p in layer.smidgen_slots.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads), "a form of input trains nothing"


def law_frozen_base(config: SmidgenConfig, kind: str) -> None:
    """Only adapter tensors require gradients, and each gets one, not zero, once perturbed."""
    model, x = adapted(config, kind)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    foreign = [n for n in trained if ".smidgen_slots." not in n]
    assert not foreign, f"base tensors require gradients: {foreign}"
    assert sum(p.numel() for p in trained.values()) > 0, "nothing trains"
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    for name, p in trained.items():
        assert p.grad is not None and bool(p.grad.any()), f"{name} gets no gradient"
    bare = [n for n, p in model.named_parameters() if n not in trained and p.grad is not None]
    assert not bare, f"frozen tensors got gradients: {bare}"


def law_shift_is_matrix(config: SmidgenConfig, kind: str) -> None:
    """base(x + input_shift) + output_shift equals the layer with weight W + delta_weight(W)."""
    model, x = adapted(config, kind, torch.float64)
    smidgen.set_strength(model, 0.7)
    with torch.no_grad():
        found = model(x)
        layer, bare = _layer(model), copy.deepcopy(_layer(model).base_layer)
        bare.weight += layer.delta_weight("default")
        close(found, _with(model, bare)(x), "activation form against matrix form")
        differs(found, _off(model, x), "perturbed adapter")


def law_merge(config: SmidgenConfig, kind: str) -> None:
    """The output is unchanged by merging; unmerging restores the bits of the weight."""
    model, x = adapted(config, kind)
    smidgen.set_strength(model, 0.7)
    layer = _layer(model)
    bits, wanted = layer.base_layer.weight.detach().clone(), model(x).detach()
    for _ in range(3):
        layer.merge()
        with torch.no_grad():
            close(model(x), wanted, "merged output", factor=5)
        assert not torch.equal(layer.base_layer.weight, bits), "merging did not touch the weight"
        layer.unmerge()
        same(layer.base_layer.weight, bits, "weight after unmerging")
    same(model(x).detach(), wanted, "output after unmerging")


def law_disable(config: SmidgenConfig, kind: str) -> None:
    """Switched off it is exactly the base model, nested and after merging too; afterwards all is as before."""
    model, x = adapted(config, kind)
    wanted, on = _off(model, x), model(x).detach()
    differs(on, wanted, "perturbed adapter")
    before = snapshot(model)
    with smidgen.disabled(model):
        same(model(x).detach(), wanted, "disabled output")
        with smidgen.disabled(model):
            same(model(x).detach(), wanted, "output disabled twice")
        same(model(x).detach(), wanted, "disabled output after an inner block")
    unchanged(before, model, "disabling")
    _layer(model).merge()
    merged = model(x).detach()
    with smidgen.disabled(model):
        same(model(x).detach(), wanted, "disabled output of a merged model")
    same(model(x).detach(), merged, "merged output after disabling")


def law_sum(config: SmidgenConfig, kind: str) -> None:
    """Active adapters add, in any order, methods mixed; the delta is linear in the strength, unless ``nonneg`` clamps it."""
    model, x = base(kind)
    smidgen.adapt(model, targeted(config), adapter_name="a")
    smidgen.adapt(model, smidgen.config("lora", r=2, target_modules=["layer"]), adapter_name="b")
    smidgen.adapt(model, smidgen.config("tlora(2,1)", target_modules=["layer"]), adapter_name="c")
    model, x = perturb(model, 5).double(), x.double()
    layer = _layer(model)  # linear, unlike the head behind it

    def effect(*names: str) -> Tensor:
        smidgen.set_active(model, list(names))
        return _out(layer, x) - _out(layer.base_layer, x)

    with torch.no_grad():
        alone = {name: effect(name) for name in "abc"}
        assert all(bool(e.any()) for e in alone.values()), "an adapter has no effect"
        close(effect("a", "b", "c"), alone["a"] + alone["b"] + alone["c"], "three active adapters against their sum")
        close(effect("c", "a"), alone["a"] + alone["c"], "two active adapters in another order")
        for strength in () if config.residual_options.get("nonneg") else (0.5, -2.0):
            smidgen.set_strength(model, {"a": strength})
            close(effect("a"), strength * alone["a"], f"strength {strength}")
            close(effect("a", "c"), strength * alone["a"] + alone["c"], f"strength {strength} beside another")
        smidgen.set_strength(model, {"a": 0.0})
        same(effect("a"), torch.zeros_like(alone["a"]), "strength 0")


def law_bank(config: SmidgenConfig, kind: str) -> None:
    """Row i of a batch through the bank equals adapter id[i] alone, gradients included; None is the base model."""
    model, x = base(kind)
    names = ["ann", "bob", "cat"]
    for seed, name in enumerate(names):
        smidgen.adapt(model, targeted(config), adapter_name=name)
        perturb(model, seed, adapter_name=name)
    bank = smidgen.Bank(model, model.peft_config["ann"], names)
    for name in names:
        bank.put(name, model, name)
    model, x = model.double(), x.double()
    rows = ["cat", "ann", None]
    with bank.rows(rows):
        found = model(x)
    found.square().sum().backward()
    grads = {n: p.grad for n, p in next(iter(bank.slots.values())).trained().items()}
    for i, name in enumerate(rows):
        if name is None:
            close(found[i], _off(model, x)[i], "a row of the base model")
            continue
        smidgen.set_active(model, name)
        alone = model(x[i : i + 1])[0]
        close(found[i], alone, f"row {i} of the bank against {name!r} alone")
        alone.square().sum().backward()
        for tensor, p in _layer(model).smidgen_slots[name].trained().items():
            close(grads[tensor][names.index(name)], p.grad, f"gradient of {tensor} through the bank")
    idle = [n for n, g in grads.items() if bool(g[names.index("bob")].any())]
    assert not idle, f"an adapter that no row names got a gradient: {idle}"


class _Folded(nn.Module):
    """A model over [rows, steps, ...] whose layers see the rows in another form."""

    def __init__(self, model: nn.Module, form: str) -> None:
        super().__init__()
        self.layer, self.form = model.layer, form

    def forward(self, x: Tensor) -> Tensor:
        rows, steps = x.shape[:2]
        if self.form == "each row repeated":
            return self.layer(x.flatten(0, 1)).unflatten(0, (rows, steps))  # type: ignore[no-any-return,operator]
        x = x.transpose(0, 1)
        if self.form == "second axis":
            return self.layer(x.contiguous()).transpose(0, 1)  # type: ignore[no-any-return,operator]
        return self.layer(x.flatten(0, 1)).unflatten(0, (steps, rows)).transpose(0, 1)  # type: ignore[no-any-return,operator]


def law_bank_rows(config: SmidgenConfig, kind: str) -> None:
    """Row i is adapter i alone however a model folds its rows, with two banks on it and in two threads at once, at each call of a
    block that stays open, and after another adapter took the place of one in it."""
    for form in ("each row repeated", "stacked copies", "second axis"):
        model, x = base(kind)
        if form == "second axis" and x.dim() == 4:  # a convolution takes no rows there
            continue
        model = _Folded(model, form)
        sample = x.shape[1:] if x.dim() == 4 else x.shape[-1:]
        x = torch.randn(3, 2, *sample, generator=torch.Generator().manual_seed(1))
        names: list[str | None] = ["ann", None, "bob"]
        for seed, name in enumerate(("ann", "bob")):
            smidgen.adapt(model, targeted(config), adapter_name=name)
            perturb(model, seed, adapter_name=name)
        banks = [smidgen.Bank(model, model.peft_config["ann"]) for _ in range(2)]  # type: ignore[index,arg-type]
        banks[0].put("ann", model, "ann")
        for bank in banks:
            bank.put("bob", model, "bob")
        model, x = model.double().eval().requires_grad_(False), x.double()  # of what trains a block keeps nothing
        alone: dict[str | None, Tensor] = {}
        with torch.no_grad():
            for name in ("ann", "bob"):
                smidgen.set_active(model, name)
                alone[name] = model(x)
            with smidgen.disabled(model):
                alone[None] = model(x)

        @torch.no_grad()
        def right(order: list[str | None], bank: smidgen.Bank, model: nn.Module = model, x: Tensor = x) -> None:
            with bank.rows(order):
                check([model(x) for _ in range(3)], order)

        def check(calls: list[Tensor], order: list[str | None], form: str = form) -> None:
            for found in calls:
                for i, name in enumerate(order):
                    close(found[i], alone[name][i], f"{form}: row {i} of the bank against {name!r} alone")  # noqa: B023

        right(names, banks[0])
        right(["bob"] * 3, banks[0])
        right([None, "bob", None], banks[1])
        differs(alone["ann"], alone[None], "perturbed adapter")
        with ThreadPoolExecutor(2) as pool:
            orders: list[list[str | None]] = [names, ["bob", "ann", None]] * 5
            list(pool.map(lambda order: right(order, banks[0]), orders))  # noqa: B023
        with torch.no_grad(), banks[0].rows(names):
            check([model(x), model(x)], names)
            banks[0].put("ann", model, "bob")
            check([model(x)], ["bob", None, "bob"])


def law_file(config: SmidgenConfig, kind: str) -> None:
    """Saved under one name, loaded under any other: same output, beside other adapters and through peft too."""
    stored = config.store_dtype
    with tempfile.TemporaryDirectory() as folder:
        model, x = adapted(config, kind, name="first")
        wanted = model(x).detach()
        smidgen.save(model, folder, "first")
        same(model(x).detach(), wanted, "output after saving")
        for other in (None, smidgen.config("tlora", target_modules=["layer"])):
            fresh, _ = base(kind)
            if other is not None:
                perturb(smidgen.adapt(fresh, other, adapter_name="first"), 9)
            smidgen.load(fresh, folder, "second")
            close(fresh(x), wanted, "output of the loaded adapter", stored)
        through_peft = PeftModel.from_pretrained(base(kind)[0], folder, adapter_name="third")
        close(through_peft(x), wanted, "output of the adapter loaded through peft", stored)
        close(through_peft(x), fresh(x), "output of the adapter loaded through peft and through smidgen")


def law_file_again(config: SmidgenConfig, kind: str) -> None:
    """A live adapter is ON by its own file, whatever that rounds; loaded and saved again it is the same file; saved before it was
    trained it comes back at its start, the base model bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        model, x = adapted(config, kind)
        written = (smidgen.save(model, folder) / WEIGHTS).read_bytes()
        again = smidgen.load(base(kind)[0], folder)
        for found in (model, again):
            report = smidgen.verify(found, folder, inputs=(x,))
            assert report.ok, f"an adapter against its file: {report.reasons}"
        assert (smidgen.save(again, Path(folder) / "again") / WEIGHTS).read_bytes() == written, (
            "saved again: other bytes"
        )
        plain, _ = base(kind)
        plain.requires_grad_(False)  # torch takes other paths for a layer that trains
        wanted = plain(x)
        smidgen.save(smidgen.adapt(base(kind)[0], targeted(config)), Path(folder) / "start")
        same(smidgen.load(plain, Path(folder) / "start")(x), wanted, "output of an adapter loaded at its start")


def law_recast(config: SmidgenConfig, kind: str) -> None:
    """An adapter keeps its effect on the same base in another number format: the file pins what rounding would change."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = base(kind)
        with torch.no_grad():  # two rows that tie for the first pivot once they are rounded
            matrix = adapted_layer(target_of(model)).base_matrix()
            matrix[..., 0, 0], matrix[..., -1, 0] = 1.0, 1.0003
        again, recast = copy.deepcopy(model), copy.deepcopy(model)
        weight = target_of(recast).weight
        weight.data = weight.detach().bfloat16().float()
        smidgen.save(perturb(smidgen.adapt(model, targeted(config))), folder)
        deltas = [_layer(smidgen.load(m, folder)).delta_weight("default").detach() for m in (again, recast)]
        off = float((deltas[1] - deltas[0]).norm() / deltas[0].norm())
        assert off < RECAST, f"the update differs by {off:.0%} on the base rounded to bfloat16, {RECAST:.0%} allowed"


def law_file_damage(config: SmidgenConfig, kind: str) -> None:
    """Missing, extra, renamed, reshaped and NaN tensors and a wrong base raise and leave the model as it was; where
    the factors are in the file, any base of its shapes is right."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = adapted(config, kind)
        smidgen.save(model, folder)
        good = {n: t.clone() for n, t in load_file(Path(folder) / WEIGHTS).items()}  # no view of the file
        fresh, _ = base(kind)
        before = snapshot(fresh)

        def refuses(what: str, tensors: dict[str, Tensor] | None = None, error: type = SmidgenError) -> None:
            save_file(good if tensors is None else tensors, Path(folder) / WEIGHTS)
            try:
                smidgen.load(fresh, folder)
            except error as found:
                assert len(str(found)) > 30, f"{what}: the message says nothing: {found}"
            else:
                raise AssertionError(f"{what}: was loaded without an error")
            unchanged(before, fresh, what)

        coded = config.store_dtype in packing.CODES
        numbers = torch.uint8 if coded else packing.FLOATS[config.store_dtype]
        name, value = max(good.items(), key=lambda item: item[1].dtype == numbers)
        rest = {k: v for k, v in good.items() if k != name}
        refuses("a missing tensor", rest)
        refuses("an extra tensor", good | {"residual_extra": torch.ones(3)})
        refuses("a renamed tensor", rest | {name + "x": value})
        refuses("a key with a prefix", rest | {f"model.{name}": value})
        refuses("a tensor cut short", rest | {name: value[:-1].clone()})
        refuses("a tensor that is too long", rest | {name: torch.cat([value, value[:1]])})
        refuses("a tensor of another shape", rest | {name: value[None]})
        for bad in (float("nan"), float("inf")):
            if coded:  # the last group's scale
                scale = torch.tensor([bad], dtype=torch.bfloat16).view(torch.uint8)
                refuses(f"a scale of {bad}", rest | {name: torch.cat([value[:-2], scale])})
            else:
                refuses(f"a tensor with {bad}", rest | {name: value.index_fill(0, torch.tensor([0]), bad)})
        refuses("a tensor of whole numbers", rest | {name: value.to(torch.int32)})
        if coded:
            refuses("bytes with a sign", rest | {name: value.view(torch.int8)})
            refuses("a code that is none", rest | {name: value.index_fill(0, torch.tensor([0]), 128)})
        with torch.no_grad():
            weight = target_of(fresh).weight
            weight.copy_(weight.flip(0) * 1.1)
        before = snapshot(fresh)
        if (
            config.store_factors and config.transform is None and config.output is None
        ):  # such a file goes on any base of its shapes
            save_file(good, Path(folder) / WEIGHTS)
            smidgen.load(fresh, folder)
        else:
            refuses("another base", error=BaseLockError)


def law_unload(config: SmidgenConfig, kind: str) -> None:
    """merge_and_unload gives back the original classes and the merged output; unload the base model, bit for bit."""
    for how in ("peft", "peft unload", "smidgen"):
        model, x = base(kind)
        classes, plain = [type(m) for m in model.modules()], model(x).detach()
        put = smidgen.adapt if how == "smidgen" else get_peft_model
        wrapped = put(model, targeted(config))
        wanted = perturb(wrapped)(x).detach()
        if how == "smidgen":
            bare = smidgen.merge(wrapped)
        else:
            bare = wrapped.merge_and_unload(safe_merge=True) if how == "peft" else wrapped.unload()
        assert [type(m) for m in bare.modules()] == classes, f"{how}: classes are not the original ones"
        assert not any("smidgen" in n for n in bare.state_dict()), f"{how}: tensors of the adapter are left"
        if how == "peft unload":
            same(bare(x), plain, "unloaded model")
        else:
            close(bare(x), wanted, f"{how}: merged and unloaded model", factor=5)


def law_count(config: SmidgenConfig, kind: str) -> None:
    """Trained numbers = the members' shapes = what the file holds, and nothing else is in the file but pins."""
    model, _ = adapted(config, kind)
    slot = _layer(model).slot("default")
    members = [m for _, m in slot.members()]
    groups = {
        "transform": slot.groups,
        "output": slot.groups,
        "residual": slot.groups if kind.startswith("experts") else 1,
    }
    wanted = sum(m.count() * groups[prefix] for prefix, m in slot.members())
    assert smidgen.trained_numbers(model) == wanted, f"{smidgen.trained_numbers(model)} trained, {wanted} by the shapes"
    assert all("Count:" in (__import__(type(m).__module__, fromlist=["x"]).__doc__ or "") for m in members), "no Count:"
    with tempfile.TemporaryDirectory() as folder:
        held = packing.decode(load_file(smidgen.save(model, folder) / WEIGHTS), config.store_dtype, folder)
    pinned = {f"residual_{n}" for n in slot._pinned()}
    numbers = sum(v.numel() for k, v in held.items() if k not in pinned)
    assert numbers == wanted, f"the file holds {numbers} trained numbers, {wanted} are trained"
    assert pinned <= set(held), f"pins {pinned - set(held)} are not in the file"


def law_dtype(config: SmidgenConfig, kind: str) -> None:
    """On a bfloat16 or float16 base, and under autocast, a perturbed adapter agrees with float32 within the table."""
    for dtype in (torch.bfloat16, torch.float16):
        half, x = base(kind, dtype)
        full = copy.deepcopy(half).float()
        for model in (half, full):
            perturb(smidgen.adapt(model, targeted(config)))
        assert {p.dtype for p in _layer(half).smidgen_slots.parameters()} == {torch.float32}, "trained numbers not fp32"
        y = half(x)
        assert y.dtype == dtype, f"{dtype} in, {y.dtype} out"
        close(y, full(x.float()), f"{dtype} against float32", dtype)
        whole = copy.deepcopy(full).to(dtype)
        close(whole(x), full(x.float()), f"base and adapter cast to {dtype}", dtype, factor=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = full(x.float())
    close(found, full(x.float()), "autocast against float32", torch.bfloat16)
    found.float().square().sum().backward()
    for name, p in _layer(full).smidgen_slots.named_parameters():
        assert p.grad is not None and bool(torch.isfinite(p.grad).all()), f"{name} under autocast: gradient {p.grad}"


def law_meta(config: SmidgenConfig, kind: str) -> None:
    """Adapting a model on the meta device makes no numbers; low_cpu_mem_usage loads the same adapter as any load."""
    if not (isinstance(config.r, str) and config.r.startswith("energy:")):
        model, _ = base(kind)
        ghost = smidgen.adapt(model.to("meta"), targeted(config))
        real = smidgen.trained_numbers(adapted(config, kind)[0])
        assert smidgen.trained_numbers(ghost) == real, "another count on the meta device"
        assert all(p.is_meta for p in ghost.parameters()), "real tensors on a meta model"
    with tempfile.TemporaryDirectory() as folder:
        model, x = adapted(config, kind)
        smidgen.save(model, folder)
        lean = PeftModel.from_pretrained(base(kind)[0], folder, low_cpu_mem_usage=True)
        close(lean(x), model(x), "adapter loaded with low_cpu_mem_usage", config.store_dtype)


def law_compile(config: SmidgenConfig, kind: str) -> None:
    """torch.compile (fullgraph, aot_eager) computes the same, forward and backward."""
    model, x = adapted(config, kind)
    wanted = model(x)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in _layer(model).smidgen_slots.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    close(found, wanted, "compiled output", factor=5)
    found.square().sum().backward()
    for p, wanted_grad in zip(_layer(model).smidgen_slots.parameters(), grads, strict=True):
        close(p.grad, wanted_grad, "compiled gradient", factor=5)


def law_gradient(config: SmidgenConfig, kind: str) -> None:
    """torch.autograd.gradcheck in float64 for the input and every trained tensor; where a member holds something constant in
    the backward pass, of the option that does not."""
    if config.output:
        config = replace(config, output_options=config.output_options | OUTPUTS[config.output].exact_gradient)
    model, x = adapted(config, kind, torch.float64)
    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    inputs = (x[:1].clone().requires_grad_(), *trained.values())
    fast = sum(p.numel() for p in inputs) > 200
    try:
        torch.autograd.gradcheck(run, inputs, fast_mode=fast)
    except GradcheckError as error:
        raise AssertionError(f"gradcheck: {str(error)[:300]}") from error


LAWS: dict[str, Law] = {
    "identity": law_identity,
    "inputs": law_inputs,
    "frozen base": law_frozen_base,
    "shift = matrix": law_shift_is_matrix,
    "merge": law_merge,
    "disable": law_disable,
    "sum": law_sum,
    "bank": law_bank,
    "bank rows": law_bank_rows,
    "file": law_file,
    "file again": law_file_again,
    "recast": law_recast,
    "file damage": law_file_damage,
    "unload": law_unload,
    "count": law_count,
    "dtype": law_dtype,
    "meta": law_meta,
    "compile": law_compile,
    "gradient": law_gradient,
}

# Kinds of layers that have no rows of a batch and no inputs of their own: the law has no meaning there.
NOT_ON = dict.fromkeys(("inputs", "bank", "bank rows"), ("experts", "experts_transposed"))
