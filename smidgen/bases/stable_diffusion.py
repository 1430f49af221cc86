"""Stable Diffusion 1.x and 2.x, and SDXL, which has a second text encoder, pooled embeddings and time ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.bases.pipelines import PipelineBase
from smidgen.bases.protocol import Prompts, Sampling


class StableDiffusion(PipelineBase):
    """``embeds`` [prompt, token, channel] are all that its UNet knows of a prompt."""

    family = "sd"
    component = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    sampling = Sampling(30, 7.5)
    load_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        given = {"encoder_hidden_states": prompts.tensors["embeds"], **self._extra(noisy, prompts)}
        return model(noisy, timesteps, **given, return_dict=False)[0].float()  # type: ignore[no-any-return]

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"embeds": (tokens, model.config.cross_attention_dim)}

    def alias(self, module: str) -> str | None:
        """The name of an attention module in the original code, which kohya's files of SDXL use, underscored."""
        match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.attentions\.(\d+)\.(.+)", module)
        if match:
            layers, down = self.model.config.layers_per_block + 1, match[1] == "down_blocks"
            at = f"{'input' if down else 'output'}_blocks_{int(match[2]) * layers + int(match[3]) + down}"
            return f"{at}_1_{match[4].replace('.', '_')}"
        middle = re.fullmatch(r"mid_block\.attentions\.0\.(.+)", module)
        return f"middle_block_1_{middle[1].replace('.', '_')}" if middle else None

    def _extra(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        return {}

    def _encoded(self, prompts: list[str]) -> Prompts:
        return Prompts({"embeds": self._by_pipeline(prompts)[0]})

    def _by_pipeline(self, prompts: list[str]) -> Any:
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return self.pipe.encode_prompt(prompt=prompts, **options)

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}prompt_embeds": prompts.tensors["embeds"].to(self.device, self.model.dtype)}


class StableDiffusionXL(StableDiffusion):
    """Besides ``embeds`` there is ``pooled`` [prompt, channel], and ``time_ids`` [prompt, 6] for what an image was cut from:
    original height and width, crop corner, target height and width, in pixels."""

    family = "sdxl"
    sampling = Sampling(30, 5.0)
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    load_options: Mapping[str, Any] = {}

    def sized(self, prompts: Prompts, sizes: Sequence[tuple[int, int]], resolution: int) -> Prompts:
        ids = [[height, width, 0, 0, resolution, resolution] for width, height in sizes]
        return Prompts({**prompts.tensors, "time_ids": torch.tensor(ids, dtype=torch.float32)})

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        config = model.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return super().prompt_shapes(model, tokens) | {"pooled": (pooled,), "time_ids": (6,)}

    def _extra(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        ids = prompts.tensors.get("time_ids")
        if ids is None:
            height, width = (self.factor * side for side in noisy.shape[-2:])
            ids = noisy.new_tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
        return {"added_cond_kwargs": {"text_embeds": prompts.tensors["pooled"], "time_ids": ids}}

    def _encoded(self, prompts: list[str]) -> Prompts:
        embeds, _, pooled, _ = self._by_pipeline(prompts)
        return Prompts({"embeds": embeds, "pooled": pooled})

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        pooled = prompts.tensors["pooled"].to(self.device, self.model.dtype)
        return super()._embeds(prompts, prefix) | {f"{prefix}pooled_prompt_embeds": pooled}
