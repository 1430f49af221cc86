"""Adapters on modules that transformers renamed: they follow, in both directions, where the base is the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import smidgen
from smidgen.adapters.checkpoint.base_lock import read_lock
from smidgen.adapters.tuner import renames
from smidgen.errors import BaseLockError, SmidgenError, TargetError

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="written for the names of transformers 5")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 8, "patch_size": 4}
OLD = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
NEW = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**SIZES), add_pooling_layer=False).eval()


def moved(owner: nn.Module, name: str, to: str, root: nn.Module) -> None:
    """Moves a sub-module to another path below ``root``; ``owner`` still finds it by its old name."""
    module = owner._modules.pop(name)
    *way, last = to.split(".")
    parent = root
    for part in way:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(last, module)
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), {name: property(lambda self: parent._modules[last])})


def old_vit(seed: int = 0) -> nn.Module:
    """The same model with the module names of transformers 4."""
    model: Any = vit(seed)
    if hasattr(model, "encoder"):
        pytest.skip("this transformers has the old names")
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        for new, old in zip(NEW[:3], OLD[:3], strict=True):
            moved(attention, new, f"attention.{old}", attention)
        moved(attention, "o_proj", "output.dense", attention)
        moved(mlp, "fc1", "intermediate.dense", layer)
        moved(mlp, "fc2", "output.dense", layer)
    moved(model, "layers", "encoder.layer", model)
    return model


def trained(model: nn.Module, method: str, targets: list[str], **options: Any) -> nn.Module:
    smidgen.adapt(model, method, target_modules=targets, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PIXELS).last_hidden_state


def test_the_old_model_is_the_same_model() -> None:
    old = dict(old_vit().named_modules())
    assert "encoder.layer.1.attention.attention.query" in old and "encoder.layer.0.output.dense" in old
    assert not any(name.endswith(tuple(NEW)) for name in old)
    assert torch.equal(out(old_vit()), out(vit()))


@pytest.mark.parametrize("method", ["lora", "svfit", "loldu"])
@pytest.mark.parametrize("there", [True, False], ids=["old to new", "new to old"])
def test_an_adapter_follows(method: str, there: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (old_vit, vit) if there else (vit, old_vit)
    model = trained(ours(), method, OLD if there else NEW, r=4)
    smidgen.save(model, tmp_path / "a")
    want = out(model)
    assert not torch.allclose(want, out(ours()), atol=1e-3)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with caplog.at_level(logging.WARNING, logger="smidgen"):
        other = smidgen.load(theirs(), tmp_path / "a")
    assert torch.allclose(out(other), want, atol=1e-5)
    (said,) = [r.getMessage() for r in caplog.records if "another version of transformers" in r.getMessage()]
    assert "12 of its 12 targets" in said and "k_proj" in said and "attention.key" in said
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == files
    for base in (other, theirs()):
        report = smidgen.verify(base, tmp_path / "a")
        assert report.ok, report
        assert any("another version of transformers" in note for note in report.notes)
    smidgen.save(other, tmp_path / "b")  # by the names of here
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert all(name in dict(theirs().named_modules()) for name in read_lock(config["base_lock"]).targets)
    assert torch.allclose(out(smidgen.load(theirs(), tmp_path / "b")), want, atol=1e-5)
    assert torch.allclose(out(smidgen.load(ours(), tmp_path / "b")), want, atol=1e-5)  # and back


def test_ranks_and_layers_by_name(tmp_path: Path) -> None:
    model = trained(
        old_vit(), "lora", ["query", "value"], r=4, rank_pattern={"layer.1.attention.attention.query": 2}, alpha=4
    )
    smidgen.save(model, tmp_path)
    other = smidgen.load(vit(), tmp_path)
    assert torch.allclose(out(other), out(model), atol=1e-5)
    a = other.get_submodule("layers.1.attention.q_proj").smidgen_slots["default"].residual_a
    assert a.shape[0] == 2


def test_in_a_bank(tmp_path: Path) -> None:
    smidgen.save(trained(old_vit(), "svfit", OLD, r=4), tmp_path)
    model = trained(vit(), "svfit", NEW, r=4)
    bank = smidgen.Bank(model, model.peft_config["default"])
    bank.put("ann", tmp_path)
    want = out(smidgen.load(vit(), tmp_path))
    with bank.rows(["ann", None, "ann"]):
        found = out(model)
    assert torch.allclose(found[[0, 2]], want[[0, 2]], atol=1e-5)
    assert torch.allclose(found[1], out(vit())[1], atol=1e-6)


def test_an_image_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    if hasattr(model, "vision_model"):
        pytest.skip("this transformers has the old names")
    trained(model, "svfit", ["q_proj", "fc1"], r=4)
    smidgen.save(model, tmp_path / "a")
    want = out(model)
    torch.manual_seed(0)
    tower: Any = nn.Module()
    tower.vision_model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    smidgen.load(tower, tmp_path / "a")
    assert torch.allclose(out(tower.vision_model), want, atol=1e-5)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    smidgen.save(trained(old_vit(), "lora", OLD, r=2), tmp_path)
    base = vit(seed=5)
    with pytest.raises(BaseLockError, match="another base model"):
        smidgen.load(base, tmp_path)
    assert not smidgen.names(base)


@pytest.mark.parametrize("wrong", ["query_proj", "q"])
def test_an_unknown_name_is_refused_with_near_ones(wrong: str, tmp_path: Path) -> None:
    strange: Any = vit()
    for layer in strange.layers:
        moved(layer.attention, "q_proj", wrong, layer.attention)
    smidgen.save(trained(strange, "lora", [wrong], r=2), tmp_path)
    base = vit()
    with pytest.raises(SmidgenError, match=r"q_proj"):
        smidgen.load(base, tmp_path)
    assert not smidgen.names(base)


@pytest.mark.parametrize("method", ["seeded", "tlora"])
def test_numbers_drawn_from_a_name_are_refused(method: str, tmp_path: Path) -> None:
    options = {"r": 4} if method == "seeded" else {"transform_rank": 2}
    smidgen.save(trained(old_vit(), method, OLD, **options), tmp_path)
    with pytest.raises(TargetError, match="fixed random numbers"):
        smidgen.load(vit(), tmp_path)


def test_a_file_without_a_base_lock_is_not_followed(tmp_path: Path) -> None:
    smidgen.save(trained(old_vit(), "lora", OLD, r=2), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config = {k: v for k, v in config.items() if k not in ("base_lock", "checksum")} | {"target_modules": OLD}
    file.write_text(json.dumps(config))
    with pytest.raises(TargetError, match="no module is named"):
        smidgen.load(vit(), tmp_path)


class Experts(nn.Module):
    """Fused experts, as transformers 5 has them."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 16, 8))


def blocks(owner: str, experts: nn.Module) -> nn.Module:
    block = nn.Module()
    block.add_module(owner, nn.Module())
    block.get_submodule(owner).add_module("experts", experts)
    model = nn.Module()
    model.add_module("layers", nn.ModuleList([block]))
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["to layers", "to one tensor"])
def test_experts_in_another_layout_are_named_and_refused(fused: bool, tmp_path: Path) -> None:
    def singles() -> nn.Module:
        return nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8)}) for _ in range(2))

    together, apart = blocks("mlp", Experts()), blocks("block_sparse_moe", singles())
    model, other = (together, apart) if fused else (apart, together)
    smidgen.save(trained(model, "lora", ["experts.gate_up_proj"] if fused else ["w1"], r=2), tmp_path)
    with pytest.raises(TargetError, match="another layout"):
        smidgen.load(other, tmp_path)


def test_the_table_is_one_to_one() -> None:
    for pairs in renames.RENAMED.values():
        for side in zip(*pairs, strict=True):
            assert len(set(side)) == len(side)
        assert all(old.count("*") == new.count("*") for old, new in pairs)
