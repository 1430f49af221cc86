"""verify makes a pass by itself for these models: inputs follow from a model's signature and config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import smidgen
from smidgen import testing

t = pytest.importorskip("transformers")
d = pytest.importorskip("diffusers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "T5 classifier": lambda: t.T5ForSequenceClassification(
        t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    ),
    "SAM": lambda: t.SamModel(
        t.SamConfig(
            vision_config=t.SamVisionConfig(
                hidden_size=32,
                output_channels=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                mlp_dim=64,
                global_attn_indexes=[1],
                window_size=2,
                num_pos_feats=8,
            ).to_dict(),
            prompt_encoder_config=t.SamPromptEncoderConfig(
                hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4
            ).to_dict(),
            mask_decoder_config=t.SamMaskDecoderConfig(
                hidden_size=16, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=16
            ).to_dict(),
        )
    ),
    "DPT": lambda: t.DPTForDepthEstimation(
        t.DPTConfig(
            **{**SIZES, "num_hidden_layers": 4},
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            is_hybrid=False,
        )
    ),
    "TimeSformer": lambda: t.TimesformerForVideoClassification(
        t.TimesformerConfig(**SIZES, image_size=32, patch_size=8, num_frames=2)
    ),
    "PatchTST": lambda: t.PatchTSTForPrediction(
        t.PatchTSTConfig(
            num_input_channels=1,
            context_length=16,
            patch_length=4,
            d_model=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            prediction_length=4,
        )
    ),
    "Lumina 2": lambda: d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(64, 32, 32),
        cap_feat_dim=24,
    ),
    "CogVideoX": lambda: d.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
    ),
    "CogVideoX 1.5": lambda: d.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        ofs_embed_dim=8,
    ),
    "Z-Image": lambda: d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ),
    "Kandinsky 5": lambda: d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    ),
    "Kandinsky 3": lambda: d.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    ),
    "Kandinsky 2.2": lambda: d.UNet2DConditionModel(
        **{**UNET, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}
    ),
    "Kandinsky 2.1": lambda: d.UNet2DConditionModel(
        **{
            **UNET,
            "addition_embed_type": "text_image",
            "encoder_hid_dim_type": "text_image_proj",
            "encoder_hid_dim": 16,
        }
    ),
    "Kandinsky 2.2 hint": lambda: d.UNet2DConditionModel(
        **{
            **UNET,
            "addition_embed_type": "image_hint",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": 16,
            "in_channels": 8,
        }
    ),
    "Kandinsky prior": lambda: d.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=7,
        additional_embeddings=4,
    ),
    "Stable Video": lambda: d.UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=48,
        addition_time_embed_dim=16,
    ),
    "UNet 3D": lambda: d.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    "ControlNet": lambda: d.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    ),
    "PRX": lambda: d.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
    ),
    "PixArt": lambda: d.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        cross_attention_dim=32,
    ),
    "Sana": lambda: d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
    ),
    "Wan": lambda: d.WanTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
    "LTX": lambda: d.LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, num_layers=1, caption_channels=24, cross_attention_dim=32
    ),
    "HunyuanVideo": lambda: d.HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
    ),
    "Mochi": lambda: d.MochiTransformer3DModel(
        patch_size=2,
        **HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=12,
    ),
    "Qwen-Image": lambda: d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
    "FLUX.2": lambda: d.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    "AuraFlow": lambda: d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ),
    "AnimateDiff": lambda: d.UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        num_attention_heads=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=2,
    ),
    "Stable Cascade": lambda: d.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=1,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        clip_seq=2,
        switch_level=(False,),
    ),
    "Hunyuan-DiT": lambda: d.HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=6,
        text_len_t5=6,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_proven_without_inputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # a fresh model's gates are shut
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    smidgen.save(testing.perturb(smidgen.adapt(model, "lora", r=2, target_modules="all-linear"), size=0.3), tmp_path)
    report = smidgen.verify(model, tmp_path)
    assert report.verdict == "ON", report.reasons


@pytest.mark.parametrize("name", ["AnimateDiff", "UNet 3D", "Stable Video"])
def test_films_have_frames_enough_for_an_adapter_on_attention_over_time(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
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
