"""Models of transformers and diffusers built small: real classes, tiny configs, random weights, no network.

``TRANSFORMERS`` and ``DIFFUSERS`` hold a function by the name people know an architecture by; :func:`build` makes one
with every gate open. Tests and ``benchmarks/coverage.py`` share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Make = Callable[[Any], nn.Module]

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_HEAD = {"head_dim": 8}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {**_SIZES, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TRANSFORMERS: dict[str, Make] = {
    # encoders of text
    "BERT": lambda t: t.BertModel(t.BertConfig(**_TEXT)),
    "DistilBERT": lambda t: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=64, n_layers=4, n_heads=4)
    ),
    "ALBERT": lambda t: t.AlbertModel(t.AlbertConfig(**_TEXT, embedding_size=16)),
    "DeBERTa-v2": lambda t: t.DebertaV2Model(
        t.DebertaV2Config(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
    ),
    "MPNet": lambda t: t.MPNetModel(t.MPNetConfig(**_TEXT)),
    "ModernBERT": lambda t: t.ModernBertModel(t.ModernBertConfig(**_TEXT, cls_token_id=1, sep_token_id=2)),
    "XLNet": lambda t: t.XLNetModel(t.XLNetConfig(vocab_size=97, d_model=32, n_layer=4, n_head=4, d_inner=64)),
    "Funnel": lambda t: t.FunnelModel(
        t.FunnelConfig(
            vocab_size=97, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[2, 2], num_decoder_layers=2
        )
    ),
    # decoders of text
    "GPT-2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "GPT-NeoX": lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_TEXT)),
    "GPT-J": lambda t: t.GPTJForCausalLM(
        t.GPTJConfig(vocab_size=97, n_embd=32, n_layer=4, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    ),
    "BLOOM": lambda t: t.BloomForCausalLM(t.BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4)),
    "OPT": lambda t: t.OPTForCausalLM(t.OPTConfig(**_TEXT, ffn_dim=64, word_embed_proj_dim=32)),
    "MPT": lambda t: t.MptForCausalLM(t.MptConfig(vocab_size=97, d_model=32, n_layers=4, n_heads=4)),
    "Falcon": lambda t: t.FalconForCausalLM(t.FalconConfig(**_TEXT)),
    "Llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**_DECODER)),
    "Gemma 3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_DECODER, **_HEAD)),
    "Phi": lambda t: t.PhiForCausalLM(t.PhiConfig(**_TEXT)),
    "Phi-3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**_DECODER)),
    "Qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**_DECODER, **_HEAD)),
    "GLM-4": lambda t: t.Glm4ForCausalLM(t.Glm4Config(**_DECODER, **_HEAD)),
    # mixtures of experts
    "Qwen3-MoE": lambda t: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_DECODER, **_HEAD, **_MOE)),
    "Mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**_DECODER, num_local_experts=4)),
    "gpt-oss": lambda t: t.GptOssForCausalLM(
        t.GptOssConfig(**_DECODER, **_HEAD, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Llama 4": lambda t: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**_DECODER, **_HEAD, num_local_experts=4, intermediate_size_mlp=64)
    ),
    "GraniteMoE": lambda t: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "JetMoE": lambda t: t.JetMoeForCausalLM(
        t.JetMoeConfig(
            **{k: v for k, v in _TEXT.items() if k != "num_attention_heads"},
            num_key_value_heads=2,
            kv_channels=8,
            num_local_experts=4,
        )
    ),
    "DeepSeek-V2": lambda t: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**_TEXT, num_key_value_heads=4, **_MLA)),
    "DeepSeek-V3": lambda t: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_TEXT, num_key_value_heads=4, **_MLA)),
    # state spaces and hybrids
    "Mamba": lambda t: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, state_size=8)
    ),
    "Mamba-2": lambda t: t.Mamba2ForCausalLM(
        t.Mamba2Config(
            vocab_size=97, hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=2
        )
    ),
    "RWKV": lambda t: t.RwkvForCausalLM(
        t.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32)
    ),
    "Jamba": lambda t: t.JambaForCausalLM(
        t.JambaConfig(
            **_DECODER, **_MAMBA, attn_layer_period=2, attn_layer_offset=1, num_experts=4, use_mamba_kernels=False
        )
    ),
    "Falcon-H1": lambda t: t.FalconH1ForCausalLM(
        t.FalconH1Config(**_DECODER, **_MAMBA, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1)
    ),
    "Bamba": lambda t: t.BambaForCausalLM(
        t.BambaConfig(**_DECODER, **_MAMBA, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, attn_layer_indices=[1])
    ),
    "Zamba2": lambda t: t.Zamba2ForCausalLM(
        t.Zamba2Config(
            **_TEXT,
            num_key_value_heads=4,
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_ngroups=1,
            num_mem_blocks=1,
            adapter_rank=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        )
    ),
    "Qwen3-Next": lambda t: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(**_DECODER, **_HEAD, **_MOE, **_LINEAR, shared_expert_intermediate_size=16)
    ),
    "RecurrentGemma": lambda t: t.RecurrentGemmaForCausalLM(
        t.RecurrentGemmaConfig(**_TEXT, num_key_value_heads=1, lru_width=32, attention_window_size=8)
    ),
    "LFM2": lambda t: t.Lfm2ForCausalLM(
        t.Lfm2Config(**_DECODER, layer_types=["conv", "conv", "full_attention", "conv"], block_multiple_of=8)
    ),
    "Granite hybrid": lambda t: t.GraniteMoeHybridForCausalLM(
        t.GraniteMoeHybridConfig(
            **_DECODER,
            **_MAMBA,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=1,
            layer_types=["mamba", "mamba", "attention", "mamba"],
        )
    ),
    # encoder-decoders
    "T5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    ),
    "T5 classifier": lambda t: t.T5ForSequenceClassification(
        t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    ),
    "BART": lambda t: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=97,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    ),
    "Whisper": lambda t: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=97,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
    # sound
    "wav2vec2": lambda t: t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            **_SIZES,
            vocab_size=97,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
        )
    ),
    "Wav2Vec2-Conformer": lambda t: t.Wav2Vec2ConformerModel(
        t.Wav2Vec2ConformerConfig(
            **_SIZES,
            vocab_size=97,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=3,
            mask_time_prob=0.0,
        )
    ),
    "AST": lambda t: t.ASTModel(t.ASTConfig(**_SIZES, num_mel_bins=16, max_length=32, patch_size=8)),
    # pictures
    "ViT": lambda t: t.ViTModel(t.ViTConfig(**_VISION)),
    "DINOv2": lambda t: t.Dinov2Model(t.Dinov2Config(**_VISION)),
    "Swin": lambda t: t.SwinModel(
        t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    ),
    "SegFormer": lambda t: t.SegformerForSemanticSegmentation(
        t.SegformerConfig(
            num_encoder_blocks=2,
            depths=[2, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        )
    ),
    "ConvNeXt": lambda t: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)),
    "ResNet": lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2])),
    "DETR": lambda t: t.DetrModel(
        t.DetrConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=6,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=t.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"]
            ),
        )
    ),
    "SAM": lambda t: t.SamModel(
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
    "DPT": lambda t: t.DPTForDepthEstimation(
        t.DPTConfig(
            **_SIZES,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            is_hybrid=False,
        )
    ),
    "TimeSformer": lambda t: t.TimesformerForVideoClassification(
        t.TimesformerConfig(**_SIZES, image_size=32, patch_size=8, num_frames=2)
    ),
    "PatchTST": lambda t: t.PatchTSTForPrediction(
        t.PatchTSTConfig(
            num_input_channels=1,
            context_length=16,
            patch_length=4,
            d_model=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            prediction_length=4,
        )
    ),
    # pictures and text
    "CLIP": lambda t: t.CLIPModel(
        t.CLIPConfig(
            text_config=t.CLIPTextConfig(**{**_TEXT, "num_hidden_layers": 2}, projection_dim=32).to_dict(),
            vision_config=t.CLIPVisionConfig(**_VISION, projection_dim=32).to_dict(),
            projection_dim=32,
        )
    ),
    "LLaVA": lambda t: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**_VISION), text_config=t.LlamaConfig(**_DECODER), image_token_index=96
        )
    ),
    "Qwen2.5-VL": lambda t: t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config={**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 4,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
            image_token_id=96,
            video_token_id=95,
            vision_start_token_id=94,
            vision_end_token_id=93,
        )
    ),
    "PaliGemma": lambda t: t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**_VISION, projection_dim=32).to_dict(),
            text_config=t.GemmaConfig(**_DECODER, **_HEAD).to_dict(),
            image_token_index=96,
            projection_dim=32,
        )
    ),
}

DIFFUSERS: dict[str, Make] = {
    "Stable Diffusion": lambda d: d.UNet2DConditionModel(**UNET),
    "SDXL": lambda d: d.UNet2DConditionModel(
        **{**UNET, "transformer_layers_per_block": (1, 2)},
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    ),
    "SD3": lambda d: d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        **_HEADS,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    "FLUX.1": lambda d: d.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        **_HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ),
    "Chroma": lambda d: d.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        **_HEADS,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    ),
    "HiDream": lambda d: d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        **_HEADS,
        caption_channels=[24, 24],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 3],
    ),
    "DiT": lambda d: d.DiTTransformer2DModel(
        **_HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10
    ),
    "Lumina 2": lambda d: d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(64, 32, 32),
        cap_feat_dim=24,
    ),
    "CogVideoX": lambda d: d.CogVideoXTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
    ),
    "CogVideoX 1.5": lambda d: d.CogVideoXTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        ofs_embed_dim=8,
    ),
    "Z-Image": lambda d: d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ),
    "Kandinsky 5": lambda d: d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    ),
    "Kandinsky 3": lambda d: d.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    ),
    "Kandinsky 2.2": lambda d: d.UNet2DConditionModel(
        **{**UNET, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}
    ),
    "Kandinsky 2.1": lambda d: d.UNet2DConditionModel(
        **{
            **UNET,
            "addition_embed_type": "text_image",
            "encoder_hid_dim_type": "text_image_proj",
            "encoder_hid_dim": 16,
        }
    ),
    "Kandinsky 2.2 hint": lambda d: d.UNet2DConditionModel(
        **{
            **UNET,
            "addition_embed_type": "image_hint",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": 16,
            "in_channels": 8,
        }
    ),
    "Kandinsky prior": lambda d: d.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=7,
        additional_embeddings=4,
    ),
    "Stable Video": lambda d: d.UNetSpatioTemporalConditionModel(
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
    "UNet 3D": lambda d: d.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    "ControlNet": lambda d: d.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    ),
    "PRX": lambda d: d.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    ),
    "PixArt": lambda d: d.PixArtTransformer2DModel(
        **_HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        cross_attention_dim=32,
    ),
    "Sana": lambda d: d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
    ),
    "Wan": lambda d: d.WanTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
    "LTX": lambda d: d.LTXVideoTransformer3DModel(
        **_HEADS, in_channels=8, out_channels=8, num_layers=2, caption_channels=24, cross_attention_dim=32
    ),
    "HunyuanVideo": lambda d: d.HunyuanVideoTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
    ),
    "Mochi": lambda d: d.MochiTransformer3DModel(
        patch_size=2,
        **_HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=12,
    ),
    "Qwen-Image": lambda d: d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
    "FLUX.2": lambda d: d.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    "AuraFlow": lambda d: d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ),
    "AnimateDiff": lambda d: d.UNetMotionModel(
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
    "Stable Cascade": lambda d: d.StableCascadeUNet(
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
    "Hunyuan-DiT": lambda d: d.HunyuanDiT2DModel(
        **_HEADS,
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

# Inputs of those that take others than a config tells.
INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "HiDream": lambda: {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timesteps": torch.tensor([5]),
        "encoder_hidden_states_t5": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states_llama3": torch.randn(4, 1, 6, 24, generator=torch.Generator().manual_seed(2)),
        "pooled_embeds": torch.randn(1, 16, generator=torch.Generator().manual_seed(3)),
    },
}


def library(name: str) -> str:
    """The package that holds the class of a model of this module."""
    return "transformers" if name in TRANSFORMERS else "diffusers"


def build(name: str) -> nn.Module:
    """A tiny model in evaluation, the same on every call; what a fresh model holds at zero, such as gates, is open.

    Raises:
        ImportError: its library is not installed.
        AttributeError: this release of the library has no such class.
    """
    from importlib import import_module

    package = import_module(library(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {**TRANSFORMERS, **DIFFUSERS}[name](package).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model
