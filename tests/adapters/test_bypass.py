"""Law "bypass": a layer that a forward pass does not call is refused when it is adapted, or reported off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smidgen
from benchmarks.tiny_models import UNET
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import TargetError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.att(x, x, x, need_weights=False)[0]


class ByWeight(nn.Module):
    """As BEiT and Swin V2 of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.linear(x, self.qkv.weight, self.qkv.bias))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pooler = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Thrown(nn.Module):
    """Calls a layer and throws its output away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(x)


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def tokens() -> Tensor:
    return torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def judged(model: nn.Module, folder: Path, targets: object, inputs: object = None, **options: object):  # type: ignore[no-untyped-def]
    """What verify says of a model with a trained adapter on the targets."""
    smidgen.adapt(model, "lora", r=4, target_modules=targets)
    smidgen.save(testing.perturb(model, size=0.3), folder)
    return smidgen.verify(model, folder, inputs)  # type: ignore[arg-type]


# ---- torch ---------------------------------------------------------------------------------------------------------------


def test_attention_of_torch_is_refused_and_left_as_it_was() -> None:
    model = Attention()
    before = testing.snapshot(model)
    for targets in (["att.out_proj"], "all-linear"):
        with pytest.raises(TargetError, match=r"out_proj.*reads the weights of its projections"):
            smidgen.adapt(model, "lora", r=4, target_modules=targets)
        testing.unchanged(before, model, f"refused {targets}")


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"], "all-linear"])
def test_an_encoder_of_torch_answers_in_evaluation_as_it_was_trained(targets: object, tmp_path: Path) -> None:
    model, x = encoder().eval(), tokens()
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        base, padded = model(x), model(x, src_key_padding_mask=padding)
    report = judged(model, tmp_path, targets, (x,))
    assert report.verdict == "ON" and not report.not_called, report.reasons
    with torch.no_grad():
        found, found_padded = model.eval()(x), model(x, src_key_padding_mask=padding)
        testing.close(found, model.train()(x), "evaluation against training")
        testing.differs(found, base, "the adapter in evaluation")
        testing.differs(found_padded[:, :4], padded[:, :4], "the adapter with padding")
        with smidgen.disabled(model.eval()):
            testing.close(model(x), base, "switched off")


def test_an_encoder_has_its_fast_path_again_when_the_adapter_is_gone() -> None:
    model = encoder().eval()
    model.requires_grad_(False)
    before, kept = testing.snapshot(model), [dict(m.__dict__) for m in model.modules()]
    smidgen.adapt(model, "lora", r=4, target_modules=["linear1"])
    assert not model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 0
    smidgen.merge(model)
    testing.unchanged(before, model, "merged without training")
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(k) for k in kept]
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


def test_all_linear_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smidgen"):
        model = smidgen.adapt(encoder(), "lora", r=4, target_modules="all-linear")
    assert sorted(adapted_layers(model)) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert "leaves out 2 of 6 layers" in caplog.text


@pytest.mark.parametrize("inputs", [None, (tokens(),), {"x": tokens()}, lambda model: model(tokens())])
@pytest.mark.parametrize(("make", "target"), [(ByWeight, "qkv"), (Unused, "pooler")])
def test_a_layer_that_is_not_called_is_off(
    make: Callable[[], nn.Module], target: str, inputs: object, tmp_path: Path
) -> None:
    report = judged(make(), tmp_path, [target], inputs)
    assert report.verdict == "OFF" and not report.ok and report.called == 0
    assert f"Layer {target!r} is not called by a forward pass" in report.reasons[0]


def test_an_unused_layer_among_others_is_named(tmp_path: Path) -> None:
    report = judged(Unused(), tmp_path, ["a", "pooler"])
    assert report.verdict == "ON" and report.not_called == ["pooler"] and report.called == 1
    assert "not called    pooler" in str(report)


def test_a_kind_whose_weight_is_read_is_off_though_others_are_called(tmp_path: Path) -> None:
    report = judged(nn.Sequential(ByWeight(), ByWeight()), tmp_path, ["qkv", "proj"])
    assert report.verdict == "OFF" and report.called == 2
    assert "call none of them" in report.reasons[0] and "'0.qkv'" in report.reasons[0]


def test_an_output_that_does_not_move_is_off(tmp_path: Path) -> None:
    report = judged(Thrown(), tmp_path, ["a"])
    assert report.verdict == "OFF" and report.called == 1 and report.moved == 0
    assert "the same with the adapter on and off" in report.reasons[0]


def test_training_alone_is_not_enough(tmp_path: Path) -> None:
    class Switches(ByWeight):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)) if self.training else super().forward(x)

    report = judged(Switches().train(), tmp_path, ["qkv", "proj"])
    assert report.verdict == "OFF" and "in training but not in evaluation" in report.reasons[0]


# ---- transformers ----------------------------------------------------------------------------------------------------------


def mamba() -> nn.Module:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))


def test_mamba(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"dt_proj.*MambaMixer reads its weight.*in_proj or out_proj or x_proj"):
        smidgen.adapt(mamba(), "lora", r=4, target_modules=["dt_proj"])
    report = judged(mamba(), tmp_path, "all-linear")
    assert report.verdict == "ON" and not report.not_called and report.layers == 6, report.reasons


@pytest.mark.parametrize("experts", ["shared", "hybrid"])
def test_hybrid_and_mixture_of_experts(experts: str, tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    moe = {
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    if experts == "shared":
        model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **moe, num_hidden_layers=2))
    elif not hasattr(tf, "Qwen3NextConfig"):
        pytest.skip(f"transformers {tf.__version__} has no Qwen3-Next")
    else:
        linear = {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
        model = tf.Qwen3NextForCausalLM(
            tf.Qwen3NextConfig(**sizes, **moe, **linear, num_hidden_layers=4, shared_expert_intermediate_size=16)
        )
    report = judged(model, tmp_path, "all-linear")
    idle = [
        name for name in report.not_called if ".experts." not in name
    ]  # transformers 4 calls experts that get tokens
    assert report.verdict == "ON" and not idle, report.reasons


def test_a_pooler_that_nothing_uses(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = tf.BertModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.bert.embeddings(ids).mean(1) + self.bert.encoder(self.bert.embeddings(ids))[0].mean(1)

    report = judged(Mean(), tmp_path, ["query", "pooler.dense"], (torch.arange(8)[None],))
    assert report.verdict == "ON" and report.not_called == ["bert.pooler.dense"], report.reasons


# ---- diffusers ---------------------------------------------------------------------------------------------------------------


def denoiser(family: str) -> nn.Module:
    d = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"sample_size": 8, **UNET}
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "joint_attention_dim": 24}
    if family == "sd":
        return d.UNet2DConditionModel(**blocks)
    if family == "sdxl":
        return d.UNet2DConditionModel(**blocks, **sdxl)
    if family == "flux":
        return d.FluxTransformer2DModel(
            **heads, num_layers=1, num_single_layers=1, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)
        )
    return d.SD3Transformer2DModel(
        **heads, sample_size=8, patch_size=2, num_layers=2, caption_projection_dim=32, pooled_projection_dim=16,
        out_channels=8,
    )  # fmt: skip


FAMILIES = ["sd", "sdxl", "flux", "sd3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_denoisers_and_their_fused_projections(family: str, tmp_path: Path) -> None:
    model = denoiser(family).eval()
    report = judged(model, tmp_path, ATTENTION)
    assert report.verdict == "ON" and not report.not_called, report.reasons
    model.fuse_qkv_projections()
    report = smidgen.verify(model, tmp_path)
    assert report.verdict == "OFF" and any("to_qkv" in r and "is not called" in r for r in report.reasons), (
        report.reasons
    )
    model.unfuse_qkv_projections()
    assert smidgen.verify(model, tmp_path).verdict == "ON"
    fresh = denoiser(family).eval()
    fresh.fuse_qkv_projections()
    assert smidgen.verify(fresh, tmp_path).verdict == "OFF"
    for attempt in (
        lambda: smidgen.load(fresh, tmp_path),
        lambda: smidgen.adapt(fresh, "lora", r=4, target_modules=ATTENTION),
    ):
        with pytest.raises(TargetError, match=r"answers through to_.*unfuse_qkv_projections"):
            attempt()
    fresh.unfuse_qkv_projections()
    assert smidgen.verify(fresh, tmp_path).verdict == "ON"
