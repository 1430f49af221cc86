"""A zoo inside one basis: every person's adapter is mean + z B, and only z is the person's own.

Adapters that are trained alone solve the same person in different corners of the weight space, and no codec mends that
afterwards. Inside a basis that pictures taught they cannot. The basis comes from a trained generator, or is learnt together
with a table of z by the denoising loss, an auto-decoder (DeepSDF, Park et al. 2019, arXiv 1901.05103): DiffLoRA's weight
autoencoder with its loss in pictures instead of weights, and nothing that looks at a photo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.bank import Bank
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.weightspace.layout import Layout
from smidgen.errors import DataError
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from smidgen.training.loop import LoopConfig
from smidgen.training.processes import num_processes
from smidgen.training.quick import attention_by_products, mixed
from smidgen.training.randomness import examples, stream

FILE = "zoo.safetensors"
FALLS = 0.6  # share of a training after which noise is as the base was taught
GOLDEN = 0.6180339887


class LatentTable(nn.Module):
    """Everybody's latents [people, latents] in the units of ``codec``, whose mean and basis may be trained with them."""

    def __init__(self, codec: Basis, latents: Tensor) -> None:
        super().__init__()
        self.codec, self.numbers, self.table = codec, codec.numbers, nn.Parameter(latents.contiguous())

    def forward(self, people: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents [n, latents] and adapters [n, numbers] of some of them."""
        latents = self.table[list(people)]
        return latents, self.codec.decode(latents)


def strong_first(pictures: PersonalizeTask, power: float, loop: LoopConfig) -> PersonalizeTask:
    """``pictures`` with strong noise ``power`` times as often at first, falling to the base's own noise over the first ``FALLS`` of a
    training: strong noise teaches who is who soonest, but a model that has seen little weak noise draws in a haze."""
    batches = loop.max_train_steps * loop.gradient_accumulation_steps * num_processes()
    return replace(pictures, noise_power=power, noise_batches=FALLS * batches)


class AutoDecoderTask:
    """The base's denoising loss of people's latents; satisfies ``training.loop.Task``.

    Args:
        pictures: everybody's encoded pictures with the base's loss on them.
        places: whose they are: ``places[i]`` are the pictures of person i.
        bank: of the adapter's config, on ``model``.
        size: people in a batch.
        shown: pictures of each in a batch.
    """

    def __init__(
        self, pictures: PersonalizeTask, places: Sequence[Sequence[int]], model: nn.Module, bank: Bank, layout: Layout,
        size: int, shown: int, seed: int,
    ) -> None:  # fmt: skip
        self.pictures, self.places, self.model, self.bank, self.layout = pictures, places, model, bank, layout
        self.size, self.shown, self.seed = min(size, len(places)), shown, seed
        self._held = ExitStack()

    def batch(self, index: int) -> dict[str, Any]:
        """Some people, pictures of theirs and noise of their own."""
        noise = stream(self.seed, "latents", index)
        people = examples(self.seed, index, self.size, len(self.places))
        picks = [[self.places[p][at] for at in _some(len(self.places[p]), self.shown, noise)] for p in people]
        batch = self._batch(people, picks, noise)
        rows = len(batch["names"])
        quantiles = self.pictures.quantiles(rows, noise)[torch.randperm(rows, generator=noise)]
        return batch | {
            "noise": torch.randn(batch["latents"].shape, generator=noise),
            "levels": self.pictures.levels_at(quantiles, index),
        }

    def _batch(self, people: Sequence[int], picks: Sequence[Sequence[int]], noise: torch.Generator) -> dict[str, Any]:
        encoded = self.pictures.subject
        assert isinstance(encoded, Encoded)  # never in buckets
        rows = encoded.rows([pick for own in picks for pick in own], noise)
        return rows | {"people": list(people), "weights": torch.full((len(rows["names"]),), 1 / self.shown)}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean over people."""
        latents, rows = model(batch["people"])
        return self.losses(latents, rows, batch).mean()

    def losses(self, latents: Tensor, rows: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Of each person of the batch [people]."""
        self.release()
        owners = [row for row in range(len(rows)) for _ in range(self.shown)]
        self._held.enter_context(self.bank.holding(self.layout.unpack(rows), rows=owners))
        self._held.enter_context(
            attention_by_products()
        )  # until the next batch: checkpointed layers run again in backward
        with mixed():
            errors = self.pictures.errors(self.model, batch)
        return errors.unflatten(0, (len(rows), self.shown)).sum(1)

    def release(self) -> None:
        """Lets the last batch's adapters go; they stay until here, as gradient checkpointing runs layers in backward."""
        self._held.close()

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Nothing to look at."""


class ZooTask(AutoDecoderTask):
    """Each person's latent alone, with common random numbers: in a step everybody sees pictures of the same number under the
    same noise and times. An optimizer step is a pass over all people, ``size`` at a time.

    Args:
        start: latents [people, latents] that each is pulled towards (None: nowhere).
        pull: what the mean squared distance from there adds to a person's loss.
    """

    def __init__(self, *parts: Any, start: Tensor | None = None, pull: float = 0.0) -> None:
        super().__init__(*parts)
        self.start, self.pull = start, pull
        count, processes = len(self.places), num_processes()
        if count < processes:
            raise DataError(
                f"{count} people cannot be shared by {processes} processes; give more people or start fewer."
            )
        each = min(-(-count // (self.size * processes)), count // processes)
        self.passes = each * processes  # batches to a step

    def batch(self, index: int) -> dict[str, Any]:
        step, part = divmod(index, self.passes)
        first, end = (len(self.places) * number // self.passes for number in (part, part + 1))
        people = range(first, end)
        turns = range(step * self.shown, (step + 1) * self.shown)
        picks = [[self.places[person][turn % len(self.places[person])] for turn in turns] for person in people]
        batch = self._batch(people, picks, stream(self.seed, "pictures", index))
        noise, shape = stream(self.seed, "common", step), batch["latents"].shape[1:]
        quantiles = torch.tensor([(0.3 + turn * GOLDEN) % 1 for turn in turns])  # spread evenly in any few steps
        return batch | {
            "noise": torch.randn(self.shown, *shape, generator=noise).repeat(len(people), *[1] * len(shape)),
            "levels": self.pictures.levels_at(quantiles).repeat(len(people)),
            "weight": len(people),
        }

    def losses(self, latents: Tensor, rows: Tensor, batch: Mapping[str, Any]) -> Tensor:
        losses = super().losses(latents, rows, batch)
        if self.start is None or not self.pull:
            return losses
        return losses + self.pull * (latents - self.start[batch["people"]].to(latents)).square().mean(1)


def first_latents(task: ZooTask, start: Tensor, latents: int) -> Tensor:
    """What people differ in before anything is learnt: principal components [people, latents] of the gradients that their
    pictures give the adapter ``start`` [numbers], each of variance one. An auto-decoder that starts from them need not find out first
    who is who."""
    found = []
    for part in range(task.passes):
        batch = task.batch(part)
        rows = start.expand(len(batch["people"]), -1).clone().requires_grad_(True)
        task.losses(rows.new_zeros(len(rows), latents), rows, batch).sum().backward()
        task.release()
        assert rows.grad is not None
        found.append(rows.grad)
    gradients = torch.cat(found)
    gradients = gradients - gradients.mean(0)
    vectors = torch.linalg.eigh((gradients @ gradients.T).double()).eigenvectors.flip(1)[:, :latents].float()
    return nn.functional.pad(vectors, (0, latents - vectors.shape[1])) * len(gradients) ** 0.5


def write_latents(folder: Path, codec: Basis, ids: Sequence[str], latents: Tensor) -> None:
    """Writes everybody's latents [people, latents], in units of the codec, as ``zoo.safetensors``: some hundred bytes a person."""
    content = save({"latents": codec.raw(latents).contiguous()}, metadata={"people": json.dumps(list(ids))})
    replace_file(folder / FILE, content)


def read_latents(folder: Path) -> tuple[tuple[str, ...], Tensor]:
    """Names and latents [people, latents] that ``write_latents`` wrote, as the basis itself takes them: an adapter is
    ``generator.codec.numbers(latent)``.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        with safe_open(folder / FILE, "pt") as file:
            return tuple(json.loads(file.metadata()["people"])), file.get_tensor("latents")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / FILE} holds no latents that can be read ({error}).") from error


def _some(count: int, wanted: int, noise: torch.Generator) -> list[int]:
    order = torch.randperm(count, generator=noise).tolist()
    return [order[number % count] for number in range(wanted)]
