"""Coverage: what share of a model an adapter is on, said entry by entry, and a warning where defaults miss the most."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import smidgen
from smidgen.adapters.tuner.coverage import coverage, entry_of

from .helpers import Net, trained

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
MOE = {"moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}


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


def test_a_hybrid_whose_defaults_reach_one_block_in_four(caplog: pytest.LogCaptureFixture) -> None:
    tf = pytest.importorskip("transformers")
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    if not hasattr(tf, "Qwen3NextConfig"):
        pytest.skip(f"transformers {tf.__version__} has no Qwen3-Next")
    config = tf.Qwen3NextConfig(**SIZES, **MOE, **linear, num_hidden_layers=4, shared_expert_intermediate_size=16)
    said = warning(tf.Qwen3NextForCausalLM(config), caplog)
    assert "model.layers: 1 of 4 blocks" in said and "all-linear" in said


def test_a_vision_tower_that_defaults_reach_too(caplog: pytest.LogCaptureFixture) -> None:
    tf = pytest.importorskip("transformers")
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**SIZES, num_hidden_layers=2))
    said = warning(tf.LlavaForConditionalGeneration(config), caplog)
    layers = r"vision_tower(\.vision_model)?\.encoder\.layers"  # as transformers 5 and 4 name them
    assert re.search(rf"{layers} is adapted too \(2 of 2 blocks; exclude_modules leaves it out\)", said)


def test_experts_in_one_tensor(caplog: pytest.LogCaptureFixture) -> None:
    tf = pytest.importorskip("transformers")
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **MOE, num_hidden_layers=2))
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("experts are layers in this transformers")
    share = experts / sum(p.numel() for p in model.parameters())
    assert f"{share:.0%} of the parameters are in fused weights (experts)" in warning(
        model, caplog, target_modules="all-linear"
    )


def test_single_blocks_that_defaults_do_not_know(caplog: pytest.LogCaptureFixture) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "Flux2Transformer2DModel"):
        pytest.skip("a diffusers without FLUX.2")
    model = diffusers.Flux2Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, num_layers=1, num_single_layers=4,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
    )  # fmt: skip
    assert "single_transformer_blocks: 0 of 4 blocks" in warning(model, caplog)


def test_nothing_is_said_where_defaults_reach_the_model(caplog: pytest.LogCaptureFixture) -> None:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    assert warning(tf.BertModel(tf.BertConfig(**SIZES, num_hidden_layers=2)), caplog) == ""
    assert warning(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=2)), caplog) == ""
    assert warning(Net(layers=4), caplog, target_modules=["layers.0.q_proj"]) == ""  # named, so meant
