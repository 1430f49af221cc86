"""Adapters in diffusers, and on quantised bases, which nothing in the forward pass reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.methods import METHODS
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import BaseLockError, SmidgenError, TargetError

from .helpers import Net, inputs, trained, unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


# ---- diffusers ---------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, **options: object) -> Tensor:
    def noise(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    with torch.no_grad():
        return model(noise(2, 4, 8, 8, seed=1), 7, noise(2, 5, 24, seed=2), **options).sample


@pytest.mark.parametrize("method", METHODS)
def test_unet_add_weigh_disable_delete(method: str, tmp_path: Path) -> None:
    model = unet()
    base = predict(model)
    targets = [*ATTENTION, "conv1", "proj_in"]
    model.add_adapter(smidgen.config(method, target_modules=targets), "a")
    testing.same(predict(model), base, "at the start")
    full = predict(testing.perturb(model, size=0.2))
    testing.differs(full, base, "trained")
    model.set_adapters(["a"], [0.5])
    half = predict(model)
    smidgen.set_strength(model, 0.5)
    testing.same(predict(model), half, "smidgen.set_strength")
    model.set_adapters(["a"], [1.0])
    testing.same(predict(model), full, "back to full strength")
    testing.close(predict(model, cross_attention_kwargs={"scale": 0.5}), half, "cross_attention_kwargs scale")
    testing.same(predict(model), full, "the scale of one call does not stay")
    testing.close(predict(model, cross_attention_kwargs={"scale": 0.0}), base, "scale 0")
    testing.same(predict(model), full, "a scale of 0 does not stay either")
    model.disable_adapters()
    testing.same(predict(model), base, "disable_adapters")
    model.enable_adapters()
    model.add_adapter(smidgen.config("lora", r=2, target_modules=["to_q"]), "b")
    testing.perturb(model, 4, adapter_name="b")
    model.set_adapters(["a", "b"], [1.0, -1.0])
    both = predict(model)
    testing.differs(both, full, "a second adapter")
    model.set_adapters(["a"])
    smidgen.save(model, tmp_path, "a")
    model.delete_adapters("b")
    testing.same(predict(model), full, "after deleting the second")
    model.delete_adapters("a")
    testing.same(predict(model), base, "after deleting both")
    stored = smidgen.config(method).store_dtype
    testing.close(predict(smidgen.load(unet(), tmp_path)), full, "loaded into another unet", stored)


def test_unet_fuse_and_a_plain_lora_beside(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = smidgen.adapt(unet(), "svfit", target_modules=ATTENTION)
    full = predict(testing.perturb(model, size=0.3))
    merged = smidgen.merge(copy.deepcopy(model))
    testing.close(predict(merged), full, "merged", factor=10)
    assert [type(m) for m in merged.modules()] == [type(m) for m in unet().modules()]
    assert not merged._hf_peft_config_loaded
    merged.add_adapter(LoraConfig(target_modules=["to_q"]))
    testing.close(predict(merged), full, "a plain LoRA afterwards", factor=10)


def test_default_targets_of_a_unet() -> None:
    model = smidgen.adapt(unet(), "svfit", r=2)
    ends = {name.rpartition("attn")[2][2:] for name in adapted_layers(model)}
    assert ends == set(ATTENTION)


def test_bank_rows_in_a_unet_with_guidance() -> None:
    model = smidgen.adapt(unet(), "tlora", target_modules=ATTENTION)
    bank = smidgen.Bank(model, model.peft_config["default"], ["a", "b"])
    outputs = {}
    for seed, name in enumerate(["a", "b"], start=1):
        one = testing.perturb(smidgen.adapt(unet(), "tlora", target_modules=ATTENTION), seed)
        bank.put(name, one)
        outputs[name] = predict(one)
    with bank.rows(["b", "a"]):
        found = predict(model)
    testing.close(found, torch.stack([outputs["b"][0], outputs["a"][1]]), "two people in one batch", factor=3)


# ---- quantised bases ------------------------------------------------------------------------------------------------------


def torchao_int8(net: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net.layers, quantization.Int8WeightOnlyConfig())
    return net


def _swapped(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for block in net.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block, name, make(getattr(block, name)))
    return net


def bitsandbytes_int8(net: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    return _swapped(net, make)


def bitsandbytes_nf4(net: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4", compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    return _swapped(net, make)


def bits(weight: Tensor) -> Tensor:
    """What a weight holds: its own numbers, or those of the tensor subclass that quantises it."""
    inner = getattr(weight, "qdata", weight)
    return inner.detach().clone() if type(inner) in (Tensor, nn.Parameter) else inner.data.clone()


QUANTISED = [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4]


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base(quantise: Callable[[nn.Module], nn.Module], method: str, tmp_path: Path) -> None:
    net = quantise(Net(width=64).eval()).requires_grad_(False)
    x = inputs(64)
    base = net(x)
    before = {name: bits(p) for name, p in net.named_parameters()}
    smidgen.adapt(net, method, target_modules=["q_proj", "v_proj"])
    testing.same(net(x), base, "at the start")
    y = testing.perturb(net)(x)
    testing.differs(y, base, "trained")
    y.square().sum().backward()
    for name, p in net.named_parameters():
        if ".smidgen_slots." in name:
            assert p.grad is not None and bool(p.grad.any()), f"{name} gets no gradient"
    with smidgen.disabled(net):
        testing.same(net(x), base, "disabled")
    smidgen.save(net, tmp_path)
    loaded = smidgen.load(quantise(Net(width=64).eval()), tmp_path)
    testing.close(loaded(x), y, "loaded on the same quantised base", factor=10)
    after = {n.replace(".base_layer", ""): bits(p) for n, p in net.named_parameters() if ".smidgen_slots." not in n}
    assert after.keys() == before.keys()
    for name, wanted in before.items():
        testing.same(after[name], wanted, name)


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", ["svfit", "loldu"])
def test_many_tokens_take_no_shortcut_that_a_quantised_weight_lacks(
    quantise: Callable[[nn.Module], nn.Module], method: str
) -> None:
    net = smidgen.adapt(quantise(Net(width=64).eval()), method, r="full", target_modules=["q_proj", "v_proj"])
    testing.perturb(net)
    x = inputs(64).repeat(600, 1)
    few = len(inputs(64))
    testing.close(net(x)[:few], net(inputs(64)), "many tokens", factor=10)


@pytest.mark.parametrize("quantise", QUANTISED)
def test_an_adapter_of_the_full_base_moves_to_its_quantised_copy(
    quantise: Callable[[nn.Module], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = trained("loldu", net=Net(width=64), r=8)
    smidgen.save(net, tmp_path)
    if quantise is bitsandbytes_nf4:  # four bits are too few to make these factors again
        with pytest.raises(BaseLockError, match=r"deltas that differ by 1\d.*store_factors=True"):
            smidgen.load(quantise(Net(width=64)), tmp_path)
        smidgen.save(net, tmp_path, store_factors=True)
    with caplog.at_level("WARNING", "smidgen"):
        loaded = smidgen.load(quantise(Net(width=64)), tmp_path)
    assert "base weights differ by" in caplog.text
    assert bool(torch.isfinite(loaded(inputs(64))).all())


@pytest.mark.parametrize("quantise", QUANTISED)
def test_merging_into_a_quantised_base_is_refused(quantise: Callable[[nn.Module], nn.Module]) -> None:
    net = testing.perturb(smidgen.adapt(quantise(Net(width=64)), "lora", target_modules=["q_proj"]), size=0.01)
    wanted = net(inputs(64)).detach()
    weights = [id(p) for p in net.parameters()]
    for merge in (smidgen.merge, lambda net: net.layers[1].q_proj.merge()):
        with pytest.raises(SmidgenError, match="Merging into a quantised weight"):
            merge(net)
    assert weights == [id(p) for p in net.parameters()]
    testing.same(net(inputs(64)).detach(), wanted, "the output after a refused merge")


def test_a_layer_that_is_no_matrix_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Bilinear(3, 4, 5))
    for target, kind in (("0", "Embedding"), ("1", "Bilinear")):
        with pytest.raises(TargetError, match=f"is a {kind}; adapters go on"):
            smidgen.adapt(net, "lora", target_modules=[target])
