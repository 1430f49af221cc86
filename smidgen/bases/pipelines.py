"""What all families that draw share, as they are diffusers pipelines: loading, images and latents, drawing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from smidgen.adapters.methods import Kind
from smidgen.adapters.tuner.base import fingerprint
from smidgen.bases.protocol import Prompts, Sampling, Schedule, Size, sides
from smidgen.bases.schedules import schedule_of
from smidgen.bases.single_file import holds_more, read_file
from smidgen.errors import ConfigError, MissingExtraError, did_you_mean
from smidgen.training.processes import process_state
from smidgen.training.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

    from smidgen.bases.judging import Judge

logger = logging.getLogger(__name__)

SCENES = (
    "a portrait of a person",
    "a photo of a person in the street, in the rain",
    "a person smiling, in front of a mountain lake",
    "an oil painting of a person",
    "a person with sunglasses, on a beach",
    "a black and white photo of a person reading a book",
)


class PipelineBase:
    """A base in a diffusers pipeline, as ``protocol.ImageBase`` has it; a family says what is its own (see
    ``stable_diffusion``)."""

    family: str
    component: str
    targets: tuple[str, ...]
    sampling: Sampling
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    load_options: Mapping[str, Any] = {}
    guidance_name: str = "guidance_scale"
    waits: bool = False  # its pipeline can be without a denoiser at first
    _later: Callable[[], Any] | None = None
    _device = torch.device("cpu")
    timesteps: float = 1000.0  # of a base that was taught by flow matching: what its denoiser is told at noise alone
    learning: Mapping[str, Kind] = {"image": "picture", "control": "picture"}  # task -> what learning rates go by

    parts_reader: Callable[[], Any] | None = None
    reads_live: bool = False  # text encoders are trained: prompts stay token ids until they are used

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe

    @classmethod
    def load(
        cls, name: str, folder: str, pipeline: str, precision: str, device: torch.device | str,
        quantize: str | None = None, variant: str | None = None, text_first: bool = False, file: str | None = None,
    ) -> Self:  # fmt: skip
        """The pipeline of the class ``pipeline`` in ``folder``, frozen. The denoiser takes the ``precision`` and is quantised
        as ``quantize`` (one of ``QUANTIZED``) says, the VAE stays fp32; ``variant`` names files such as "fp16". With
        ``text_first``, a family that ``waits`` reads its denoiser when it is first asked for, so that the encoders of prompts
        can be gone by then. What the single ``file`` holds is read from it and not from ``folder``."""
        if precision == "fp16" and torch.device(device).type == "cpu":
            raise ConfigError("fp16 has no arithmetic on a CPU; use --mixed-precision bf16 or no.")
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        options = {"use_safetensors": True, "variant": variant, _dtype_word(): dtype}
        denoiser = folder, options | quantization(quantize, dtype), quantize == "fp8", file

        def reader() -> Any:
            with _refusals(name, file):
                return cls._read_denoiser(*denoiser)

        with _refusals(name, file):
            later = {cls.component: None} if text_first and cls.waits else {cls.component: reader()}
            pipe = cls._read(folder, pipeline, options | later, file)
            pipe.vae.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        base = cls(name, pipe.to(device))
        base._later, base._device = reader, torch.device(device)
        for part in base.encoders.values():
            part.requires_grad_(False)
        return base

    @classmethod
    def _read(cls, folder: str, pipeline: str, options: Mapping[str, Any], file: str | None) -> Any:
        made, options = getattr(import_diffusers(), pipeline), {**cls.load_options, **options}
        if file is None or not holds_more(file):
            return made.from_pretrained(folder, **options)
        return read_file(made, file, folder, options)

    @classmethod
    def _read_denoiser(cls, folder: str, options: Mapping[str, Any], fp8: bool, file: str | None) -> Any:
        diffusers = import_diffusers()
        _library, kind = diffusers.DiffusionPipeline.load_config(folder)[cls.component]
        made = getattr(diffusers, kind)
        options = {"subfolder": cls.component, **options}
        model = made.from_pretrained(folder, **options) if file is None else read_file(made, file, folder, options)
        model.requires_grad_(False)
        if fp8:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=options[_dtype_word()])
        return model

    @property
    def model(self) -> Any:
        if getattr(self.pipe, self.component) is None and self._later is not None:
            with _refusals(self.name):
                setattr(self.pipe, self.component, self._later())
                self.pipe.to(self._device)  # it knows which quantised parts stay where they are
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        if getattr(self.pipe, self.component) is None:  # read later
            return self._device
        return next(self.model.parameters()).device

    @property
    def factor(self) -> int:
        return int(self.pipe.vae_scale_factor)

    @property
    def step(self) -> int:
        return self.factor

    @property
    def resolution(self) -> int:
        size = self.model.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.factor

    @property
    def largest(self) -> int:
        return 16_384

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.model.config.in_channels, *self._latent_sides(size)

    def _latent_sides(self, size: Size) -> tuple[int, int]:
        """Height and width of latents."""
        width, height = sides(size)
        return height // self.factor, width // self.factor

    @cached_property
    def schedule(self) -> Schedule:
        return schedule_of(self.pipe.scheduler, self.timesteps)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        parts = {name: getattr(self.pipe, name, None) for name in ("vae", *self.text_encoders)}
        return {name: part for name, part in parts.items() if part is not None}

    def release_encoders(self, keep_vae: bool = False) -> None:
        _ = self._encoder_prints
        texts = () if self.reads_live else (*self.text_encoders, *self.tokenizers)
        for name in (*texts, *(() if keep_vae else ("vae",))):
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)

    def encode_images(self, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        with torch.no_grad():
            for part in pixels.split(at_once(batch, pixels.shape[-2] * pixels.shape[-1])):
                encoded = self.pipe.vae.encode(self._frames(part.to(self.device, torch.float32)))
                if hasattr(encoded, "latent_dist"):
                    mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
                else:
                    mean, std = encoded.latents, torch.zeros_like(encoded.latents)
                shift, scale = self._standard
                means.append(((self._folded(mean) - shift) * scale).cpu())
                stds.append((self._folded(std) * scale).cpu())
        return torch.cat(means), torch.cat(stds)

    def _frames(self, pixels: Tensor) -> Tensor:
        """Images [n, 3, height, width] as the VAE takes them."""
        return pixels

    def _pixels(self, frames: Tensor) -> Tensor:
        """Inverse of ``_frames``."""
        return frames

    @property
    def _image_processor(self) -> Any:
        return self.pipe.image_processor

    def _folded(self, latents: Tensor) -> Tensor:
        """The VAE's latents as this base's [n, channels, height, width]."""
        return latents

    def _unfolded(self, latents: Tensor) -> Tensor:
        """Inverse of ``_folded``."""
        return latents

    def encode_prompts(self, prompts: Sequence[str], batch: int = 16) -> Prompts:
        self._warn_of_cut(prompts)
        with torch.no_grad(), quiet():
            parts = [self._encoded(list(prompts[at : at + batch])) for at in range(0, len(prompts), batch)]
        return Prompts.join([part.to(torch.device("cpu")) for part in parts])

    def train_text_encoders(self) -> dict[str, tuple[str, ...]]:
        raise ConfigError(
            f"--train-text-encoder is for Stable Diffusion and SDXL, whose text encoders are small CLIPs; the base {self.name!r} is "
            f"of the family {self.family}, whose text encoders are encoded with once and freed. Leave it out."
        )

    def latent_masks(self, masks: Tensor) -> Tensor:
        size = [side // self.factor for side in masks.shape[-2:]]
        least = -nn.functional.adaptive_max_pool2d(-masks, size)
        anything = least.amax(dim=(1, 2, 3), keepdim=True) > 0
        return torch.where(anything, least, nn.functional.interpolate(masks, size, mode="area"))

    def sized(self, prompts: Prompts, sizes: Sequence[tuple[int, int]], target: Size) -> Prompts:
        return prompts

    def _encoded(self, prompts: list[str]) -> Prompts:
        raise NotImplementedError

    @property
    def _tokenizer(self) -> Any:
        """That of prompts; FLUX.2 [dev] has it in a processor of images and texts."""
        return getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)

    @property
    def _longest(self) -> int:
        """Tokens of a prompt that are not cut."""
        return int(self._tokenizer.model_max_length)

    def _warn_of_cut(self, prompts: Sequence[str]) -> None:
        tokenizer, limit = self._tokenizer, self._longest
        with quiet():
            lengths = {prompt: len(tokenizer(prompt).input_ids) for prompt in dict.fromkeys(prompts)}
        cut = [prompt for prompt, length in lengths.items() if length > limit]
        if cut:
            lost = f"up to {max(lengths.values()) - limit} tokens are not read"
            logger.warning(
                "%d prompt(s) longer than %d tokens are cut, e.g. %r: %s.", len(cut), limit, cut[0][:80], lost
            )

    @property
    def _standard(self) -> tuple[Any, Any]:
        """Latents are (the VAE's own - shift) * scale: numbers, or [1, channels, 1, 1] where the VAE has them by channel."""
        config = self.pipe.vae.config
        shift, scale = getattr(config, "shift_factor", None) or 0.0, getattr(config, "scaling_factor", None) or 1.0
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return shift, scale
        mean, std = (torch.tensor(values, device=self.device).reshape(1, -1, 1, 1) for values in (mean, std))
        return mean, scale / std

    def draw(self, prompts: Prompts, seeds: Sequence[int], **options: Any) -> list[Image]:
        return self.decode(self.draw_latents(prompts, seeds, **options))

    @torch.no_grad()
    def draw_latents(
        self, prompts: Prompts, seeds: Sequence[int], *, negative: Prompts, steps: int, guidance: float,
        size: Size | None = None, batch: int = 8,
    ) -> Tensor:  # fmt: skip
        found, size = [], size or self.resolution
        width, height = sides(size)
        common = {"num_inference_steps": steps, "height": height, "width": width, "output_type": "latent"}
        for start in range(0, len(prompts), batch):
            own = prompts[start : start + batch]
            own, other = self._alike(own, negative[[0] * len(own)])
            given = self._embeds(own, "") | self._guided(other, guidance)
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[start : start + batch]]
            drawn = self.pipe(generator=generators, return_dict=False, **common, **given)[0]
            found.append(self._drawn(drawn, size).float().cpu())
        return torch.cat(found)

    def _alike(self, prompts: Prompts, negative: Prompts) -> tuple[Prompts, Prompts]:
        """Both of the length that the pipeline asks for."""
        return prompts, negative

    def _guided(self, negative: Prompts, guidance: float) -> dict[str, Any]:
        """Guidance away from ``negative``, as the pipeline takes it."""
        return {self.guidance_name: guidance} | self._embeds(negative, "negative_")

    def _drawn(self, latents: Tensor, size: Size) -> Tensor:
        """Latents as the pipeline gives them for images of ``size`` -> this base's [n, channels, height, width]."""
        return latents

    def decode(self, latents: Tensor, batch: int = 4) -> list[Image]:
        (shift, scale), images = self._standard, []
        with torch.no_grad():
            for part in latents.split(at_once(batch, latents.shape[-2] * latents.shape[-1] * self.factor**2)):
                own = part.to(self.device, torch.float32) / scale + shift
                pixels = self._pixels(self.pipe.vae.decode(self._unfolded(own), return_dict=False)[0])
                images += self._image_processor.postprocess(pixels, output_type="pil")
        return images

    def _embeds(self, prompts: Prompts, prefix: str) -> dict[str, Tensor]:
        """Encoded prompts as the pipeline takes them."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        parts = {self.component: fingerprint(self.model)} | self._encoder_prints
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]

    @cached_property
    def _encoder_prints(self) -> dict[str, str]:
        """Of what encodes pictures and prompts, remembered when it is released."""
        return {name: fingerprint(part) for name, part in self.encoders.items()}

    def alias(self, module: str) -> str | None:
        return None

    def scenes(self, count: int, seed: int) -> list[str]:
        return list(SCENES[:count])

    def judge(self) -> Judge | None:
        return None

    def foreign(self, images: Sequence[Image]) -> list[bool]:
        return [False] * len(images)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        return []


def at_once(batch: int, pixels: int) -> int:
    """Images of so many pixels that a VAE takes at once: two of 1024 x 1024, whose activations are gigabytes each."""
    return min(batch, max(1, 2**21 // pixels))


QUANTIZED = ("nf4", "int8", "int8-torchao", "fp8")


def quantization(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` that quantise a denoiser by diffusers' own backends: bitsandbytes for ``nf4`` and
    ``int8``, torchao for ``int8-torchao``; ``fp8`` is layerwise casting, which is done after loading.

    Raises ConfigError for a kind that is not known, MissingExtraError where its library is not installed.
    """
    if kind is not None and kind not in QUANTIZED:
        raise ConfigError(
            f"A base cannot be quantised as {kind!r}.{did_you_mean(kind, QUANTIZED)} Known: {', '.join(QUANTIZED)}."
        )
    if kind in (None, "fp8"):
        return {}
    library = "torchao" if kind == "int8-torchao" else "bitsandbytes"
    if not find_spec(library):
        raise MissingExtraError(f"--quantize {kind} needs {library}: pip install 'smidgen[quantised]'")
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four}


@contextmanager
def _refusals(name: str, file: str | None = None) -> Iterator[None]:
    """diffusers' own refusals of a base, as ours, and its lines of progress unsaid. Of a single ``file`` that is not what its config
    says, it raises anything."""
    try:
        with quiet():
            yield
    except ConfigError:
        raise
    except Exception as error:
        if "No GPU found" in str(error):
            raise ConfigError(
                f"The base {name!r} could not be quantised: diffusers asks for a GPU for bitsandbytes (nf4, int8); without one "
                "take --quantize int8-torchao or fp8."
            ) from error
        if not (file or isinstance(error, OSError | ValueError)):
            raise
        said, hint = " ".join(str(error).split()), ""
        if file:
            said = "it lacks tensors of the model." if "meta tensor" in said else said
            hint = " It is not whole, or its --base-config is another model's."
        raise ConfigError(f"The base {name!r} could not be loaded: {said}{hint}") from error


def _dtype_word() -> str:
    """What diffusers of this version calls the number format."""
    messages = import_diffusers().utils.deprecation_utils
    return "dtype" if hasattr(messages, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"


def default_device() -> torch.device:
    """The device accelerate will train on."""
    return process_state().device  # type: ignore[no-any-return]


def import_diffusers() -> Any:
    """diffusers, or the error that names its extra."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("Text-to-image bases need diffusers: pip install 'smidgen[diffusion]'") from error
    return diffusers
