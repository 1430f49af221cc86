"""Stages `export` and `card`: the trained parts as one diffusers folder in fp16 safetensors, and its model card."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from smidgen.adapters.atomic import replace_file, replace_folder
from smidgen.lab.embedded_base import autoencoder, diffusion, text
from smidgen.lab.embedded_base.config import Config

PREFIX = (
    "text_model."  # every transformers reads CLIP's weights by these names; without it, 4 and 5.0 read none of them
)


def _load_average(model: nn.Module, checkpoint: Path) -> nn.Module:
    tensors = load_file(checkpoint)
    model.load_state_dict({n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")})
    return model.eval()


def vae(config: Config, folder: Path) -> AutoencoderKL:
    """The frozen encoder with the best decoder there is: the fine-tuned one if that stage has run."""
    model = autoencoder.freeze(config, folder)
    fine_tuned = folder / "decoder.safetensors"
    if fine_tuned.exists():
        _load_average(model, fine_tuned)
    return model.requires_grad_(False).eval()


def pipeline(config: Config, folder: Path) -> StableDiffusionPipeline:
    """The whole model, averaged weights, fp32, from the checkpoints in `folder`."""
    words = text.tokenizer(folder / "tokenizer", config.drawn())
    denoiser = _load_average(diffusion.Denoiser(config, words), folder / "diffusion.safetensors")
    return StableDiffusionPipeline(
        vae=vae(config, folder),
        text_encoder=denoiser.text_encoder,
        tokenizer=words,
        unet=denoiser.unet,
        scheduler=diffusion.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(config: Config, folder: Path, out: Path) -> None:
    """Write the pipeline folder `out` in fp16, replacing an older one, but for its card, when the new one is complete."""
    with replace_folder(out) as scratch:
        pipeline(config, folder).to(dtype=torch.float16).save_pretrained(scratch, safe_serialization=True)
        read_by_all(scratch, folder / "tokenizer")
        for path in scratch.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        if (out / "README.md").exists():
            shutil.copy(out / "README.md", scratch / "README.md")


def read_by_all(pipeline: Path, tokenizer: Path) -> None:
    """Make a saved pipeline's text encoder and tokenizer such that every transformers reads them, the encoder in fp32."""
    weights = pipeline / "text_encoder" / "model.safetensors"
    tensors = {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    settings = json.loads((pipeline / "text_encoder" / "config.json").read_text())
    settings["dtype"] = "float32"  # else it alone loads in fp16
    write_json(pipeline / "text_encoder" / "config.json", settings)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, pipeline / "tokenizer" / name)


def training_facts(config: Config, folder: Path) -> dict[str, float]:
    """Steps and minutes of each training so far, from the checkpoints' headers (`diffusion_first`: one before a restart
    from its weights, if there was one)."""
    from safetensors import safe_open

    facts: dict[str, float] = {}
    for name in ("autoencoder", "decoder", "diffusion_first", "diffusion", "judge_reader", "judge_identity"):
        path = folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            facts[f"{name}_steps"] = int(metadata["step"])
            facts[f"{name}_minutes"] = round(float(metadata["seconds"]) / 60, 1)
    return facts


def write_json(path: Path, value: dict) -> None:
    """Write JSON atomically."""
    replace_file(path, json.dumps(value, indent=2) + "\n")
