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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.atomic import replace_file
from smidgen.bases.protocol import ImageBase, Prompts, Schedule, Size, sides
from smidgen.tasks.data.images import Picture, load_picture, to_tensor
from smidgen.tasks.data.masks import fitted_mask, weights
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.training.randomness import derive, examples, stream


@dataclass(frozen=True)
class Encoded:
    """Encoded examples: ``mean``, ``std`` [n, ...] of the latents, prompts, names for messages, how often each counts beside
    the others (empty: all the same), and what the error of each latent is multiplied with [n, ...] (None: by 1)."""

    mean: Tensor
    std: Tensor
    prompts: Prompts
    names: tuple[str, ...]
    repeats: tuple[int, ...] = ()
    importance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    @cached_property
    def places(self) -> list[int]:
        """The examples of one pass, each as often as it counts beside the others."""
        times = self.repeats or [1] * len(self)
        return [place for place, count in enumerate(times) for _ in range(count)]

    def picked(self, seed: int, index: int, size: int) -> "tuple[Encoded, list[int], list[int]]":
        """The examples of batch number ``index``, shuffled anew at each pass: what holds them, their places in it and their
        numbers among all examples, which here are the same."""
        picks = [self.places[at] for at in examples(seed, index, size, len(self.places))]
        return self, picks, picks

    def rows(self, picks: Sequence[int], noise: torch.Generator) -> dict[str, Any]:
        """A batch of the examples ``picks``; the latents are drawn from the VAE's distribution with ``noise``."""
        picks = list(picks)
        mean, std = self.mean[picks], self.std[picks]
        latents = mean + std * torch.randn(mean.shape, generator=noise)
        found = {"latents": latents, "prompts": self.prompts[picks], "names": [self.names[pick] for pick in picks]}
        return found if self.importance is None else found | {"importance": self.importance[picks]}


@dataclass(frozen=True)
class Buckets:
    """Encoded examples of several shapes; all examples of a batch are of one.

    In as many batches as there are places in all, each part has as many as it has places, in a random order. So each place
    is drawn equally often, whatever its part's size, and a batch follows from its number alone.
    """

    parts: tuple[Encoded, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def _owners(self) -> list[int]:
        return [number for number, part in enumerate(self.parts) for _ in part.places]

    @cached_property
    def prompts(self) -> Prompts:
        """Those of all examples, part after part."""
        return Prompts.join([part.prompts for part in self.parts])

    def picked(self, seed: int, index: int, size: int) -> tuple[Encoded, list[int], list[int]]:
        """The part that batch number ``index`` is of, its examples in it, and their numbers among all."""
        turn, at = divmod(index, len(self._owners))
        order = torch.randperm(len(self._owners), generator=stream(seed, "buckets", turn)).tolist()
        owners = [self._owners[place] for place in order[: at + 1]]
        number, part = owners[-1], self.parts[owners[-1]]
        before = turn * len(part.places) + owners.count(number) - 1  # batches of this part so far
        _, picks, _ = part.picked(derive(seed, "bucket", number), before, size)
        first = sum(map(len, self.parts[:number]))
        return part, picks, [first + pick for pick in picks]


def encode_examples(
    base: ImageBase,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    target: Size,
    least: float = 0.0,
) -> Encoded:
    """Encode pictures and their captions with the base's VAE and text encoders, at ``target``. What their masks leave out counts ``least``."""
    parts = [  # decoded a few at a time: a thousand large pictures would not fit in memory as numbers
        base.encode_images(to_tensor(load_picture(picture.path, target) for picture in pictures[at : at + 32]))
        for at in range(0, len(pictures), 32)
    ]
    mean, std = (torch.cat(found) for found in zip(*parts, strict=True))
    prompts = base.sized(base.encode_prompts(captions), [picture.size for picture in pictures], target)
    names, repeats = [picture.path.name for picture in pictures], [picture.repeats for picture in pictures]
    return Encoded(mean, std, prompts, tuple(names), in_proportion(repeats), _importance(base, pictures, target, least))


def encode_shapes(
    base: ImageBase, pictures: Sequence[Picture], captions: Sequence[str], shapes: Mapping[tuple[int, int], Sequence[int]],
    least: float = 0.0,
) -> Encoded | Buckets:  # fmt: skip
    """Encode each picture at the ``shapes``, (width, height), that hold its number; several shapes become buckets."""
    times = iter(in_proportion([pictures[number].repeats for own in shapes.values() for number in own]))
    parts = []
    for shape, own in shapes.items():
        part = encode_examples(base, [pictures[n] for n in own], [captions[n] for n in own], shape, least)
        parts.append(replace(part, repeats=tuple(next(times) for _ in own)))
    return parts[0] if len(parts) == 1 else Buckets(tuple(parts))


def in_proportion(repeats: Sequence[int]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion.

    Example:
        >>> in_proportion([10, 20, 10])
        (1, 2, 1)
    """
    return tuple(count // math.gcd(*repeats) for count in repeats)


def _importance(base: ImageBase, pictures: Sequence[Picture], target: Size, least: float) -> Tensor | None:
    """What each latent's error counts: by the pictures' masks and weights."""
    if all(picture.mask is None and picture.weight == 1 for picture in pictures):
        return None
    across, down = sides(target)
    masks = [
        fitted_mask(one.mask, one.mask == one.path, one.size, target) if one.mask else torch.ones(1, down, across)
        for one in pictures
    ]
    found = weights(base.latent_masks(torch.stack(masks)), least)
    return found * torch.tensor([one.weight for one in pictures]).reshape(-1, *[1] * (found.ndim - 1))


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
    size = sides(scenes.size or base.resolution)
    names = tuple(f"class picture {number}" for number in range(len(prompts)))
    return Encoded(latents, torch.zeros_like(latents), base.sized(prompts, [size] * len(prompts), size), names)


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
    their mean loss weighted by ``prior_weight``), ``snr_gamma`` the clamp of min-SNR weighting (None: off). ``noise_power`` says how much
    oftener strong noise is shown, where a picture is laid out: quantiles u of the base's own noise become u^(1 / noise_power). It falls to 1
    over the first ``noise_batches`` batches (0: it stays).

    ``dropout`` is the share of the subject's captions that ``blank``, the encoded empty prompt, takes the place of.
    ``preserved`` are prompts, one for each example of the subject: at the same noisy latents the model is held to what the
    base itself answers to them; their mean loss is weighted by ``preserved_weight``. ``schedule`` takes the place of the base's own.
    """

    subject: Encoded | Buckets
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
    schedule: Schedule | None = None
    noise_power: float = 1.0
    noise_batches: float = 0.0

    def batch(self, index: int) -> dict[str, Any]:
        noise = stream(self.seed, "noise", index)
        part, picks, numbers = self.subject.picked(self.seed, index, self.batch_size)
        parts = [part.rows(picks, noise)]
        if self.blank is not None and self.dropout:
            chance = torch.rand(len(picks), generator=stream(self.seed, "caption dropout", index))
            parts[0]["prompts"] = swapped(parts[0]["prompts"], chance < self.dropout, self.blank)
        weights = [torch.full((self.batch_size,), 1 / self.batch_size)]
        if self.prior is not None:
            _, picks, _ = self.prior.picked(self.seed, index, self.prior_batch_size)
            parts.append(self.prior.rows(picks, noise))
            if "importance" in parts[0]:
                parts[1]["importance"] = torch.ones(self.prior_batch_size, *parts[0]["importance"].shape[1:])
            weights.append(torch.full((self.prior_batch_size,), self.prior_weight / self.prior_batch_size))
        batch = {key: join([part[key] for part in parts]) for key in parts[0]}
        batch["noise"] = torch.randn(batch["latents"].shape, generator=noise)
        batch["levels"] = torch.cat([self.levels(len(weight), noise, index) for weight in weights])
        batch |= {"weights": torch.cat(weights)}
        return batch if self.preserved is None else self._with_preserved(batch, numbers)

    def _with_preserved(self, batch: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
        """``batch`` with its rows of the subject once more, at the end, with the prompts that are to stay as they were."""
        count = len(numbers)
        again = {key: value[:count] for key, value in batch.items()}
        again["prompts"] = self.preserved[list(numbers)]  # type: ignore[index]
        again |= (
            {"importance": torch.ones_like(again["importance"])} if "importance" in again else {}
        )  # kept everywhere
        again["weights"] = torch.full((count,), self.preserved_weight / count)
        return {key: join([value, again[key]]) for key, value in batch.items()} | {"preserved": count}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.errors(model, batch).sum()

    def errors(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each row of the batch adds to the loss [rows]."""
        schedule = self.schedule or self.base.schedule
        timesteps = schedule.timesteps(batch["levels"])
        noisy, target = schedule.add_noise(batch["latents"], batch["noise"], timesteps)
        if batch.get("preserved"):
            last = slice(-batch["preserved"], None)
            with torch.no_grad(), api.disabled(model):
                kept = self.base.predict(model, noisy[last], timesteps[last], batch["prompts"][last])
            target = torch.cat([target[: -len(kept)], kept.to(target.dtype)])
        errors = (self.base.predict(model, noisy, timesteps, batch["prompts"]) - target).square()
        if "importance" in batch:
            errors = errors * batch["importance"]
        errors = errors.mean(dim=tuple(range(1, errors.ndim)))
        weights = schedule.weights(timesteps)
        if weights is not None:
            errors = errors * weights
        if self.snr_gamma is not None:
            errors = errors * schedule.snr_weights(timesteps, self.snr_gamma)
        return errors * batch["weights"]

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        if self.previewer is not None:
            self.previewer(model, step, folder)

    def levels(self, count: int, noise: torch.Generator, index: int) -> Tensor:
        """Noise levels [count] of batch ``index``, evenly spread over their density: less variance between batches."""
        return self.levels_at(self.quantiles(count, noise), index)

    def levels_at(self, quantiles: Tensor, index: int = 0) -> Tensor:
        """Noise levels [n] of quantiles [n] that are uniform in 0..1, in batch ``index``."""
        left = max(0.0, 1 - index / self.noise_batches) if self.noise_batches else 1.0
        power = 1 + (self.noise_power - 1) * left
        return (self.schedule or self.base.schedule).levels(quantiles ** (1 / power))

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
