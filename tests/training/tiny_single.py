"""Tiny pipelines as one file, in the names of the programs that such files are made for: the inverse of diffusers' own conversion."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.", ".self_attn": ".attn", "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
}  # fmt: skip


def _unet(tensors: dict, layers: int) -> dict:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    fixed = known["layers"] | known["addition_embed_type"]
    attended = {match[1] for key in tensors if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))}

    def named(key: str) -> str:
        if key in fixed:
            return fixed[key]
        side, *rest = key.split(".")
        if side == "mid_block":
            kind, at, rest = rest[0], int(rest[1]), rest[2:]
            start = f"middle_block.{2 * at if kind == 'resnets' else 1}"
        else:
            block, kind, at, rest = int(rest[0]), rest[1], int(rest[2]), rest[3:]
            down = side == "down_blocks"
            row = block * (layers + 1) + at + down
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest[-1]}"
            if kind == "upsamplers":
                return f"output_blocks.{block * (layers + 1) + layers}.{2 if str(block) in attended else 1}.conv.{rest[-1]}"
            start = f"{'input' if down else 'output'}_blocks.{row}.{int(kind == 'attentions')}"
        rest = [RESNET.get(word, word) for word in rest] if kind == "resnets" else rest
        return ".".join([start, *rest])

    return {f"model.diffusion_model.{named(key)}": value for key, value in tensors.items()}


def _vae(tensors: dict, blocks: int) -> dict:
    found = {}
    for key, value in tensors.items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        up = lambda match: f"up.{blocks - 1 - int(match[1])}."  # noqa: E731
        key = re.sub(r"up_blocks\.(\d+)\.", up, key).replace("resnets", "block").replace("upsamplers.0", "upsample")
        key = re.sub(r"mid_block\.block\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"\.to_([qkv])\.", r".\1.", key).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[f"first_stage_model.{key}"] = value
    return found


def _clip(tensors: dict, start: str) -> dict:
    return {f"{start}text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}


def _open_clip(tensors: dict, start: str) -> dict:
    found, fused = {}, {}
    for key, value in tensors.items():
        key = key.removeprefix("text_model.")
        for theirs, ours in OPEN_CLIP.items():
            key = key.replace(theirs, ours)
        match = re.fullmatch(r"(.*)\.([qkv])_proj\.(weight|bias)", key)
        if match:
            fused.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = value
        elif key == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        else:
            found[key] = value
    found |= {key: torch.cat([parts[letter] for letter in "qkv"]) for key, parts in fused.items()}
    return {start + key: value for key, value in found.items()}


def _part(folder: Path, name: str) -> dict:
    return load_file(next((folder / name).glob("*.safetensors")))


def sd_file(folder: Path, path: Path) -> Path:
    """The pipeline of ``tiny.sd_folder`` in one file."""
    tensors = _unet(_part(folder, "unet"), 1) | _vae(_part(folder, "vae"), 2)
    save_file(tensors | _clip(_part(folder, "text_encoder"), "cond_stage_model.transformer."), path)
    return path


def sdxl_file(folder: Path, path: Path) -> Path:
    """The pipeline of ``tiny.sdxl_folder`` in one file; its second text encoder must have another width."""
    tensors = _unet(_part(folder, "unet"), 1) | _vae(_part(folder, "vae"), 2)
    tensors |= _clip(_part(folder, "text_encoder"), "conditioner.embedders.0.transformer.")
    save_file(tensors | _open_clip(_part(folder, "text_encoder_2"), "conditioner.embedders.1.model."), path)
    return path


def z_image_file(folder: Path, path: Path) -> Path:
    """The transformer of a Z-Image pipeline, as its makers and ComfyUI have it."""
    tensors, fused = {}, {}
    for key, value in _part(folder, "transformer").items():
        match = re.fullmatch(r"(.*attention)\.to_([qkv])\.weight", key)
        if match:
            fused.setdefault(f"{match[1]}.qkv.weight", {})[match[2]] = value
            continue
        for theirs, ours in (
            ("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1.", "x_embedder."), (".to_out.0.", ".out."),
            (".norm_k.", ".k_norm."), (".norm_q.", ".q_norm."),
        ):  # fmt: skip
            key = key.replace(theirs, ours)
        tensors[key] = value
    tensors |= {key: torch.cat([parts[letter] for letter in "qkv"]) for key, parts in fused.items()}
    save_file({f"model.diffusion_model.{key}": value for key, value in tensors.items()}, path)
    return path
