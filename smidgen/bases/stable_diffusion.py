"""Stable Diffusion 1.x and 2.x, and SDXL, which has a second text encoder, pooled embeddings and time ids.

A prompt of any length is read in chunks of as many tokens as the text encoder takes (75 and its two marks), whose embeddings
are joined along the tokens; ``pooled`` is the first chunk's. Prompts of fewer chunks than those beside them are filled up
with the chunk of the empty prompt. While text encoders are trained (``train_text_encoders``) encoded prompts are token ids, which ``predict``
and drawing turn into embeddings with the encoders as they then are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.bases.pipelines import PipelineBase
from smidgen.bases.protocol import Prompts, Sampling, Size, sides

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of a text encoder, as in diffusers' training scripts


class StableDiffusion(PipelineBase):
    """``embeds`` [prompt, token, channel] are all that its UNet knows of a prompt."""

    family = "sd"
    component = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    sampling = Sampling(30, 7.5)
    load_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    @property
    def step(self) -> int:
        """So that every block of the UNet halves what is left without a rest."""
        return self.factor * 2 ** (len(self.model.config.block_out_channels) - 1)

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        prompts = self._as_embeds(prompts)
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

    def train_text_encoders(self) -> dict[str, tuple[str, ...]]:
        self.reads_live = True
        return {name: self._text_targets(name, encoder) for name, encoder in self.encoders.items() if name != "vae"}

    def _text_targets(self, name: str, encoder: Any) -> tuple[str, ...]:
        return tuple(name for name, _ in encoder.named_modules() if name.endswith(TEXT_TARGETS))

    def release_encoders(self, keep_vae: bool = False) -> None:
        if not self.reads_live and len(self.encoders) > 1:
            _ = self._blank
        super().release_encoders(keep_vae)

    def _warn_of_cut(self, prompts: Sequence[str]) -> None:
        """None is."""

    def _encoded(self, prompts: list[str]) -> Prompts:
        ids = self._ids(prompts)
        return ids if self.reads_live else self._as_embeds(ids)

    def _ids(self, prompts: list[str]) -> Prompts:
        """Token ids [prompt, token] for each text encoder, in whole chunks; a chunk of zeros is none."""
        found = {}
        for name in self.tokenizers:
            tokenizer = getattr(self.pipe, name)
            inner = tokenizer.model_max_length - 2
            rows = tokenizer(prompts, add_special_tokens=False, truncation=False).input_ids
            chunks = [[row[at : at + inner] for at in range(0, max(1, len(row)), inner)] for row in rows]
            most, pad = max(map(len, chunks)), tokenizer.pad_token_id
            ids = torch.zeros(len(prompts), most, inner + 2, dtype=torch.long)
            for own, row in zip(chunks, ids, strict=True):
                for part, place in zip(own, row, strict=False):
                    whole = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
                    place[:] = torch.tensor(whole + [pad] * (inner + 2 - len(whole)))
            found[f"ids_{name}"] = ids.flatten(1)
        return Prompts(found)

    def _as_embeds(self, prompts: Prompts) -> Prompts:
        """Prompts with their embeddings, all of as many chunks."""
        if "embeds" not in prompts.tensors:
            return self._embedded(prompts)
        embeds = prompts.tensors["embeds"]
        if embeds.is_meta:  # counted, not computed
            return prompts
        chunks = embeds.shape[1] // self._blank.shape[1]
        if chunks == 1:  # none is shorter; to look for them would wait for the device at each step
            return prompts
        none = ~embeds.any(dim=-1, keepdim=True)  # what was joined to longer ones
        filled = torch.where(none, self._blank_on(embeds.device, embeds.dtype).repeat(1, chunks, 1), embeds)
        return Prompts({**prompts.tensors, "embeds": filled})

    @cached_property
    def _blank(self) -> Tensor:
        """Embeddings [1, token, channel] of the empty prompt."""
        with torch.no_grad():
            return self._embedded(self._ids([""])).tensors["embeds"].cpu()

    def _blank_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = device, dtype
        if key not in self._blanks:
            self._blanks[key] = self._blank.to(device, dtype)
        return self._blanks[key]

    @cached_property
    def _blanks(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _embedded(self, prompts: Prompts) -> Prompts:
        """``prompts`` with embeddings, by the text encoders as they are, in place of token ids."""
        found, pooled = [], None
        given = {name: prompts.tensors[f"ids_{name}"] for name in self.tokenizers}
        most = max(
            ids.shape[1] // getattr(self.pipe, name).model_max_length for name, ids in given.items()
        )  # chunks: tokenizers may differ
        for name, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = getattr(self.pipe, name).model_max_length
            chunks = given[name].unflatten(1, (-1, tokens))
            chunks = torch.cat([chunks, chunks.new_zeros(len(chunks), most - chunks.shape[1], tokens)], dim=1)
            blank = self._ids_of_blank[f"ids_{name}"].to(chunks.device)
            chunks = torch.where(chunks[..., :1] == 0, blank, chunks)
            out = getattr(self.pipe, encoder)(chunks.flatten(0, 1).to(self.device), output_hidden_states=True)
            found.append(self._states(out).unflatten(0, (-1, most)).flatten(1, 2))
            pooled = out[0].unflatten(0, (-1, most))[:, 0]
        rest = {name: value for name, value in prompts.tensors.items() if not name.startswith("ids_")}
        return Prompts({"embeds": torch.cat(found, dim=-1), **self._pooled(pooled), **rest})

    @cached_property
    def _ids_of_blank(self) -> Mapping[str, Tensor]:
        return self._ids([""]).tensors

    def _states(self, out: Any) -> Tensor:
        """Of what a text encoder says, [chunk, token, channel] that the UNet attends to."""
        return out[0]  # type: ignore[no-any-return]

    def _pooled(self, pooled: Any) -> dict[str, Tensor]:
        return {}

    def _alike(self, prompts: Prompts, negative: Prompts) -> tuple[Prompts, Prompts]:
        both = Prompts.join([prompts, negative])
        return both[: len(prompts)], both[len(prompts) :]

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}prompt_embeds": self._as_embeds(prompts).tensors["embeds"].to(self.device, self.model.dtype)}


class StableDiffusionXL(StableDiffusion):
    """Besides ``embeds`` there is ``pooled`` [prompt, channel], and ``time_ids`` [prompt, 6] for what an image was cut from:
    original height and width, crop corner, target height and width, in pixels."""

    family = "sdxl"
    sampling = Sampling(30, 5.0)
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    load_options: Mapping[str, Any] = {}

    def sized(self, prompts: Prompts, sizes: Sequence[tuple[int, int]], target: Size) -> Prompts:
        across, down = sides(target)
        ids = [[height, width, 0, 0, down, across] for width, height in sizes]
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

    def _text_targets(self, name: str, encoder: Any) -> tuple[str, ...]:
        found, last = super()._text_targets(name, encoder), f"layers.{encoder.config.num_hidden_layers - 1}."
        return (
            found if name == "text_encoder_2" else tuple(n for n in found if last not in n)
        )  # whose last layer nobody reads

    def _states(self, out: Any) -> Tensor:
        return out.hidden_states[-2]  # type: ignore[no-any-return]

    def _pooled(self, pooled: Any) -> dict[str, Tensor]:
        return {"pooled": pooled}

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        prompts = self._as_embeds(prompts)
        pooled = prompts.tensors["pooled"].to(self.device, self.model.dtype)
        return super()._embeds(prompts, prefix) | {f"{prefix}pooled_prompt_embeds": pooled}
