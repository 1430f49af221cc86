"""The task of personalisation: teach a text-to-image UNet one subject from a handful of pictures.

Pictures and prompts are encoded once and held in memory. A batch draws pictures, noise and timesteps by its number
alone; the loss is the mean squared error of what the base's scheduler asks the UNet to predict. So that the class keeps
looking as it did, a batch may also hold pictures that the base itself drew of the subject's class (prior preservation), or
the subject's own noisy latents with a caption of the class, whose target is what the base answers without the adapter
(output preservation, as ai-toolkit has it).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.atomic import replace_file
from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.tasks.data.images import Picture, load_picture, to_tensor
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.training.randomness import examples, stream


@dataclass(frozen=True)
class Encoded:
    """Encoded examples: ``mean``, ``std`` [n, ...] of the latents, prompts, names for messages, and how often each counts
    beside the others (empty: all the same)."""

    mean: Tensor
    std: Tensor
    prompts: Prompts
    names: tuple[str, ...]
    repeats: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)

    @cached_property
    def places(self) -> list[int]:
        """The examples of one pass, each as often as it counts beside the others."""
        shared = math.gcd(*self.repeats)
        times = [count // shared for count in self.repeats] or [1] * len(self)
        return [place for place, count in enumerate(times) for _ in range(count)]

    def rows(self, picks: Sequence[int], noise: torch.Generator) -> dict[str, Any]:
        """A batch of the examples ``picks``; the latents are drawn from the VAE's distribution with ``noise``."""
        picks = list(picks)
        mean, std = self.mean[picks], self.std[picks]
        latents = mean + std * torch.randn(mean.shape, generator=noise)
        return {"latents": latents, "prompts": self.prompts[picks], "names": [self.names[pick] for pick in picks]}


def encode_examples(base: ImageBase, pictures: Sequence[Picture], captions: Sequence[str], resolution: int) -> Encoded:
    """Encode pictures and their captions with the base's VAE and text encoders."""
    parts = [  # decoded a few at a time: a thousand large pictures would not fit in memory as numbers
        base.encode_images(to_tensor(load_picture(picture.path, resolution) for picture in pictures[at : at + 32]))
        for at in range(0, len(pictures), 32)
    ]
    mean, std = (torch.cat(found) for found in zip(*parts, strict=True))
    prompts = base.sized(base.encode_prompts(captions), [picture.size for picture in pictures], resolution)
    names, repeats = [picture.path.name for picture in pictures], [picture.repeats for picture in pictures]
    return Encoded(mean, std, prompts, tuple(names), tuple(repeats))


def encode_prior(base: ImageBase, scenes: Scenes, cache: Path, key: str) -> Encoded:
    """Let the base draw ``scenes`` of its class; their latents need no VAE.

    They are drawn once: ``cache`` keeps the latents, and is used again as long as the scenes and ``key`` (what identifies
    the base) are the same.
    """
    prompts, options = scenes.encoded(base)
    asked = hashlib.sha256(repr((scenes, key)).encode()).hexdigest()
    latents = _cached(cache, asked)
    if latents is None:
        latents = base.draw_latents(prompts, scenes.seeds, **options)
        replace_file(cache, save({"latents": latents.contiguous()}, metadata={"asked": asked}))
    size = scenes.size or base.resolution
    names = tuple(f"class picture {number}" for number in range(len(prompts)))
    return Encoded(latents, torch.zeros_like(latents), base.sized(prompts, [(size, size)] * len(prompts), size), names)


def _cached(path: Path, asked: str) -> Tensor | None:
    """The latents at ``path`` if they are whole and answer what is ``asked``."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("asked") == asked else None
    except (OSError, SafetensorError):
        return None


@dataclass
class PersonalizeTask:
    """Batches and loss over encoded examples; satisfies ``smidgen.training.loop.Task``.

    ``base`` says what noise there is and what the denoiser predicts, ``prior`` are the class examples (``prior_batch_size`` to a batch,
    their mean loss weighted by ``prior_weight``), ``snr_gamma`` the clamp of min-SNR weighting (None: off).

    ``dropout`` is the share of the subject's captions that ``blank``, the encoded empty prompt, takes the place of.
    ``preserved`` are prompts, one for each example of the subject: at the same noisy latents the model is held to what the
    base itself answers to them; their mean loss is weighted by ``preserved_weight``.
    """

    subject: Encoded
    base: ImageBase
    batch_size: int
    seed: int = 0
    prior: Encoded | None = None
    prior_batch_size: int = 0
    prior_weight: float = 1.0
    snr_gamma: float | None = None
    blank: Prompts | None = None
    dropout: float = 0.0
    preserved: Prompts | None = None
    preserved_weight: float = 1.0
    previewer: Callable[[nn.Module, int, Path], None] | None = None

    def batch(self, index: int) -> dict[str, Any]:
        noise = stream(self.seed, "noise", index)
        picks = self._picks(index, self.subject, self.batch_size)
        parts = [self.subject.rows(picks, noise)]
        if self.blank is not None and self.dropout:
            chance = torch.rand(len(picks), generator=stream(self.seed, "caption dropout", index))
            parts[0]["prompts"] = swapped(parts[0]["prompts"], chance < self.dropout, self.blank)
        weights = [torch.full((self.batch_size,), 1 / self.batch_size)]
        if self.prior is not None:
            parts.append(self.prior.rows(self._picks(index, self.prior, self.prior_batch_size), noise))
            weights.append(torch.full((self.prior_batch_size,), self.prior_weight / self.prior_batch_size))
        batch = {key: join([part[key] for part in parts]) for key in parts[0]}
        batch["noise"] = torch.randn(batch["latents"].shape, generator=noise)
        batch["levels"] = torch.cat([self.levels(len(weight), noise) for weight in weights])
        batch |= {"weights": torch.cat(weights)}
        return batch if self.preserved is None else self._with_preserved(batch, picks)

    def _with_preserved(self, batch: dict[str, Any], picks: Sequence[int]) -> dict[str, Any]:
        """``batch`` with its rows of the subject once more, at the end, with the prompts that are to stay as they were."""
        count = len(picks)
        again = {key: value[:count] for key, value in batch.items()}
        again["prompts"] = self.preserved[list(picks)]  # type: ignore[index]
        again["weights"] = torch.full((count,), self.preserved_weight / count)
        return {key: join([value, again[key]]) for key, value in batch.items()} | {"preserved": count}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.errors(model, batch).sum()

    def errors(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each row of the batch adds to the loss [rows]."""
        schedule = self.base.schedule
        timesteps = schedule.timesteps(batch["levels"])
        noisy, target = schedule.add_noise(batch["latents"], batch["noise"], timesteps)
        if batch.get("preserved"):
            last = slice(-batch["preserved"], None)
            with torch.no_grad(), api.disabled(model):
                kept = self.base.predict(model, noisy[last], timesteps[last], batch["prompts"][last])
            target = torch.cat([target[: -len(kept)], kept.to(target.dtype)])
        errors = (self.base.predict(model, noisy, timesteps, batch["prompts"]) - target).square()
        errors = errors.mean(dim=tuple(range(1, errors.ndim)))
        if self.snr_gamma is not None:
            errors = errors * schedule.snr_weights(timesteps, self.snr_gamma)
        return errors * batch["weights"]

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        if self.previewer is not None:
            self.previewer(model, step, folder)

    def _picks(self, index: int, some: Encoded, size: int) -> list[int]:
        return [some.places[at] for at in examples(self.seed, index, size, len(some.places))]

    def levels(self, count: int, noise: torch.Generator) -> Tensor:
        """Noise levels [count] as the base was taught, evenly spread over their density: less variance between batches."""
        return self.base.schedule.levels(self.quantiles(count, noise))

    def quantiles(self, count: int, noise: torch.Generator) -> Tensor:
        """Numbers in 0..1 spread evenly from one random start, uniform each."""
        return (torch.rand(1, generator=noise) + torch.arange(count) / count) % 1.0


def swapped(prompts: Prompts, rows: Tensor, other: Prompts) -> Prompts:
    """``prompts`` with the one prompt ``other`` in the ``rows`` [prompts] (true or false); what else is told, such as the sizes
    of images, stays."""
    told = Prompts({name: prompts.tensors[name] for name in other.tensors})
    places = torch.where(rows, len(prompts), torch.arange(len(prompts)))
    return Prompts({**prompts.tensors, **Prompts.join([told, other])[places].tensors})


def join(values: Sequence[Any]) -> Any:
    """Parts of a batch's entry as one: tensors, prompts or lists."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return Prompts.join(values) if isinstance(values[0], Prompts) else [name for part in values for name in part]
