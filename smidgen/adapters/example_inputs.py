"""Small inputs for a forward pass, made from what a model says of itself: its config, or its first layer.

Each is a guess until it has run: :func:`examples` gives them best first, and whoever asked takes the first that a model
accepts. Nothing here imports transformers or diffusers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

TOKENS = 12
_SIDES = (16, 32, 64, 224)  # of pictures, where a config does not say


@dataclass
class Example:
    """A forward pass to try: ``run`` makes it, ``missing`` names the kind of input it leaves out."""

    run: Callable[[], Any]
    missing: str = ""


def examples(model: nn.Module) -> Iterator[Example]:
    """Passes to try on a model, the best first; nothing is run before it is asked for."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(inner, "config", None)
    made: Iterator[tuple[Any, str]]
    if _descends(inner, "transformers.") and config is not None:
        made = _of_transformers(inner, config)
    elif _descends(inner, "diffusers.") and config is not None:
        made = _of_diffusers(inner, config)
    else:
        made = _of_torch(inner)
    for values, missing in made:
        named = values if isinstance(values, dict) else {}
        given = () if isinstance(values, dict) else (values,)
        yield Example(lambda given=given, named=named: inner(*given, **named), missing)  # type: ignore[misc]


def as_read(pipe: Any, component: str) -> Callable[[Any], Any] | None:
    """What a diffusers pipeline reads of a component besides its denoiser, as a function of the pipeline: a text encoder's part in
    ``encode_prompt``, which may leave its last layers out, and of a VAE that makes pictures from words its decoder.
    None where that is not known, or does not run."""
    try:
        if component.startswith("text_encoder"):
            read = partial(_encoded, takes=inspect.signature(pipe.encode_prompt).parameters)
        elif component == "vae" and not {"image", "video"} & inspect.signature(pipe.__call__).parameters.keys():
            sample, _ = next(_of_diffusers(pipe.vae, pipe.vae.config))
            latent = pipe.vae.encode(sample["sample"]).latent_dist.mode()
            read = partial(_decoded, latent=latent)
        else:
            return None
        read(pipe)
    except Exception:  # whatever a stranger's pipeline raises: the component's own pass is tried instead
        return None
    return read


def _encoded(pipe: Any, takes: Mapping[str, inspect.Parameter]) -> Any:
    known = {"device": _place(pipe.text_encoder)[0], "do_classifier_free_guidance": False}
    known |= {name: 1 for name in takes if name.startswith("num_")}
    known |= {name: "a small house" for name in takes if re.fullmatch(r"prompt(_\d)?", name)}
    needed = [name for name, own in takes.items() if own.default is own.empty or name == "prompt"]
    return pipe.encode_prompt(**{name: known.get(name) for name in needed})


def _decoded(pipe: Any, latent: Tensor) -> Any:
    return pipe.vae.decode(latent)


def _descends(model: nn.Module, library: str) -> bool:
    return any(c.__module__.startswith(library) for c in type(model).__mro__)


def _takes(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(model).forward).parameters)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where inputs go and their number format: the model's own word, which knows of hooks that move and cast weights."""
    parameters = [p for p in model.parameters() if not p.is_meta]
    device = getattr(model, "device", None)
    if not isinstance(device, torch.device) or device.type == "meta":
        device = parameters[0].device if parameters else torch.device("cpu")
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1), torch.float32)
    return device, dtype


class _Maker:
    """Tensors with fixed numbers in a model's format."""

    def __init__(self, model: nn.Module) -> None:
        self.device, self.dtype = _place(model)

    def noise(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(self.device, self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """A mask that leaves nothing out."""
        return torch.ones(*shape, dtype=torch.bool, device=self.device)

    def whole(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)


# ---- transformers ------------------------------------------------------------------------------------------------------


def _of_transformers(model: nn.Module, config: Any) -> Iterator[tuple[dict[str, Tensor], str]]:
    make, takes = _Maker(model), _takes(model)
    main = getattr(model, "main_input_name", "input_ids")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    decoder = {}
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", True):
        decoder = {"decoder_input_ids": _ids(getattr(config, "decoder", None) or text, make, 4)}
    if main == "input_ids" or ("input_ids" in takes and "pixel_values" in takes):
        ids = {"input_ids": _ids(text, make, eos=bool(decoder))} | decoder
        if "pixel_values" in takes:
            for picture in _pictures(config, make, 1):
                for tokens in _with_places(model, config, ids["input_ids"], picture):
                    yield ids | {"input_ids": tokens, "pixel_values": picture}, ""
        left_out = "pictures or sound" if _other_senses(config) else ""
        yield ids, left_out
        if decoder:  # a classifier makes the decoder's own from these, or wants as many
            yield {"input_ids": ids["input_ids"]}, left_out
            yield {"input_ids": ids["input_ids"], "decoder_input_ids": ids["input_ids"]}, left_out
    elif main == "pixel_values":
        for batch in (2, 1):
            for picture in _pictures(config, make, batch):
                yield {"pixel_values": picture} | decoder, ""
                if getattr(config, "num_frames", None):
                    film = picture[:, None].expand(-1, config.num_frames, -1, -1, -1)
                    yield {"pixel_values": film}, ""
    elif main == "past_values":
        length, series = getattr(config, "context_length", TOKENS), getattr(config, "num_input_channels", 1)
        yield {"past_values": make.noise(2, length, series)}, ""
    elif main == "input_features":
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        longest = 2 * getattr(config, "max_source_positions", 50)
        for length in (longest, 64):
            yield {"input_features": make.noise(1, bands, length)} | decoder, ""
            yield {"input_features": make.noise(1, length, bands)} | decoder, ""
    elif main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            yield {"input_values": make.noise(1, config.max_length, config.num_mel_bins)}, ""
        for length in (1600, 16000):
            yield {"input_values": make.noise(2, length)} | decoder, ""


def _ids(config: Any, make: _Maker, length: int = TOKENS, eos: bool = False) -> Tensor:
    """[1, length] ordinary tokens: small, spread, none of the special ones; with ``eos`` the last one ends the text."""
    vocabulary = int(getattr(config, "vocab_size", 0) or 100)
    special = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "mask_token_id", "image_token_id"):
        value = getattr(config, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    plain = [token for token in range(vocabulary) if token not in special][:997] or [0]
    longest = getattr(config, "max_position_embeddings", None)
    length = min(length, longest) if isinstance(longest, int) and longest > 4 else length
    values = [plain[(7 * i + 3) % len(plain)] for i in range(length)]
    last = getattr(config, "eos_token_id", None)
    if eos and isinstance(last, int):
        values[-1] = last
    return make.whole(*values)[None]


def _pictures(config: Any, make: _Maker, batch: int) -> Iterator[Tensor]:
    own = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    channels = getattr(own, "num_channels", None) or getattr(own, "in_channels", None) or 3
    size = getattr(own, "image_size", None)
    for side in (size,) if size else _SIDES:
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        yield make.noise(batch, channels, height, width)


def _with_places(model: Any, config: Any, ids: Tensor, picture: Tensor) -> Iterator[Tensor]:
    """The tokens with as many places for the picture as a model that splices pictures into its text calls for."""
    place = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    vision = getattr(config, "vision_config", None)
    if not isinstance(place, int):
        yield ids
        return
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    counts = [n for n in (getattr(config, "image_seq_length", None), getattr(config, "mm_tokens_per_image", None)) if n]
    if isinstance(side, int) and isinstance(patch, int):
        counts += [(side // patch) ** 2, (side // patch) ** 2 + 1]
    for count in dict.fromkeys(counts):
        places = ids.new_full((1, count), place)
        yield torch.cat([ids[:, :2], places, ids[:, 2:]], dim=1)


def _other_senses(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))


# ---- diffusers -----------------------------------------------------------------------------------------------------------


def _of_diffusers(model: nn.Module, config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    make, takes, size = _Maker(model), _takes(model), _sizes(config)
    blocks = len(getattr(config, "block_out_channels", None) or ())
    channels = size("in_channels", "in_visual_dim") or 4
    patch = getattr(config, "patch_size", None) or 1
    side = max(8, 2 ** (blocks + 1)) if blocks else 8 * (patch if isinstance(patch, int) else 2)
    common = {name: value for name, value in _conditions(config, make, size, side).items() if name in takes}
    for name in ("timestep", "t"):
        if name in takes:
            common[name] = make.whole(7) if blocks else make.whole(7).to(make.dtype)
    if "sample" in takes:
        if "hint" in common.get("added_cond_kwargs", {}):
            channels -= 4  # the picture that is added to the latent
        yield common | {"sample": make.noise(1, channels, side, side)}, ""
        film = common | {"sample": make.noise(1, channels, 2, side, side)}  # in both orders of axes
        yield film, ""
        if "encoder_hidden_states" in film:  # one for each frame
            yield film | {"encoder_hidden_states": film["encoder_hidden_states"].repeat(2, 1, 1)}, ""
        yield common | {"sample": make.noise(1, 2, channels, side, side)}, ""
        return
    if "x" in takes:  # lists of single latents
        yield common | {"x": [make.noise(channels, 1, side, side)]}, ""
        return
    tokens = 16
    flat = common | {"hidden_states": make.noise(1, tokens, channels)}
    for axes in (3, 4):  # of positions: FLUX.1, FLUX.2
        ids = {"img_ids": make.zeros(tokens, axes), "txt_ids": make.zeros(TOKENS, axes)}
        if ids.keys() <= takes.keys():
            yield flat | ids, ""
    if "img_shapes" in takes:
        yield flat | {"img_shapes": [(1, 4, 4)], "txt_seq_lens": [TOKENS]}, ""
        yield flat | {"img_shapes": [(1, 4, 4)]}, ""
    if "position_ids" in takes and size("num_text_layers"):  # Krea 2: text tokens before those of the image
        given = {"position_ids": make.zeros(TOKENS + tokens, 3)}
        given["encoder_hidden_states"] = make.noise(1, TOKENS, size("num_text_layers"), size("text_hidden_dim"))
        yield flat | given, ""
    if {"visual_rope_pos", "text_rope_pos"} <= takes.keys():
        places = [torch.arange(n, device=make.device) for n in (1, side // 2, side // 2)]
        text = torch.arange(TOKENS, device=make.device)
        grid = make.noise(1, 1, side, side, channels * (2 if getattr(config, "visual_cond", False) else 1))
        if getattr(config, "visual_cond", False):
            grid = torch.cat([grid, grid[..., :1]], dim=-1)  # and a mask
        yield common | {"hidden_states": grid, "visual_rope_pos": places, "text_rope_pos": text}, ""
    yield common | {"hidden_states": make.noise(1, channels, side, side)}, ""
    step = size("patch_size_t") or 1
    for frames in (2 * step, step):  # attention over one frame moves nothing
        yield common | {"hidden_states": make.noise(1, channels, frames, side, side)}, ""
        yield common | {"hidden_states": make.noise(1, frames, channels, side, side)}, ""
    if {"num_frames", "height", "width"} <= takes.keys():
        yield flat | {"num_frames": 1, "height": 4, "width": 4}, ""
    yield flat, ""
    yield common | {"hidden_states": make.noise(1, size("embedding_dim") or channels)}, ""


def _sizes(config: Any) -> Callable[..., int]:
    """Reads the first of some names that a config has a value for, 0 if none; of several values the first."""

    def size(*names: str) -> int:
        found = (getattr(config, name, None) for name in names)
        first = next((v for v in found if v), 0)
        return int(first[0] if isinstance(first, (list, tuple)) else first)

    return size


def _conditions(config: Any, make: _Maker, size: Callable[..., int], side: int) -> dict[str, Any]:
    """Everything besides the noised latent, by the names that diffusers' denoisers give it."""
    out: dict[str, Any] = {}
    width = size(
        "encoder_hid_dim", "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim",
        "in_text_dim", "context_in_dim", "cross_attention_dim", "embedding_dim",
    )  # fmt: skip
    tokens = size("max_text_seq_length", "num_embeddings", "text_len") or TOKENS
    added = getattr(config, "addition_embed_type", None) or ""
    if width:
        out["encoder_hidden_states"] = make.noise(1, tokens, width)
        out["cap_feats"] = [make.noise(tokens, width)]
        out["encoder_hidden_states_mask"] = make.ones(1, tokens)
        if "image" not in added:  # else its tokens are those of a picture
            out["encoder_attention_mask"] = make.ones(1, tokens)
    widths = {
        "pooled_projections": size("pooled_projection_dim", "in_text_dim2"),
        "proj_embedding": size("embedding_dim"),
    }
    out |= {name: make.noise(1, wide) for name, wide in widths.items() if wide}
    if size("cross_attention_dim_t5"):  # of a second encoder
        again = size("text_len_t5") or tokens
        out["encoder_hidden_states_t5"] = make.noise(1, again, size("cross_attention_dim_t5"))
        out["text_embedding_mask"], out["text_embedding_mask_t5"] = make.ones(1, tokens), make.ones(1, again)
        out["image_meta_size"], out["style"] = make.zeros(1, 6), make.whole(0)
    if size("clip_text_pooled_in_channels"):
        out["clip_text_pooled"] = make.noise(1, 1, size("clip_text_pooled_in_channels"))
        out["timestep_ratio"] = make.noise(1).sigmoid()
    for name in ("original_size", "target_size", "crop_coords"):
        out[name] = make.zeros(1, 2)
    if getattr(config, "guidance_embeds", False):
        out["guidance"] = make.whole(3).to(make.dtype)
    if size("ofs_embed_dim"):
        out["ofs"] = make.whole(2).to(make.dtype)
    if size("conditioning_channels"):
        wide = side * 2 ** max(len(getattr(config, "conditioning_embedding_out_channels", None) or ()) - 1, 0)
        out["controlnet_cond"] = make.noise(1, size("conditioning_channels"), wide, wide)
    ids, projected = size("addition_time_embed_dim"), size("projection_class_embeddings_input_dim")
    if ids:
        out["added_time_ids"] = make.zeros(1, max(projected // ids, 1))
    if added == "text_time":
        out["added_cond_kwargs"] = {"text_embeds": make.noise(1, projected - 6 * ids), "time_ids": make.zeros(1, 6)}
    elif "image" in added:
        both = {name: make.noise(1, size("cross_attention_dim")) for name in ("text_embeds", "image_embeds")}
        image = {"image_embeds": make.noise(1, width)}
        hint = {"hint": make.noise(1, 3, 8 * side, 8 * side)} if "hint" in added else {}
        out["added_cond_kwargs"] = both if "text" in added else image | hint
    elif size("caption_channels"):
        out["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if getattr(config, "class_embed_type", None) == "projection":
        out["class_labels"] = make.noise(1, projected)
    elif size("num_class_embeds", "num_embeds_ada_norm") or getattr(config, "class_embed_type", None):
        out["class_labels"] = make.whole(0)
    return out


# ---- any torch model -----------------------------------------------------------------------------------------------------


def _of_torch(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Inputs as the first layer takes them, for a model that is called with one tensor."""
    needed = [
        p
        for name, p in inspect.signature(model.forward).parameters.items()
        if name != "self" and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        return
    make = _Maker(model)
    for layer in model.modules():
        inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if isinstance(inner, nn.Embedding):
            yield make.whole(*((7 * i + 1) % inner.num_embeddings for i in range(TOKENS)))[None], ""
            return
        if isinstance(inner, nn.Conv2d):
            for side in _SIDES:
                yield make.noise(2, inner.in_channels, side, side), ""
            return
        width = getattr(inner, "in_features", None) or getattr(inner, "embed_dim", None)
        if type(inner).__name__ == "Conv1D":
            width = inner.weight.shape[0]  # type: ignore[index,union-attr]
        if isinstance(width, int):
            yield make.noise(2, 4, width), ""
            yield make.noise(2, width), ""
            return
