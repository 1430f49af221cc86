"""Default targets: every block of a model's main part holds an adapted layer, and nothing is hit by accident."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

import smidgen
from benchmarks import tiny_models
from smidgen.adapters.tuner.coverage import coverage
from smidgen.adapters.tuner.targets import shortest_names
from smidgen.errors import TargetError

from .test_coverage import tiny

MLP = {"gate_proj", "up_proj", "down_proj"}
# What users of each would name themselves; published counts rest on the first ones.
EXPECTED: dict[str, set[str]] = {
    "BERT": {"query", "value"},
    "DistilBERT": {"q_lin", "v_lin"},
    "DeBERTa-v2": {"query_proj", "value_proj"},
    "GPT-2": {"c_attn"},
    "BLOOM": {"query_key_value"},
    "Llama": {"q_proj", "v_proj"},
    "BART": {"q_proj", "v_proj"},
    "Whisper": {"q_proj", "v_proj"},
    "CLIP": {"q_proj", "v_proj"},
    "Stable Diffusion": {"to_q", "to_k", "to_v", "to_out.0"},
    "SDXL": {"to_q", "to_k", "to_v", "to_out.0"},
    "T5": {"q", "k", "v", "o", "wi", "wo"},
    "T5 classifier": {"q", "k", "v", "o", "wi", "wo"},
    "MPNet": {"q", "k", "v", "o", "intermediate.dense", "output.dense"},
    "ModernBERT": {"Wqkv", "Wo", "Wi"},
    "Phi-3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "MPT": {"Wqkv", "out_proj", "up_proj", "down_proj"},
    "Mamba": {"in_proj", "x_proj", "out_proj"},  # dt_proj is read, not called
    "Mamba-2": {"in_proj", "out_proj"},
    "DeepSeek-V2": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} | MLP,
    "DeepSeek-V3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} | MLP,
    "LFM2": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"},
    "Falcon-H1": {"q_proj", "v_proj"},  # attention beside a state space in every block
    "ConvNeXt": {"pwconv1", "pwconv2"},
    "SD3": {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"},
    "HiDream": {"to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"},
}


FIVE = pytest.mark.skipif(transformers.__version__ < "5", reason="modules have other names in transformers 4")


@FIVE
@pytest.mark.parametrize("name", EXPECTED)
def test_names(name: str) -> None:
    assert smidgen.default_targets(tiny(name)) == EXPECTED[name]


WHOLE = (
    "Qwen3-Next", "Jamba", "Bamba", "Zamba2", "RecurrentGemma", "Granite hybrid", "RWKV", "JetMoE", "XLNet", "Funnel",
    "Wav2Vec2-Conformer", "TimeSformer", "ResNet", "FLUX.1", "FLUX.2", "Kandinsky 5", "PRX", "HunyuanVideo",
)  # fmt: skip


@FIVE
@pytest.mark.parametrize("name", WHOLE)
def test_every_block_of_the_main_part(name: str) -> None:
    model = smidgen.adapt(tiny(name), "lora", r=2)
    stacks = [s for s in coverage(model, "default").stacks if s.share >= 0.2]
    assert stacks and all(stack.touched == stack.blocks for stack in stacks)


def test_whole_blocks_of_flux_2_but_no_modulation() -> None:
    targets = smidgen.default_targets(tiny("FLUX.2"))
    assert {"to_q", "add_k_proj", "to_qkv_mlp_proj", "single_transformer_blocks.3.attn.to_out"} <= targets
    kandinsky = smidgen.default_targets(tiny("Kandinsky 5"))
    assert "to_query" in kandinsky and not any("mod" in target for target in kandinsky)


@pytest.mark.parametrize("name", ["Qwen3-Next", "DeepSeek-V3", "Granite hybrid"])
def test_neither_routers_nor_routed_experts(name: str) -> None:
    model = smidgen.adapt(tiny(name), "lora", r=2)
    hit = [n for n, m in model.named_modules() if hasattr(m, "smidgen_slots")]
    assert not [n for n in hit if ".experts." in n or "router" in n or n.endswith((".gate", "shared_expert_gate"))]


@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma", "Qwen2.5-VL"])
def test_only_the_language_part_of_a_model_that_writes(name: str) -> None:
    model = smidgen.adapt(tiny(name), "lora", r=2)
    hit = [n for n, m in model.named_modules() if hasattr(m, "smidgen_slots")]
    assert len(hit) == 8 and all("language_model" in n for n in hit)


def test_blocks_of_a_model_of_nobody_s_library() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_scale, self.mix, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    mixers = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*(Mixer() for _ in range(3))), nn.Linear(8, 2))
    assert smidgen.default_targets(mixers) == {"mix", "out"}
    assert smidgen.default_targets(nn.Sequential(*(Mixer() for _ in range(3)))) == {"mix", "out"}
    with pytest.raises(TargetError, match=r"no repeated blocks; name target_modules\. Modules end in: head"):
        smidgen.default_targets(nn.ModuleDict({"head": nn.Linear(2, 2)}))


def test_a_layer_whose_weight_is_read_is_no_default() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, conv_dim=(8,),
        conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    assert smidgen.default_targets(transformers.WavLMModel(config)) == {"intermediate_dense", "output_dense"} | {
        "gru_rel_pos_linear"
    }


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"a.q", "b.q"}, {"q"}),
        ({"a.q"}, {"a.q"}),
        ({"a.out.0", "b.out.0"}, {"out.0"}),
        ({"x.0.q", "x.1.q"}, {"x.0.q", "x.1.q"}),  # "0.q" and "1.q" would hit the other list
    ],
)
def test_shortest_names(chosen: set[str], names: set[str]) -> None:
    modules = ["", "a", "b", "a.q", "b.q", "a.out", "a.out.0", "b.out", "b.out.0", "x.0.q", "x.1.q", "y.0.q"]
    if chosen == {"a.q", "b.q"}:
        modules = modules[:9]
    assert shortest_names(chosen, modules) == names


def test_every_name_of_the_tables_is_of_one_library() -> None:
    assert not tiny_models.TRANSFORMERS.keys() & tiny_models.DIFFUSERS.keys()
