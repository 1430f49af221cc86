"""What every base offers: one Protocol for those that draw, one for those that read. docs/new_base.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from smidgen.adapters.methods import Kind

if TYPE_CHECKING:
    from PIL.Image import Image

    from smidgen.bases.judging import Judge


Size = int | tuple[int, int]  # of an image in pixels: of a side of a square, or (width, height)


def sides(size: Size) -> tuple[int, int]:
    """Width and height."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: a bundle that its family alone looks into, here by rows. ``tensors`` have a row [...] for each
    prompt; what is of different length is padded, with a mask among them.

    Example:
        >>> both = Prompts.join([Prompts({"embeds": torch.zeros(2, 4)}), Prompts({"embeds": torch.ones(1, 4)})])
        >>> len(both), both[[2, 0]].tensors["embeds"][:, 0].tolist()
        (3, [1.0, 0.0])
    """

    tensors: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> Prompts:
        return Prompts({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Prompts:
        """On ``device``; numbers in floating point also in ``dtype``."""
        return Prompts({k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.tensors.items()})

    @staticmethod
    def join(parts: Sequence[Prompts]) -> Prompts:
        """The rows of all ``parts``, which are of one family, one after the other."""
        return Prompts({name: _longest([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def _longest(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [rows, tokens, ...] one after the other, zeros where some have fewer tokens than others."""
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    found = parts[0].new_zeros(sum(map(len, parts)), max(part.shape[1] for part in parts), *parts[0].shape[2:])
    for part, rows in zip(parts, found.split([len(part) for part in parts]), strict=True):
        rows[:, : part.shape[1]] = part
    return found


class Sampling(NamedTuple):
    """How a family draws when nobody says otherwise."""

    steps: int
    guidance: float

    def chosen(self, steps: int | None, guidance: float | None) -> dict[str, Any]:
        """Options of ``draw``: what is given, else these."""
        return {"steps": steps or self.steps, "guidance": self.guidance if guidance is None else guidance}


class Schedule(Protocol):
    """How a base was taught: which noise, and what to predict. A noise level is 0 for an image and 1 for noise alone."""

    def levels(self, quantiles: Tensor) -> Tensor:
        """Quantiles [n] in 0..1 of the density that training draws noise levels from -> the levels [n]."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """Noise levels [n] in 0..1 as the timesteps [n] that ``predict`` takes."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the target of ``predict`` for them; both shaped as ``latents`` [n, ...]."""

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """What squared errors at them are multiplied with [n]; None: all the same."""

    def snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights [n] of the squared error (Hang et al. 2023). Raises ConfigError where there is no such thing."""


class ImageBase(Protocol):
    """A loaded text-to-image base.

    Attributes:
        name: what it was asked for by.
        family: its name in ``smidgen.bases.families.FAMILIES``.
        pipe: the diffusers pipeline.
        component: the pipeline's part that adapters sit on, as the pipeline and other tools' files call it.
        targets: endings of the modules to adapt when nobody names any.
        sampling: how it draws when nobody says otherwise.
        parts_reader: loads what finds parts and landmarks in its images, None where nobody was trained to.
        model: the denoiser, which adapters sit on.
        device: where it computes.
        resolution: pixels on a side that it was made for.
        factor: pixels to a latent, along a side.
        step: pixels that the sides of an image are multiples of.
        largest: pixels that a side has at most, by its position embeddings.
        schedule: as its own scheduler says.
        reads_live: whether its text encoders are trained, see ``train_text_encoders``.
        encoders: the parts still in memory that encode images (``vae``) and prompts, by their names in the pipeline.
    """

    name: str
    family: str
    pipe: Any
    component: str
    targets: tuple[str, ...]
    sampling: Sampling
    parts_reader: Callable[[], Any] | None
    reads_live: bool

    @property
    def model(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def resolution(self) -> int: ...

    @property
    def factor(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def largest(self) -> int: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def encoders(self) -> Mapping[str, nn.Module]: ...

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of the latents of one image."""

    def encode_images(self, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
        """Images [n, 3, height, width] in -1..1 -> mean and std of their latents, each [n, ...] on the CPU."""

    def encode_prompts(self, prompts: Sequence[str], batch: int = 16) -> Prompts:
        """Prompts as the pipeline itself would encode them; those that are cut are warned about."""

    def train_text_encoders(self) -> dict[str, tuple[str, ...]]:
        """Make ready to train them beside the denoiser: from now on encoded prompts are token ids, which ``predict`` and ``draw``
        read with the encoders as they then are, and ``release_encoders`` keeps those. Returns the names of their layers to adapt, by
        their names in the pipeline. Raises ConfigError for a family whose text encoders are too large."""

    def latent_masks(self, masks: Tensor) -> Tensor:
        """Masks of pixels [n, 1, height, width] -> of latents [n, ...], to be multiplied with them: each as its pixel that
        counts least, since a latent across the outline also holds what is masked out; by the mean where a mask is narrower than that."""

    def sized(self, prompts: Prompts, sizes: Sequence[tuple[int, int]], target: Size) -> Prompts:
        """Prompts that also tell the (width, height) that each image had before it was brought to ``target``, for families that
        are told; without it an image has the size of its latents."""

    def prompt_shapes(self, model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each tensor of encoded prompts for ``model``, which may be on the meta device."""

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        """What ``model`` (the denoiser, wrapped or not) says of ``noisy``, to compare with the schedule's target."""

    def draw_latents(
        self, prompts: Prompts, seeds: Sequence[int], *, negative: Prompts, steps: int, guidance: float,
        size: Size | None = None, batch: int = 8,
    ) -> Tensor:  # fmt: skip
        """Latents [n, ...] on the CPU, one for each prompt and seed. A seed alone fixes an image's noise, so that images
        with and without an adapter can be compared. ``negative`` holds one prompt."""

    def decode(self, latents: Tensor, batch: int = 4) -> list[Image]:
        """Images of latents, decoded in fp32."""

    def draw(self, prompts: Prompts, seeds: Sequence[int], **options: Any) -> list[Image]:
        """One image for each prompt and seed; options as for ``draw_latents``."""

    def release_encoders(self, keep_vae: bool = False) -> None:
        """Free what encodes prompts, and the VAE unless images will still be drawn; encoded prompts go on working."""

    def fingerprint(self) -> str:
        """16 letters that follow from the weights of denoiser and encoders, and not from where they lie or from adapters."""

    def alias(self, module: str) -> str | None:
        """What other tools' files call a module of the denoiser, besides its own name with dots or underscores."""

    def scenes(self, count: int, seed: int) -> list[str]:
        """Prompts of a person that suit it, at most ``count``."""

    def judge(self) -> Judge | None:
        """Who scores what it draws, None when nobody was trained to."""

    def foreign(self, images: Sequence[Image]) -> list[bool]:
        """Which images of its resolution are of no kind that it was taught to draw; none for a base of many kinds."""

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Words that its text encoder never saw in training, each once; none for an encoder of a whole language."""


class ReadingBase(Protocol):
    """A loaded base that answers about texts or images: ``model`` with the head of its task, the ``heads`` to train beside
    any adapter, and the ``kind`` that learning rates go by."""

    name: str
    model: Any
    heads: tuple[str, ...]
    kind: Kind

    def tokenizer(self) -> Any:
        """Its fast tokenizer with a padding token, and its chat template if it has one."""

    def targets(self) -> set[str]:
        """Names or endings of the modules to adapt when nobody names any."""

    def fingerprint(self) -> str:
        """16 letters that follow from the weights, and not from where they lie or from adapters."""
