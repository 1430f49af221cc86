"""Coverage: what share of a model an adapter is on, said entry by entry, and a warning where defaults miss the most."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from torch import nn

import smidgen
from benchmarks import tiny_models
from smidgen.adapters.tuner.coverage import coverage, entry_of, gaps

from .helpers import Net, trained


def tiny(name: str) -> nn.Module:
    try:
        return tiny_models.build(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this release has no {name}: {error}")


def test_entries_and_shares() -> None:
    net = smidgen.adapt(Net(), "svfit", target_modules=["layers.0.q_proj", "v_proj"])
    found = coverage(net, "default")
    total = sum(p.numel() for p in Net().parameters())
    assert [(e.name, e.matched, e.there) for e in found.entries] == [("q_proj", 1, 2), ("v_proj", 2, 2)]
    assert found.layers == 3 and found.there == 5
    own = 3 * (16 * 16 + 16)
    assert found.share == pytest.approx(own / total)
    assert found.left == pytest.approx((16 * 16 + 16 + 16 * 3 + 3) / total) and found.fused == 0
    assert [(s.name, s.touched, s.blocks) for s in found.stacks] == [("layers", 2, 2)]


def test_a_second_adapter_and_peft_around_it_change_nothing() -> None:
    import peft

    net = smidgen.adapt(Net(), "svfit", target_modules=["q_proj"])
    first = coverage(net, "default")
    smidgen.adapt(net, "lora", "second", target_modules=["v_proj"])
    assert coverage(net, "default") == first
    wrapped = peft.get_peft_model(Net(), smidgen.config("svfit", target_modules=["q_proj"], modules_to_save=["head"]))
    found = coverage(wrapped, "default")
    assert found.entries == first.entries and found.share == first.share


@pytest.mark.parametrize(
    ("name", "entry"), [("a.0.q_proj", "q_proj"), ("x.attn.to_out.0", "to_out.0"), ("0", "0"), ("experts.3.up", "up")]
)
def test_entry_of(name: str, entry: str) -> None:
    assert entry_of(name) == entry


def test_the_report_says_it(tmp_path: Path) -> None:
    net = trained("svfit", target_modules=["q_proj"])
    smidgen.save(net, tmp_path)
    report = smidgen.verify(net, tmp_path)
    assert report.coverage is not None and report.coverage.layers == 2
    text = str(report)
    assert "q_proj                  2 of 2 layers" in text and "not adapted                  3 layers" in text
    assert f"covers        {report.coverage.share:.1%} of the model's parameters" in text


def warning(model: nn.Module, caplog: pytest.LogCaptureFixture, **options: object) -> str:
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.adapt(model, "lora", r=2, **options)
    return caplog.text


def test_a_hybrid_of_which_attention_is_one_block_in_four(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("Qwen3-Next")
    assert "in fused experts" in warning(model, caplog) and "blocks hold" not in caplog.text
    smidgen.adapt(model, "lora", "attention", r=2, target_modules=["q_proj", "v_proj"])
    assert gaps(coverage(model, "attention")) == ["model.layers: 1 of 4 blocks hold an adapted layer"]


def test_a_vision_tower_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("LLaVA")
    said = warning(model, caplog)
    layers = r"vision_tower(\.vision_model)?\.encoder\.layers"  # as transformers 5 and 4 name them
    assert re.search(rf"{layers} \(25% of the parameters\) is left out", said)
    smidgen.adapt(model, "lora", "both", r=2, target_modules=["q_proj", "v_proj"])
    (too,) = gaps(coverage(model, "both"))
    assert re.search(rf"{layers} is adapted too \(2 of 2 blocks; exclude_modules leaves it out\)", too)


def test_experts_in_one_tensor(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("Qwen3-MoE")
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("experts are layers in this transformers")
    share = experts / sum(p.numel() for p in model.parameters())
    said = warning(model, caplog, target_modules="all-linear")
    assert f"{share:.0%} of the parameters are in fused experts" in said and "add 'experts' to target_modules" in said
    assert "fused" not in warning(tiny("Qwen3-MoE"), caplog, target_modules=["q_proj", "experts"]).replace(said, "")


@pytest.mark.parametrize("name", ["BERT", "Llama", "wav2vec2", "Stable Diffusion", "FLUX.2"])
def test_nothing_is_said_where_defaults_reach_the_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert warning(tiny(name), caplog) == ""


def test_nothing_is_said_of_targets_that_were_named(caplog: pytest.LogCaptureFixture) -> None:
    assert warning(Net(layers=4), caplog, target_modules=["layers.0.q_proj"]) == ""
