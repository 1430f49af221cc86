"""Tiny, randomly initialised pipelines of exactly the classes of SD 1.5 and SDXL, and folders of pictures for them."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

CAPTIONS = ("a red person", "a person in the rain", "a blue person", "a person, smiling")


def tokenizer(folder: Path):
    """A CLIPTokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def _text_config(width: int = 16):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=58, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=56, eos_token_id=57, pad_token_id=57,
    )  # fmt: skip


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        layers_per_block=1,
    )  # fmt: skip


def sd_folder(folder: Path, prediction_type: str = "epsilon", zero_snr: bool = False) -> Path:
    """A StableDiffusionPipeline folder, 16 pixels, 8x8 latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config()), tokenizer=tokenizer(folder / "words"), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def sdxl_folder(folder: Path, second: int = 16) -> Path:
    """A StableDiffusionXLPipeline folder: two text encoders (the ``second`` of this width), pooled embeddings and time ids."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16 + second, attention_head_dim=(2, 4), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + second,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config()), tokenizer=tokenizer(folder / "words"),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second)), tokenizer_2=tokenizer(folder / "words"), unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int = 3, size: int = 20) -> Path:
    """An imagefolder of ``count`` drawn pictures with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        image = Image.new("RGB", (size, size), (40 * number, 90, 200))
        ImageDraw.Draw(image).ellipse((4, 4, size - 4 - number, size - 4), fill=(220, 60 * number, 40))
        image.save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": CAPTIONS[number % len(CAPTIONS)]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
