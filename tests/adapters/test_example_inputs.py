"""verify makes a pass by itself for these models: inputs follow from a model's signature and config."""

from __future__ import annotations

from pathlib import Path

import pytest

import smidgen
from benchmarks import tiny_models
from smidgen import testing

t = pytest.importorskip("transformers")
d = pytest.importorskip("diffusers")

MODELS = (
    "T5 classifier", "SAM", "DPT", "TimeSformer", "PatchTST", "Lumina 2", "CogVideoX", "CogVideoX 1.5", "Z-Image",
    "Kandinsky 5", "Kandinsky 3", "Kandinsky 2.2", "Kandinsky 2.1", "Kandinsky 2.2 hint", "Kandinsky prior",
    "Stable Video", "UNet 3D", "ControlNet", "PRX", "PixArt", "Sana", "Wan", "LTX", "HunyuanVideo", "Mochi",
    "Qwen-Image", "FLUX.2", "AuraFlow", "AnimateDiff", "Stable Cascade", "Hunyuan-DiT",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_proven_without_inputs(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    smidgen.save(testing.perturb(smidgen.adapt(model, "lora", r=2, target_modules="all-linear"), size=0.3), tmp_path)
    report = smidgen.verify(model, tmp_path)
    assert report.verdict == "ON", report.reasons


@pytest.mark.parametrize("name", ["AnimateDiff", "UNet 3D", "Stable Video"])
def test_films_have_frames_enough_for_an_adapter_on_attention_over_time(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    over_time = [n for n, _ in model.named_modules() if "temp" in n or "motion" in n]
    targets = [n for n in over_time if n.endswith("attn1.to_q")]
    smidgen.save(testing.perturb(smidgen.adapt(model, "lora", r=2, target_modules=targets), size=0.5), tmp_path)
    report = smidgen.verify(model, tmp_path)
    assert report.verdict == "ON" and not report.not_called, report.reasons


def test_a_model_that_asks_for_inputs(tmp_path: Path) -> None:
    model = d.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=32, num_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, pad_token_id=0, vocab_size=100, rope_scaling={"long_factor": [1] * 8, "short_factor": [1] * 8},
    )  # fmt: skip
    smidgen.save(testing.perturb(smidgen.adapt(model, "lora", r=2, target_modules=["to_q"])), tmp_path)
    report = smidgen.verify(model, tmp_path)
    assert report.verdict == "NOT PROVEN" and "pass inputs=" in report.reasons[0]
