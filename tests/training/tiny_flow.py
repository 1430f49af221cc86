"""Tiny, randomly initialised pipelines of exactly the classes of the flow-matching families, with their own kinds of text encoders."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.training import tiny

WIDTH = 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def tokenizer(limit: int):
    """A fast tokenizer of single bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: number for number, word in enumerate([*SPECIAL, *letters])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(list(SPECIAL))
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=SPECIAL[0], eos_token=SPECIAL[2], model_max_length=limit
    )
    found.chat_template = TEMPLATE
    return found


def _language(limit: int, layers: int = 3) -> dict[str, Any]:
    return {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": limit, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _vae(channels: int = 4, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, sample_size=16, layers_per_block=1, scaling_factor=0.4,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _moments(channels: int) -> dict[str, list[float]]:
    return {"latents_mean": [0.1 * n for n in range(channels)], "latents_std": [1 + 0.1 * n for n in range(channels)]}


def _t5(cls: str = "T5"):
    import transformers

    config = getattr(transformers, f"{cls}Config")(
        vocab_size=259, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    return getattr(transformers, f"{cls}EncoderModel")(config)


def _flux2(dev: bool):
    import diffusers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.2, 0.2), vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=dev,
    )  # fmt: skip
    if dev:
        text = {"text_config": {"model_type": "mistral", **_language(128, 31)}, "image_token_index": 258}
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        }
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(vision_config={"model_type": "pixtral", **vision}, **text)
        )
    else:
        encoder = Qwen3ForCausalLM(Qwen3Config(**_language(128, 28)))
    cls = diffusers.Flux2Pipeline if dev else diffusers.Flux2KleinPipeline
    return cls(
        scheduler=_scheduler(use_dynamic_shifting=True), vae=vae, text_encoder=encoder, tokenizer=tokenizer(128),
        transformer=transformer,
    )  # fmt: skip


def _z_image():
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(Qwen3Config(**_language(128))).model
    return diffusers.ZImagePipeline(_scheduler(shift=3.0), _vae(), encoder, tokenizer(128), transformer)


def _qwen_vae():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **_moments(4)
    )


def _vision() -> dict[str, Any]:
    return {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def _qwen_image():
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _language(256) | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=_vision()))
    scheduler = _scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(scheduler, _qwen_vae(), encoder, tokenizer(1024), transformer)


def _krea2():
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = _language(640) | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=_vision() | {"deepstack_visual_indexes": [0]}))
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=48, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = _scheduler(use_dynamic_shifting=True)
    return diffusers.Krea2Pipeline(
        scheduler, _qwen_vae(), encoder, tokenizer(640), transformer, text_encoder_select_layers=(1, 2)
    )


def _sd3(folder: Path):
    import diffusers
    from transformers import CLIPTextModelWithProjection

    clip = [CLIPTextModelWithProjection(tiny._text_config()) for _ in range(2)]
    words = tiny.tokenizer(folder / "words")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_scheduler(shift=3.0), vae=_vae(), text_encoder=clip[0], tokenizer=words,
        text_encoder_2=clip[1], tokenizer_2=words, text_encoder_3=_t5(), tokenizer_3=tokenizer(256),
    )  # fmt: skip


def _chroma():
    import diffusers

    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(_scheduler(use_dynamic_shifting=True), _vae(), _t5(), tokenizer(512), transformer)


def _wan():
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], scale_factor_spatial=2,
        scale_factor_temporal=4, **_moments(4),
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=WIDTH,
        freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return diffusers.WanPipeline(tokenizer(512), _t5("UMT5"), vae, scheduler, transformer)


BUILDERS = {
    "flux2": lambda folder: _flux2(True), "flux2-klein": lambda folder: _flux2(False), "z-image": lambda folder: _z_image(),
    "qwen-image": lambda folder: _qwen_image(), "krea2": lambda folder: _krea2(), "sd3": _sd3,
    "chroma": lambda folder: _chroma(), "wan": lambda folder: _wan(),
}  # fmt: skip


def flow_folder(family: str, folder: Path) -> Path:
    """A pipeline folder of ``family``; older libraries lack some families or what their small parts are made of."""
    if Version(version("diffusers")) < Version("0.42") or Version(version("transformers")) < Version("5"):
        pytest.skip("the flow families are held to diffusers 0.42 and transformers 5")
    torch.manual_seed(0)
    pipe = BUILDERS[family](folder)
    for parameter in pipe.transformer.parameters():  # what starts at zero would hide what it stands for
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    pipe.save_pretrained(folder)
    return folder
