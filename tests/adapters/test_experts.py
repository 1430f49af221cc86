"""Adapters on fused experts: on every family's own class and every kernel, through files, peft and training."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.tuner import experts
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import BaseLockError, ConfigError, SmidgenError, TargetError

from .test_coverage import tiny

FAMILIES = ("Qwen3-MoE", "Mixtral", "gpt-oss", "Llama 4", "DeepSeek-V3", "Granite hybrid", "Jamba")
TOKENS = torch.arange(2, 26).reshape(2, 12)


def moe(name: str = "Qwen3-MoE") -> Any:
    model = tiny(name)
    if not experts.stacks(model):
        pytest.skip(f"the experts of {name} are layers in this transformers")
    return model


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("method", ["lora", "svfit", "tlora", "oft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_start_effect_file_merge(name: str, method: str, tmp_path: Path) -> None:
    model = moe(name)
    base, before = out(model), testing.snapshot(model)
    smidgen.adapt(model, method, target_modules=["experts"])
    assert torch.equal(out(model), base)
    testing.perturb(model)
    moved = out(model)
    testing.differs(moved, base, "perturbed adapter")
    smidgen.save(model, tmp_path)
    with smidgen.disabled(model):
        assert torch.equal(out(model), base)
    fresh = smidgen.load(moe(name), tmp_path)
    testing.close(out(fresh), moved, "loaded")
    report = smidgen.verify(fresh, tmp_path)
    assert report.verdict == "ON" and report.base == "same", report.reasons
    testing.close(out(PeftModel.from_pretrained(moe(name), tmp_path)), moved, "loaded through peft")
    testing.close(out(smidgen.merge(fresh)), moved, "merged", factor=5)
    assert fresh.state_dict().keys() == moe(name).state_dict().keys()
    wrapped = get_peft_model(moe(name), smidgen.config(method, target_modules=["experts"]))
    bare = testing.perturb(wrapped).unload()
    assert torch.equal(out(bare), base)
    testing.unchanged(before, bare.requires_grad_(True), "putting an adapter on and taking it off")


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_every_kernel_of_transformers(kernel: str) -> None:
    model = moe()
    try:
        model.set_experts_implementation(kernel)
    except (AttributeError, ValueError) as error:
        pytest.skip(str(error))
    base = out(model)
    smidgen.adapt(model, "tlora", target_modules=["experts"])
    assert torch.equal(out(model), base)
    wanted = out(testing.perturb(model))
    testing.close(out(smidgen.merge(model)), wanted, kernel)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_short_training(name: str, tmp_path: Path) -> None:
    model = moe(name)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    smidgen.adapt(model, "lora", r=4, target_modules=["q_proj", "v_proj", "experts"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=2e-2), []
    model.train()
    for _ in range(16):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    stacks = {n: layer for n, layer in adapted_layers(model).items() if experts.is_stack(layer)}
    reached = {
        e
        for layer in stacks.values()
        for e in layer.smidgen_slots["default"].residual_b.abs().amax((1, 2)).nonzero().flatten().tolist()
    }
    assert len(reached) > 2, "tokens reach several experts, and each learns its own"
    model.eval()
    wanted = out(model)
    smidgen.save(model, tmp_path)
    testing.close(out(smidgen.load(moe(name), tmp_path)), wanted, "loaded")
    testing.close(out(smidgen.merge(model)), wanted, "merged", factor=5)
    with torch.no_grad():
        plain = moe(name)
    assert all(torch.equal(p, frozen[n]) for n, p in plain.named_parameters())


def test_each_expert_has_its_own_numbers_and_count() -> None:
    model = moe()
    config = model.config
    wanted = sum(
        config.num_experts * 4 * (rows + cols)
        for rows, cols in ((2 * config.moe_intermediate_size, config.hidden_size), (config.hidden_size, config.moe_intermediate_size))
    ) * config.num_hidden_layers  # fmt: skip
    own = smidgen.config("lora", r=4, target_modules=["experts"])
    assert smidgen.count(model, own) == wanted and not adapted_layers(model)
    assert smidgen.trained_numbers(smidgen.adapt(model, own)) == wanted
    assert smidgen.count(model, smidgen.config("lora", r=4, target_modules=["experts"])) == wanted


@pytest.mark.parametrize(
    ("targets", "layers", "kept"),
    [
        (["experts"], 8, {"experts.gate_up_proj", "experts.down_proj"}),
        (["mlp.experts"], 8, {"experts.gate_up_proj", "experts.down_proj"}),
        (["experts.gate_up_proj"], 4, {"experts.gate_up_proj"}),
        (["mlp.experts.down_proj", "q_proj"], 8, {"mlp.experts.down_proj", "q_proj"}),
        (["model.layers.1.mlp.experts"], 2, {f"model.layers.1.mlp.experts.{n}_proj" for n in ("gate_up", "down")}),
        (r".*layers\.[12]\..*experts", 4, {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (1, 2) for n in ("gate_up", "down")}),
    ],
)  # fmt: skip
def test_names(targets: Any, layers: int, kept: set[str]) -> None:
    model = smidgen.adapt(moe(), "lora", r=2, target_modules=targets)
    assert len(adapted_layers(model)) == layers
    assert set(model.peft_config["default"].target_modules) == kept


def test_other_lists_reach_them() -> None:
    exclude = smidgen.adapt(moe(), "lora", r=2, target_modules=["experts"], exclude_modules=r".*down_proj")
    assert all(n.endswith("gate_up_proj") for n in adapted_layers(exclude)) and len(adapted_layers(exclude)) == 4
    some = smidgen.adapt(moe(), "lora", r=2, target_modules=["experts", "q_proj"], layers_to_transform=[0, 3])
    assert {n.split(".")[2] for n in adapted_layers(some)} == {"0", "3"} and len(adapted_layers(some)) == 6
    ranks = smidgen.adapt(moe(), "lora", r=2, target_modules=["experts"], rank_pattern={"down_proj": 5})
    assert {layer.r["default"] for layer in adapted_layers(ranks).values()} == {2, 5}
    energy = smidgen.adapt(moe(), "svfit", r="energy:0.5", target_modules=["experts"])
    assert all(1 <= layer.r["default"] < 16 for layer in adapted_layers(energy).values())
    with pytest.raises(TargetError, match=r"no module is named 'expert'. Did you mean 'experts'"):
        smidgen.adapt(moe(), "lora", target_modules=["expert"])


def test_a_bare_name_means_other_layers() -> None:
    model = smidgen.adapt(moe("DeepSeek-V3"), "lora", r=2, target_modules=["q_a_proj", "down_proj"])
    found = adapted_layers(model)
    assert len(found) == 8 and not any(experts.is_stack(layer) for layer in found.values())
    smidgen.adapt(model, "lora", "second", r=2, target_modules=["experts"])
    smidgen.adapt(model, "lora", "third", r=2, target_modules=["down_proj"])  # the experts are layers now
    assert not any(experts.is_stack(layer) for layer in adapted_layers(model, "third").values())
    pattern = smidgen.adapt(moe("DeepSeek-V3"), "lora", r=2, target_modules=r".*\.down_proj")
    assert not any(experts.is_stack(layer) for layer in adapted_layers(pattern).values())
    with pytest.raises(TargetError, match=r"only fused experts are named 'down_proj'.*write 'experts\.down_proj'"):
        smidgen.adapt(moe(), "lora", target_modules=["q_proj", "down_proj"])


def test_several_adapters_and_strengths() -> None:
    model = moe()
    base = out(model)
    for name, method in (("a", "lora"), ("b", "tlora")):
        smidgen.adapt(model, method, name, target_modules=["experts"])
        testing.perturb(model, 3, adapter_name=name)
    layer = next(iter(adapted_layers(model).values()))
    weights = {}
    for names in ("a", "b", "ab"):
        smidgen.set_active(model, list(names))
        weights[names] = layer() - layer.base_layer()
    testing.close(weights["ab"], weights["a"] + weights["b"], "two active adapters")
    smidgen.set_strength(model, 0.0)
    assert torch.equal(out(model), base)
    smidgen.set_strength(model, {"a": 1.0})
    wanted = out(model)
    smidgen.set_active(model, "a")  # b has no strength, and merge would not lose an active adapter
    smidgen.merge(model, ["a"])
    testing.close(out(model), wanted, "one of two merged")


def test_bfloat16_stays_near_float32() -> None:
    full, half = moe("Mixtral"), moe("Mixtral").bfloat16()
    full.load_state_dict({n: p.float() for n, p in half.state_dict().items()})
    base = out(half)
    for model in (full, half):
        smidgen.adapt(model, "lora", r=4, target_modules=["experts"])
    assert torch.equal(out(half), base)
    layers = [adapted_layers(testing.perturb(model, size=0.05)) for model in (full, half)]
    for name, layer in layers[0].items():
        testing.close(layers[1][name]().float(), layer(), name, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)


def test_another_base_is_refused(tmp_path: Path) -> None:
    smidgen.save(testing.perturb(smidgen.adapt(moe(), "svfit", r=2, target_modules=["experts"])), tmp_path)
    other = moe()
    with torch.no_grad():
        for stack in experts.stacks(other).values():
            stack.weight.copy_(stack.weight.flip(0) * 1.2)
    before = testing.snapshot(other)
    with pytest.raises(BaseLockError, match=r"another base model"):
        smidgen.load(other, tmp_path)
    testing.unchanged(before, other, "a refused adapter")


def test_a_refused_adapter_leaves_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe()
    before = testing.snapshot(model)
    with pytest.raises(ConfigError):
        smidgen.adapt(model, "oft", blocks=5, target_modules=["experts"])
    testing.unchanged(before, model, "a refused adapter")
    for put in (smidgen.adapt, get_peft_model):
        monkeypatch.setattr("smidgen.adapters.tuner.peft_bridge.make_slot", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            put(model, smidgen.config("lora", target_modules=["experts"]))
        left = [n for n, _ in model.named_parameters() if "experts" in n]
        assert left == [n for n, _ in moe().named_parameters() if "experts" in n]


def test_rows_of_a_batch_cannot_differ() -> None:
    model = get_peft_model(moe(), smidgen.config("lora", target_modules=["experts"]))
    with pytest.raises(
        SmidgenError,
        match=r"A bank cannot hold adapters on fused experts \('model.layers.0.mlp.experts.gate_up_proj'\)",
    ):
        smidgen.Bank(model, model.peft_config["default"], ["ann"])
    with pytest.raises(ValueError, match=r"adapter_names.* fused experts"):
        model.eval()(TOKENS, adapter_names=["default", "__base__"])


def test_copies_pickles_and_threads() -> None:
    model = testing.perturb(smidgen.adapt(moe(), "lora", target_modules=["experts"]))
    wanted = out(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    testing.perturb(model, 9)
    testing.differs(out(model), wanted, "another perturbation")
    assert torch.equal(out(twin), wanted), "a copy runs on its own numbers"
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(out(twin))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(f, wanted) for f in found)


def test_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = moe()
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    base = out(model)
    smidgen.adapt(model, "lora", target_modules=["experts"])
    assert torch.equal(out(model), base)
    wanted = out(testing.perturb(model))
    testing.differs(wanted, base, "perturbed adapter")
    testing.close(out(smidgen.merge(model)), wanted, "merged")


def test_what_is_not_known_to_be_experts_is_no_target() -> None:
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

    with pytest.raises(TargetError, match=r"is a Stranger; adapters go on .* fused experts"):
        smidgen.adapt(nn.ModuleDict({"own": Stranger()}), "lora", target_modules=["own"])


def test_all_linear_leaves_them_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smidgen"):
        model = smidgen.adapt(moe("Mixtral"), "lora", r=2, target_modules="all-linear")
    assert not any(experts.is_stack(layer) for layer in adapted_layers(model).values())
    assert "which are adapted when they are named: add 'experts' to target_modules" in caplog.text
