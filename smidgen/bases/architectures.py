"""Named architectures, built on the meta device: the shapes of published models without their weights or a network.

Configs are those of the published checkpoints, written out here; ``parameters`` is the published size, which a test
holds every config against. Default targets are those of the papers' tables (SVFT's for DeBERTa and Gemma).

Nothing here imports transformers or diffusers until an architecture is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smidgen.errors import ConfigError, MissingExtraError, TargetError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """Shape of one published model.

    Args:
        name: the word used in ``smidgen count --architecture``.
        model_class: class to build, of ``library``.
        config_class: config to build it from (transformers), or None when the class takes the options itself.
        options: config values that differ from the class's defaults, and those that fix the shape.
        targets: default target modules; alternatives when releases of the library name them differently.
        parameters: numbers in the base model as built here.
        source: the checkpoint whose config it is.
    """

    name: str
    model_class: str
    config_class: str | None
    options: Mapping[str, Any]
    targets: tuple[frozenset[str], ...]
    parameters: int
    source: str

    @property
    def library(self) -> str:
        """The package that holds the class."""
        return "transformers" if self.config_class else "diffusers"

    def targets_in(self, model: nn.Module) -> set[str]:
        """Default target modules under the names this release of the library gives them.

        Raises:
            TargetError: no alternative is there, so the library renamed them.
        """
        names = [name for name, _ in model.named_modules()]
        for wanted in self.targets:
            if all(any(n == w or n.endswith(f".{w}") for n in names) for w in wanted):
                return set(wanted)
        raise TargetError(
            f"The default targets of {self.name!r} ({' or '.join(str(sorted(t)) for t in self.targets)}) are not in "
            f"this release's {self.model_class}; name target_modules."
        )


def _transformer(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_VIT = {"image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True}
_GEMMA = {"vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True}
_ATTENTION = (frozenset({"to_q", "to_k", "to_v", "to_out.0"}),)
_QUERY_VALUE = (frozenset({"query", "value"}), frozenset({"q_proj", "v_proj"}))
_SEVEN = (frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),)

_SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_DEBERTA_V3_BASE = _transformer(
    768,
    12,
    12,
    3072,
    vocab_size=128100,
    max_position_embeddings=512,
    type_vocab_size=0,
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
    pooler_hidden_size=768,
)
_LLAMA2_7B = _transformer(4096, 32, 32, 11008, vocab_size=32000, num_key_value_heads=32)
_LLAMA3_8B = _transformer(4096, 32, 32, 14336, vocab_size=128256, num_key_value_heads=8)
_GEMMA_2B = _transformer(2048, 18, 8, 16384, num_key_value_heads=1, **_GEMMA)
_GEMMA_7B = _transformer(3072, 28, 16, 24576, num_key_value_heads=16, **_GEMMA)
_DEBERTA_TARGETS = (frozenset({"query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"}),)

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture(
            "sd15",
            "UNet2DConditionModel",
            None,
            _SD15,
            _ATTENTION,
            859_520_964,
            "stable-diffusion-v1-5/stable-diffusion-v1-5, unet",
        ),
        Architecture(
            "sdxl",
            "UNet2DConditionModel",
            None,
            _SDXL,
            _ATTENTION,
            2_567_463_684,
            "stabilityai/stable-diffusion-xl-base-1.0, unet",
        ),
        Architecture(
            "roberta-base",
            "RobertaModel",
            "RobertaConfig",
            _transformer(768, 12, 12, 3072, **_ROBERTA),
            _QUERY_VALUE,
            124_645_632,
            "FacebookAI/roberta-base",
        ),
        Architecture(
            "roberta-large",
            "RobertaModel",
            "RobertaConfig",
            _transformer(1024, 24, 16, 4096, **_ROBERTA),
            _QUERY_VALUE,
            355_359_744,
            "FacebookAI/roberta-large",
        ),
        Architecture(
            "vit-base",
            "ViTModel",
            "ViTConfig",
            _transformer(768, 12, 12, 3072, **_VIT),
            _QUERY_VALUE,
            86_389_248,
            "google/vit-base-patch16-224-in21k",
        ),
        Architecture(
            "vit-large",
            "ViTModel",
            "ViTConfig",
            _transformer(1024, 24, 16, 4096, **_VIT),
            _QUERY_VALUE,
            304_351_232,
            "google/vit-large-patch16-224-in21k",
        ),
        Architecture(
            "llama2-7b",
            "LlamaForCausalLM",
            "LlamaConfig",
            _LLAMA2_7B,
            _QUERY_VALUE[1:],
            6_738_415_616,
            "meta-llama/Llama-2-7b-hf",
        ),
        Architecture(
            "llama3-8b",
            "LlamaForCausalLM",
            "LlamaConfig",
            _LLAMA3_8B,
            _SEVEN,
            8_030_261_248,
            "meta-llama/Meta-Llama-3-8B",
        ),
        Architecture(
            "deberta-v3-base",
            "DebertaV2Model",
            "DebertaV2Config",
            _DEBERTA_V3_BASE,
            _DEBERTA_TARGETS,
            183_831_552,
            "microsoft/deberta-v3-base",
        ),
        Architecture(
            "gemma-2b", "GemmaForCausalLM", "GemmaConfig", _GEMMA_2B, _SEVEN, 2_506_172_416, "google/gemma-2b"
        ),
        Architecture(
            "gemma-7b", "GemmaForCausalLM", "GemmaConfig", _GEMMA_7B, _SEVEN, 8_537_680_896, "google/gemma-7b"
        ),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of a name.

    Raises:
        ConfigError: no such name, with the nearest ones.

    Example:
        >>> architecture("sdxl").parameters
        2567463684
    """
    if name not in ARCHITECTURES:
        hint = did_you_mean(name.lower().replace("_", "-"), ARCHITECTURES)
        raise ConfigError(f"Unknown architecture {name!r}.{hint} Known: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


def build_architecture(name: str) -> nn.Module:
    """A model of a named architecture on the meta device: every shape, no numbers, no network, a fraction of a second.

    Raises:
        ConfigError: no such name.
        MissingExtraError: diffusers or transformers is not installed.

    Example:
        >>> model = build_architecture("sd15")
        >>> sum(p.numel() for p in model.parameters()), next(model.parameters()).device.type
        (859520964, 'meta')
    """
    shape = architecture(name)
    library = _library(shape)
    model_class = getattr(library, shape.model_class)
    with torch.device("meta"):
        if shape.config_class is None:
            return model_class(**shape.options)
        return model_class(getattr(library, shape.config_class)(**shape.options))


def _library(shape: Architecture) -> Any:
    try:
        return importlib.import_module(shape.library)
    except ImportError as error:
        raise MissingExtraError(
            f"Architecture {shape.name!r} needs {shape.library}: pip install 'smidgen[diffusion]'."
        ) from error
