"""What a generator is trained on: the paper's diffusion over a zoo's latents, and the denoising loss end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.bank import Bank
from smidgen.bases.protocol import Prompts
from smidgen.difflora.generator.diffusion import STEPS
from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.generator.settings import EndToEnd
from smidgen.difflora.weightspace.codec import Codec
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.quick import attention_by_products, mixed
from smidgen.training.randomness import examples, stream

SHORT = 2 / 3  # share of steps that see short captions, where they are asked for


class LatentTask:
    """Latents under photos of their people: [people, size], or [pictures, size] where each picture has its own; satisfies
    ``training.loop.Task``.

    The loss is the mean square of what the transformer should answer less what it answers. A share ``dropout`` of the people
    comes without a photo, so that nobody in particular is learnt too, and half of the others with one of ``hidden``, photos
    that hide something, where they have any there. Features get Gaussian noise of ``condition_noise`` times their deviation among
    ``photos``, those of hiding photos of ``hidden_noise`` times it: what a photo does not say of its person, this one's features must not
    tell by being unlike all others.
    """

    def __init__(
        self, latents: Tensor, photos: Photos, batch_size: int, dropout: float, seed: int, condition_noise: float = 0.0,
        hidden: Photos | None = None, hidden_noise: float = 0.0,
    ) -> None:  # fmt: skip
        self.latents, self.photos, self.seed = latents, photos, seed
        self.batch_size, self.dropout = min(batch_size, len(photos)), dropout
        self.of_pictures = len(latents) == len(photos.face)
        self.condition_noise, self.hidden_noise = condition_noise, hidden_noise
        self.hidden = hidden
        self.hiding = dict(zip(hidden.ids, hidden.usable, strict=True)) if hidden else {}
        self.widths = {name: getattr(photos, name).std(0) for name in ("face", "image")}

    def batch(self, index: int) -> dict[str, Any]:
        noise = stream(self.seed, "latents", index)
        people = examples(self.seed, index, self.batch_size, len(self.photos))
        chosen = [[_pick(self.photos.usable[person], noise)] for person in people]
        clean = self.latents[[own for (own,) in chosen] if self.of_pictures else people]
        features = self.photos.batch(chosen)
        amount = torch.full((len(people), 1, 1), self.condition_noise)
        if self.hidden is not None:
            for row, person in enumerate(people):
                own = self.hiding.get(self.photos.ids[person])
                if own and _toss(noise, 0.5):
                    place = _pick(own, noise)
                    features["face"][row, 0], features["image"][row, 0] = (
                        self.hidden.face[place],
                        self.hidden.image[place],
                    )
                    amount[row] = self.hidden_noise
        if amount.any():
            for name, value in features.items():
                features[name] = value + amount * self.widths[name] * torch.randn(value.shape, generator=noise)
        return features | {
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=noise),
            "times": torch.randint(0, STEPS, (len(people),), generator=noise),
            "hidden": torch.rand(len(people), generator=noise) < self.dropout,
            "names": [self.photos.ids[person] for person in people],
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        network = _network(model)
        condition = network.mixing(batch["face"], batch["image"])
        condition = torch.where(batch["hidden"][:, None], network.nobody, condition)
        process, clean, noise, times = network.process, batch["clean"], batch["noise"], batch["times"]
        answer = network(process.noised(clean, noise, times), times, condition)
        return (answer - process.target(clean, noise, times)).square().mean()

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Nothing to look at."""


@torch.no_grad()
def answer(network: Network, face: Tensor, image: Tensor) -> Tensor:
    """The latents [n, size] that one step from no noise answers to photos' features [n, photos, width]."""
    last = torch.full((len(face),), network.process.last)
    return network.clean(face.new_zeros(len(face), network.latents), last, network.mixing(face, image))


class Trained(nn.Module):
    """What the end-to-end stage trains: the network, and what decodes latents."""

    def __init__(self, network: Network, decoder: nn.Module) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder


class EndToEndTask:
    """The base's denoising loss through decoder and adapter; satisfies ``training.loop.Task``.

    A batch is some people, photos of each for the generator, and other pictures of each for the base to denoise; the
    adapters of a batch are rows that ``bank`` holds. Half of the adapters come from noise alone, as the sampler's first
    step makes them; half from the network's own first answer noised again, as its later steps do. Besides, nobody in
    particular is learnt as a diffusion over the batch's own latents, so that new people can be sampled.

    Args:
        pictures: the pictures' latents and captions, with the base's loss on them.
        bank: of the adapter's config, on ``unet``.
        codec: with the layout of the adapters; its decoder is trained with the network.
    """

    def __init__(
        self, photos: Photos, pictures: PersonalizeTask, unet: nn.Module, bank: Bank, codec: Codec, config: EndToEnd,
        seed: int,
    ) -> None:  # fmt: skip
        self.photos, self.pictures, self.unet, self.bank, self.codec = photos, pictures, unet, bank, codec
        self.config, self.seed = config, seed
        self._held = ExitStack()

    def batch(self, index: int) -> dict[str, Any]:
        config, noise = self.config, stream(self.seed, "end to end", index)
        people = examples(self.seed, index, min(config.batch_size, len(self.photos)), len(self.photos))
        seen = int(torch.randint(1, config.references + 1, (), generator=noise)) if _toss(noise, 0.4) else 1
        chosen, drawn = [], []
        for person in people:
            order = _shuffled(self.photos.usable[person], noise)
            chosen.append([order[number % len(order)] for number in range(seen)])
            others = [place for place in _shuffled(self.photos.places[person], noise) if place not in chosen[-1]]
            others = others or list(self.photos.places[person])
            drawn += [others[number % len(others)] for number in range(config.pictures)]
        batch = self.photos.batch(chosen) | self.pictures.subject.rows(drawn, noise)  # type: ignore[union-attr]  # never in buckets
        if config.short_captions and _toss(noise, SHORT):
            tensors = batch["prompts"].tensors
            batch["prompts"] = Prompts({name: value[:, : config.short_captions] for name, value in tensors.items()})
        rows, latents = len(drawn), (len(people), self._latents)
        return batch | {
            "noise": torch.randn(batch["latents"].shape, generator=noise),
            "levels": self.pictures.levels(rows, noise, index),
            "weights": torch.full((rows,), 1 / rows),
            "first": torch.randn(latents, generator=noise),
            "again": torch.randn(latents, generator=noise),
            "free": torch.randn(latents, generator=noise),
            "times": torch.randint(0, STEPS, (len(people),), generator=noise),
            "free_times": torch.randint(0, STEPS, (len(people),), generator=noise),
            "rollout": torch.rand(len(people), generator=noise) < 0.5,
        }

    @property
    def _latents(self) -> int:
        return torch.Size(self.codec.latent_shape).numel()

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        network = _network(model)
        latents = self.latents(network, batch)
        rows = self.codec.decode(latents.reshape(-1, *self.codec.latent_shape))
        owners = [row for row in range(len(rows)) for _ in range(len(batch["weights"]) // len(rows))]
        self.release()
        self._held.enter_context(self.bank.holding(self.codec.layout.unpack(rows), rows=owners))
        self._held.enter_context(
            attention_by_products()
        )  # until the next batch: checkpointed layers run again in backward
        with mixed():
            loss = self.pictures.errors(self.unet, batch).sum()
        return loss + self.config.base_loss_weight * self.free_loss(network, latents.detach(), batch)

    def latents(self, network: Network, batch: Mapping[str, Any]) -> Tensor:
        """The people's latents [people, size]."""
        condition = network.mixing(batch["face"], batch["image"])
        last = torch.full_like(batch["times"], network.process.last)
        with torch.no_grad():
            found = network.clean(batch["first"], last, condition)
            noised = network.process.noised(found, batch["again"], batch["times"])
        again = batch["rollout"]
        noisy = torch.where(again[:, None], noised, batch["first"])
        return network.clean(noisy, torch.where(again, batch["times"], last), condition)

    @staticmethod
    def free_loss(network: Network, latents: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The diffusion loss of ``latents`` without a photo."""
        process, times = network.process, batch["free_times"]
        answer = network(process.noised(latents, batch["free"], times), times, network.nobody.expand(len(latents), -1))
        return (answer - process.target(latents, batch["free"], times)).square().mean()

    def release(self) -> None:
        """Lets the last batch's adapters go. They stay until here, as gradient checkpointing runs layers in backward."""
        self._held.close()

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Nothing to look at."""


def _network(model: nn.Module) -> Network:
    inner = getattr(model, "network", model)
    assert isinstance(inner, Network)
    return inner


def _toss(noise: torch.Generator, share: float) -> bool:
    return bool(torch.rand((), generator=noise) < share)


def _pick(values: Sequence[int], noise: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=noise))]


def _shuffled(values: Sequence[int], noise: torch.Generator) -> list[int]:
    return [values[place] for place in torch.randperm(len(values), generator=noise).tolist()]
