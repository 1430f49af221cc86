"""Flow-matching transformers: FLUX.2 (dev, klein), Z-Image, Qwen-Image, Stable Diffusion 3.5, Chroma, Krea 2, and Wan for one frame.

All are taught x_s = (1 - s) x + s noise and the velocity noise - x. A family says what its denoiser takes (how it is told s, how latents
are packed, what of a prompt) and what it gives. Latents are [n, channels, height, width] everywhere else, standardised as the family's
own VAE says; prompts have ``embeds`` [prompt, token, ...] and, where padding is not attended, a ``mask`` [prompt, token].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from smidgen.bases.pipelines import PipelineBase
from smidgen.bases.protocol import Prompts, Sampling, Size
from smidgen.errors import ConfigError

Shape = Sequence[int]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ONE = {"do_classifier_free_guidance": False}  # else the pipeline encodes a negative prompt beside each
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of the image and of the text beside it


class FlowTransformer(PipelineBase):
    """What the families share. ``prompt_options`` go to the pipeline's ``encode_prompt``; a guidance of 1 is none."""

    component = "transformer"
    waits = True
    timesteps = 1.0
    endings: tuple[str, ...]  # of the layers in its blocks that adapters go on
    unread: tuple[str, ...] = ()  # those of them that its last block has and nothing reads
    time = "timestep"  # what its denoiser calls it
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512}
    sample_size = 128  # in latents, where the pipeline does not say

    @cached_property
    def targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """Layers of every block by their whole names, as some endings mean other things elsewhere."""
        blocks: dict[str, list[str]] = {}  # "transformer_blocks.0." -> its layers
        for name, module in self.model.named_modules():
            at = re.match(r"\w+\.\d+\.", name)
            if at and not list(module.children()) and name.endswith(self._dotted(self.endings)):
                blocks.setdefault(at[0], []).append(name)
        last = {at.partition(".")[0]: at for at in blocks}.values()
        unread = self._dotted(self.unread)
        return tuple(n for at, found in blocks.items() for n in found if at not in last or not n.endswith(unread))

    @staticmethod
    def _dotted(endings: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f".{ending}" for ending in endings)

    @property
    def _scale(self) -> int:
        """Pixels to the VAE's latent, along a side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def factor(self) -> int:
        return self._scale

    @property
    def step(self) -> int:
        return 2 * self._scale

    @property
    def resolution(self) -> int:
        return int(getattr(self.pipe, "default_sample_size", self.sample_size)) * self._scale

    @property
    def _longest(self) -> int:
        return min(int(self.prompt_options["max_sequence_length"]), super()._longest)

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        given = self._inputs(noisy, prompts) | {self.time: self._times(timesteps).to(noisy.dtype)}
        return self._outputs(model(**given, return_dict=False)[0], noisy.shape).float()

    def _times(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        """What the denoiser takes besides the time."""
        return {"hidden_states": noisy, "encoder_hidden_states": prompts.tensors["embeds"]}

    def _outputs(self, found: Any, shape: Shape) -> Tensor:
        """What the denoiser gives, as the velocity of latents of ``shape``."""
        return found  # type: ignore[no-any-return]

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"embeds": (tokens, model.config.joint_attention_dim)}

    def _encoded(self, prompts: list[str]) -> Prompts:
        return Prompts({"embeds": self._by_pipeline(prompts)[0]})

    def _by_pipeline(self, prompts: list[str]) -> Any:
        return self.pipe.encode_prompt(prompts, device=self.device, **self.prompt_options)

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Any]:
        found = {f"{prefix}prompt_{name}": value.to(self.device) for name, value in self._names(prompts).items()}
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in found.items()}

    def _names(self, prompts: Prompts) -> dict[str, Tensor]:
        """What is known of prompts, as the pipeline calls it after ``prompt_``."""
        return {"embeds": prompts.tensors["embeds"]}


class Packed(FlowTransformer):
    """Families whose token is 2 x 2 latents: [n, c, h, w] -> [n, h/2 * w/2, 4 c]."""

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        return super()._inputs(noisy, prompts) | {"hidden_states": pixel_unshuffle(noisy, 2).flatten(2).mT}

    def _outputs(self, found: Any, shape: Shape) -> Tensor:
        return pixel_shuffle(found.mT.unflatten(-1, (shape[-2] // 2, shape[-1] // 2)), 2)

    def _drawn(self, latents: Tensor, size: Size) -> Tensor:
        return self._outputs(latents, self.latent_shape(size))

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.model.config.in_channels // 4, *self._latent_sides(size)


class Framed(FlowTransformer):
    """Families whose VAE is a video's: latents of one frame [n, c, 1, h, w]."""

    def _frames(self, pixels: Tensor) -> Tensor:
        return pixels.unsqueeze(2)

    def _pixels(self, frames: Tensor) -> Tensor:
        return frames.squeeze(2)

    def _folded(self, latents: Tensor) -> Tensor:
        return latents.squeeze(2)

    def _unfolded(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)


class Flux2Klein(FlowTransformer):
    """Latents are the VAE's with 2 x 2 in a channel, standardised by its batch norm; padding of a prompt is attended."""

    family = "flux2-klein"
    endings = (
        *JOINT,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "to_qkv_mlp_proj",
        "attn.to_out",
    )
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512, "text_encoder_out_layers": (9, 18, 27)}

    @property
    def sampling(self) -> Sampling:  # type: ignore[override]
        return Sampling(4, 1.0) if self.pipe.config.get("is_distilled") else Sampling(28, 4.0)

    @property
    def factor(self) -> int:
        return 2 * self._scale

    @property
    def _standard(self) -> tuple[Any, Any]:
        norm, epsilon = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        mean, var = (value.reshape(1, -1, 1, 1).to(self.device) for value in (norm.running_mean, norm.running_var))
        return mean, (var + epsilon).rsqrt()

    def _folded(self, latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, 2)

    def _unfolded(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, 2)

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        embeds = prompts.tensors["embeds"]
        one, rows, columns, words = (
            torch.arange(n, device=noisy.device) for n in (1, *noisy.shape[-2:], embeds.shape[1])
        )
        places = torch.cartesian_prod(one, rows, columns, one), torch.cartesian_prod(one, one, one, words)
        ids = {
            name: place.expand(len(noisy), -1, -1) for name, place in zip(("img_ids", "txt_ids"), places, strict=True)
        }
        guidance = {"guidance": self._guidance(noisy)}
        return {"hidden_states": noisy.flatten(2).mT, "encoder_hidden_states": embeds, **ids, **guidance}

    def _guidance(self, noisy: Tensor) -> Tensor | None:
        return None

    def _outputs(self, found: Any, shape: Shape) -> Tensor:
        return found.mT.unflatten(-1, tuple(shape[-2:]))  # type: ignore[no-any-return]

    def _drawn(self, latents: Tensor, size: Size) -> Tensor:
        shift, scale = self._standard  # klein's pipeline gives the VAE's own latents
        return (self._folded(latents.to(self.device)) - shift) * scale


class Flux2(Flux2Klein):
    """FLUX.2 [dev] is told its guidance: there is no negative prompt, and it is trained at the scale of diffusers' script."""

    family = "flux2"
    sampling = Sampling(28, 4.0)  # type: ignore[assignment]
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512, "text_encoder_out_layers": (10, 20, 30)}
    trained_guidance = 3.5

    def _guidance(self, noisy: Tensor) -> Tensor | None:
        return noisy.new_full((len(noisy),), self.trained_guidance)

    def _guided(self, negative: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance}

    def _drawn(self, latents: Tensor, size: Size) -> Tensor:
        return self._outputs(latents, self.latent_shape(size))


class ZImage(FlowTransformer):
    """Told 1 - s, answers x - noise; images and prompts are lists, a prompt without its padding."""

    family = "z-image"
    endings = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    sampling = Sampling(28, 3.0)
    time = "t"
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512, **ONE}

    @property
    def largest(self) -> int:
        return min(self.model.axes_lens[1:]) * self.step  # type: ignore[no-any-return]

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.model.in_channels, *self._latent_sides(size)

    def _times(self, timesteps: Tensor) -> Tensor:
        return 1 - timesteps

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        return {"x": list(noisy.unsqueeze(2).unbind()), "cap_feats": self._lists(prompts)}

    def _outputs(self, found: Any, shape: Shape) -> Tensor:
        return -torch.stack(list(found)).squeeze(2)

    def _lists(self, prompts: Prompts) -> list[Tensor]:
        embeds, mask = prompts.tensors["embeds"], prompts.tensors["mask"]
        return [row[: int(keep.sum())] for row, keep in zip(embeds, mask, strict=True)]  # padding is at the end

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"embeds": (tokens, model.config.cap_feat_dim), "mask": (tokens,)}

    def _encoded(self, prompts: list[str]) -> Prompts:
        rows = self._by_pipeline(prompts)[0]
        single = ({"embeds": row[None], "mask": torch.ones(1, len(row), dtype=torch.bool)} for row in rows)
        return Prompts.join([Prompts(own) for own in single])

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Any]:
        return {f"{prefix}prompt_embeds": self._lists(prompts.to(self.device, self.model.dtype))}


class QwenImage(Packed, Framed):
    """Guidance rescales the norm (``true_cfg_scale``)."""

    family = "qwen-image"
    endings: tuple[str, ...] = (*JOINT, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    unread: tuple[str, ...] = ("add_q_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    sampling = Sampling(50, 4.0)
    guidance_name = "true_cfg_scale"

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        grid = (1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)
        mask = prompts.tensors["mask"]
        return super()._inputs(noisy, prompts) | {
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[grid]] * len(noisy),
        }

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return super().prompt_shapes(model, tokens) | {"mask": (tokens,)}

    def _encoded(self, prompts: list[str]) -> Prompts:
        embeds, mask = self._by_pipeline(prompts)
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return Prompts({"embeds": embeds, "mask": mask.bool()})

    def _names(self, prompts: Prompts) -> dict[str, Tensor]:
        return {"embeds": prompts.tensors["embeds"], "embeds_mask": prompts.tensors["mask"]}


class Krea2(QwenImage):
    """``embeds`` [prompt, token, layer of the encoder, channel]; guidance g is the others' g + 1."""

    family = "krea2"
    endings = (*ATTENTION, "to_gate", "ff.gate", "ff.up", "ff.down")
    unread = ()
    sampling = Sampling(28, 4.5)
    guidance_name = "guidance_scale"

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        given = Packed._inputs(self, noisy, prompts)
        tokens, grid = prompts.tensors["mask"].shape[1], (noisy.shape[-2] // 2, noisy.shape[-1] // 2)
        places = self.pipe.prepare_position_ids(tokens, *grid, noisy.device)
        return given | {"position_ids": places, "encoder_attention_mask": prompts.tensors["mask"]}

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        config = model.config
        return {"embeds": (tokens, config.num_text_layers, config.text_hidden_dim), "mask": (tokens,)}


class StableDiffusion3(FlowTransformer):
    """Three text encoders; ``pooled`` [prompt, channel] beside ``embeds``."""

    family = "sd3"
    endings = (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    unread = ("add_q_proj",)
    sampling = Sampling(28, 7.0)
    timesteps = 1000.0
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    prompt_options: Mapping[str, Any] = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 256, **ONE}

    @property
    def largest(self) -> int:
        config = self.model.config
        return config.pos_embed_max_size * config.patch_size * self.factor  # type: ignore[no-any-return]

    @property
    def _tokenizer(self) -> Any:
        """T5's, which reads on where the CLIPs stop at 77 tokens; theirs where it was left out."""
        return self.pipe.tokenizer if self.pipe.text_encoder_3 is None else self.pipe.tokenizer_3

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        return super()._inputs(noisy, prompts) | {"pooled_projections": prompts.tensors["pooled"]}

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return super().prompt_shapes(model, tokens) | {"pooled": (model.config.pooled_projection_dim,)}

    def _encoded(self, prompts: list[str]) -> Prompts:
        _ = self.pipe.text_encoder_3 or self.model  # without T5, its pipeline asks the transformer for the width
        embeds, _, pooled, _ = self._by_pipeline(prompts)
        return Prompts({"embeds": embeds, "pooled": pooled})

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Any]:
        pooled = prompts.tensors["pooled"].to(self.device, self.model.dtype)
        return super()._embeds(prompts, prefix) | {f"{prefix}pooled_prompt_embeds": pooled}


class Chroma(Packed):
    """The mask keeps one token of a prompt's padding, and goes on over the image's tokens."""

    family = "chroma"
    endings = (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
    sampling = Sampling(35, 5.0)
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512, **ONE}

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        given, mask = super()._inputs(noisy, prompts), prompts.tensors["mask"]
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        one, rows, columns = (torch.arange(n, device=noisy.device) for n in (1, height, width))
        ids = torch.cartesian_prod(one, rows, columns).to(noisy.dtype)
        whole = torch.cat([mask.to(noisy.dtype), noisy.new_ones(len(noisy), height * width)], dim=1)
        return given | {"img_ids": ids, "txt_ids": noisy.new_zeros(mask.shape[1], 3), "attention_mask": whole}

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return super().prompt_shapes(model, tokens) | {"mask": (tokens,)}

    def _encoded(self, prompts: list[str]) -> Prompts:
        embeds, _, mask, *_ = self._by_pipeline(prompts)
        return Prompts({"embeds": embeds, "mask": mask.bool()})

    def _names(self, prompts: Prompts) -> dict[str, Tensor]:
        return {"embeds": prompts.tensors["embeds"], "attention_mask": prompts.tensors["mask"].float()}


class Wan(Framed):
    """Wan 2.x for one frame, with one transformer told one time for all tokens (2.1, 1.3B and 14B)."""

    family = "wan"
    endings = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
    sampling = Sampling(50, 5.0)
    timesteps = 1000.0
    sample_size = 60
    prompt_options: Mapping[str, Any] = {"max_sequence_length": 512, **ONE}

    def __init__(self, name: str, pipe: Any) -> None:
        for option in ("boundary_ratio", "expand_timesteps"):  # Wan 2.2: two transformers, a time for each token
            if pipe.config.get(option):
                raise ConfigError(
                    f"The base {name!r} is a Wan 2.2 with {option} = {pipe.config[option]}, which is trained in another way than "
                    "one transformer told one time; take a Wan 2.1."
                )
        super().__init__(name, pipe)

    @property
    def _scale(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def step(self) -> int:
        return max(16, super().step)  # its pipeline takes no others

    @property
    def _image_processor(self) -> Any:
        return self.pipe.video_processor

    def _inputs(self, noisy: Tensor, prompts: Prompts) -> dict[str, Any]:
        return super()._inputs(noisy.unsqueeze(2), prompts)

    def _outputs(self, found: Any, shape: Shape) -> Tensor:
        return found.squeeze(2)  # type: ignore[no-any-return]

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"embeds": (tokens, model.config.text_dim)}

    def _guided(self, negative: Prompts, guidance: float) -> dict[str, Any]:
        return super()._guided(negative, guidance) | {"num_frames": 1}

    def _drawn(self, latents: Tensor, size: Size) -> Tensor:
        return latents.squeeze(2)
