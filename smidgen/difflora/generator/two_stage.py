"""The paper's two stages: a zoo of adapters, then a diffusion over its latents that photos condition.

``on_a_zoo`` is the paper's own form: adapters that were trained alone, a codec of their weights, a diffusion. ``in_a_basis`` trains
the zoo inside one basis (``latent_zoo``), and repeats: each latent is trained again from what the diffusion predicts of its
person, and pulled towards it, so that of all latents that draw a person those stay that a photo can tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.generator import Generator, Possible, load_generator
from smidgen.difflora.generator.hiding import hidden_photos
from smidgen.difflora.generator.latent_zoo import (
    AutoDecoderTask,
    LatentTable,
    ZooTask,
    first_latents,
    strong_first,
    write_latents,
)
from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.people import ENCODED, Photos, people_of, photos_of, training_people
from smidgen.difflora.generator.settings import LEARNED, SHIPPED_BASIS, GeneratorConfig, OwnLatents, SharedBasis
from smidgen.difflora.generator.tasks import LatentTask, answer
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.weightspace.codec import Codec
from smidgen.difflora.weightspace.codecs import known_codec
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.errors import DataError
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.loop import LoopConfig, train
from smidgen.training.processes import by_main, num_processes
from smidgen.training.randomness import derive
from smidgen.training.settings import to_dict

Seen = tuple[PictureEncoder, PictureEncoder]  # face, image
ROWS = 64  # adapters in memory at a time
SAMPLES = 64  # whose mean is nobody in particular
FIRST = 3  # pictures of each person that first tell who is who


def fresh_network(config: GeneratorConfig, photos: Photos, latents: int, seen: Seen) -> Network:
    """A network that knows mean and deviation of the training photos' features, and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "network"))
        network = Network(seen[0].width, seen[1].width, latents, config.model)
    usable = torch.tensor([place for own in photos.usable for place in own])
    network.mixing.standardise(photos.face[usable], photos.image[usable])
    return network


def diffusion(
    config: GeneratorConfig, latents: Tensor, photos: Photos, hidden: Photos | None, seen: Seen, folder: Path,
    identity: dict[str, Any], progress: bool,
) -> Network:  # fmt: skip
    """The transformer trained on latents of variance one ([people, size], or one for each picture) under photos, and ``hidden`` ones."""
    stage, network = config.two_stage, fresh_network(config, photos, latents.shape[1], seen)
    sizes = stage.batch_size, stage.condition_dropout, config.seed, stage.condition_noise
    task = LatentTask(latents, photos, *sizes, hidden, stage.hidden_noise)
    groups = [{"params": list(network.parameters()), "lr": stage.learning_rate, "weight_decay": stage.weight_decay}]
    identity = identity | {"stage": _but(stage, "zoo"), "model": to_dict(config.model)}
    loop = replace(stage.train, seed=config.seed)
    train(task, network, groups, loop, folder, resume="latest", identity=identity, progress=progress)
    return network


# ---- the paper's form ------------------------------------------------------------------------------------------------


def on_a_zoo(
    config: GeneratorConfig, folder: Path, pipeline: AdaptedPipeline, seen: Seen, progress: bool
) -> tuple[Codec, Network]:
    """The codec of the zoo in ``folder``, and the transformer on its latents."""
    zoo, stage = Zoo(folder), config.two_stage
    pipeline.layout.check_same(zoo.layout, f"The adapters in {folder}")
    rows = zoo.rows("train")
    codec = known_codec(stage.codec)(zoo.layout).fit(rows, config.out / "codec_fit", progress)
    wanted = {person.id: person for person in read_subjects(folder)}
    people = [wanted[name] for name in rows.ids]
    photos = photos_of(folder, people, seen[0], seen[1], pipeline.base.resolution, progress)
    place = {name: number for number, name in enumerate(rows.ids)}
    chosen = torch.tensor([place[name] for name in photos.ids]).split(ROWS)
    latents = torch.cat([codec.encode(rows.take(part.tolist())) for part in chosen]).flatten(1)
    hidden = _hidden(config, folder, pipeline, seen)
    network = diffusion(
        config, latents, photos, hidden, seen, config.out / "two_stage", {"rows": zoo.digest()}, progress
    )
    return codec, network


def _but(section: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in to_dict(section).items() if name not in names}


# ---- inside one basis ------------------------------------------------------------------------------------------------


def in_a_basis(
    config: GeneratorConfig, stage: SharedBasis, pipeline: AdaptedPipeline, seen: Seen, progress: bool
) -> tuple[Codec, Network]:
    """The basis, and the transformer on the latents of the last round. ``round_N`` holds each round's generator, and
    everybody's latents."""
    people, moved = config.out / "people", config.encoders.moved_photos
    photos, encoded = people_of(people, stage.people, pipeline.base, seen[0], seen[1], progress, moved)
    hidden = _hidden(config, config.out / "people", pipeline, seen)
    bank = pipeline.bank(["start"])
    start = pipeline.layout.pack(bank.get("start"))
    pipeline.base.release_encoders()
    if stage.gradient_checkpointing:
        pipeline.base.model.enable_gradient_checkpointing()
    pictures = PersonalizeTask(encoded, pipeline.base, 1, snr_gamma=stage.snr_gamma, noise_power=stage.noise_power)
    parts = (pictures, photos.places, pipeline.model, bank, pipeline.layout)
    training = _Training(config, stage, parts, progress)
    if stage.basis == LEARNED:
        codec, latents = training.learnt(start)  # with everybody's latents: the first zoo
    else:
        codec = given_basis(stage.basis, pipeline.layout)
        latents = training.zoo(codec, 1, None)

    def taught(number: int) -> Network:
        """The generator of a round."""
        folder = config.out / f"round_{number}"
        network = diffusion(
            config, latents, photos, hidden, seen, folder / "diffusion", training.identity(number), progress
        )
        generator = Generator(config.base, codec, network, config.encoders, config.model)
        by_main(lambda: generator.save(folder))
        by_main(lambda: write_latents(folder, codec, photos.ids, latents))
        return network

    network = taught(1)
    for number in range(2, stage.rounds + 1):
        latents = training.zoo(codec, number, predicted(network, photos))
        network = taught(number)
    return codec, network


def given_generator(name: str, layout: Layout) -> Generator:
    """The shipped generator, or one in a folder.

    Raises:
        DataError, BaseLockError: it makes other adapters.
    """
    generator = load_generator(None if name == SHIPPED_BASIS else name)
    layout.check_same(generator.layout, f"The adapters of the generator {name!r}")
    return generator


def given_basis(name: str, layout: Layout) -> Basis:
    """The basis of a generator, the shipped one or one in a folder. Latents are counted from the mean of what it samples without a
    photo, in lengths of their basis vectors.

    Raises:
        DataError, BaseLockError: it makes other adapters, or not by one matrix.
    """
    generator = given_generator(name, layout)
    if not isinstance(generator.codec, Basis | PCA) or getattr(generator.codec, "per_layer", False):
        kind = generator.codec.name if not isinstance(generator.codec, Basis) else "a basis for each layer"
        raise DataError(f"The generator {name!r} decodes by {kind!r}; a basis to share is one matrix.")
    codec = Basis.of(generator.codec)
    codec.numbers.requires_grad_(False)
    codec.latent_mean = generator.latents(None, range(SAMPLES)).mean(0)
    codec.latent_width = 1 / codec.numbers.basis.norm(dim=1).clamp(min=1e-6)
    return codec


@torch.no_grad()
def answers(network: Network, photos: Photos, places: Sequence[int]) -> Tensor:
    """The latents [n, size] that one step from no noise answers to the photos in some ``places``."""
    found = []
    for part in torch.tensor(list(places)).split(ROWS):
        found.append(answer(network, photos.face[part][:, None], photos.image[part][:, None]))
    return torch.cat(found)


def predicted(network: Network, photos: Photos) -> Tensor:
    """Those of people [people, size]: the mean over a person's photos."""
    return torch.stack([answers(network, photos, usable).mean(0) for usable in photos.usable])


# ---- over a generator's own latents -----------------------------------------------------------------------------------


def possible_people(
    config: GeneratorConfig, stage: OwnLatents, generator: Generator, pipeline: AdaptedPipeline, seen: Seen, progress: bool
) -> Possible:  # fmt: skip
    """A second network, trained as a diffusion over the generator's own answers to people's photos."""
    folder = config.out / "people"
    people = training_people(folder, stage.people, pipeline.base)
    photos = photos_of(folder, people, seen[0], seen[1], pipeline.base.resolution, progress, folder / ENCODED)
    latents = answers(generator.network, photos, range(len(photos.face)))  # a plain photo has one right answer, its own
    width = latents.std(0).clamp(min=1e-6)
    identity = {"generator": generator.digest, "latents": hashlib.sha256(latents.numpy().tobytes()).hexdigest()}
    hidden = _hidden(config, folder, pipeline, seen)
    config = replace(config, model=replace(stage.model, latents=latents.shape[1]))
    network = diffusion(config, latents / width, photos, hidden, seen, config.out / "own_latents", identity, progress)
    return Possible(network, width, config.model)


def _hidden(config: GeneratorConfig, folder: Path, pipeline: AdaptedPipeline, seen: Seen) -> Photos | None:
    """Photos that hide something, of the training people of the table in ``folder``."""
    count = config.two_stage.hidden_photos
    if not count:
        return None
    people = [person for person in read_subjects(folder) if person.split == "train"]
    return hidden_photos(folder, people, count, pipeline.base, *seen)


class _Training:
    """What trains latents, and the basis with them."""

    def __init__(self, config: GeneratorConfig, stage: SharedBasis, parts: Any, progress: bool) -> None:
        self.config, self.stage, self.parts, self.progress = config, stage, parts, progress
        self.people, self.layout = len(parts[1]), parts[-1]

    def identity(self, number: int) -> dict[str, Any]:
        """What decides the numbers of round ``number``; 0: the basis."""
        zoo = ("rounds", "zoo", "zoo_learning_rate", "round", "round_learning_rate", "round_pull")
        stage = _but(self.stage, *(("rounds",) if number else zoo))
        return {"basis": stage, "latents": self.config.model.latents, "layout": self.layout.digest, "round": number}

    def learnt(self, start: Tensor) -> tuple[Basis, Tensor]:
        """An auto-decoder: mean and basis from nothing, with everybody's latents [people, latents]."""
        stage, config = self.stage, self.config
        codec = Basis.fresh(self.layout, start, config.model.latents, config.shared)
        folder, first = config.out / "basis", torch.zeros(self.people, config.model.latents)
        if not CheckpointStore(folder, 1).steps():  # a training that goes on brings its own
            seeing = ZooTask(*self.parts, stage.batch_size, FIRST, derive(config.seed, "first"))
            first = stage.first_spread * first_latents(seeing, start, config.model.latents)
        model = LatentTable(codec, first)
        codec.numbers.requires_grad_(True)
        pictures = strong_first(self.parts[0], stage.noise_power, stage.train)
        task = AutoDecoderTask(
            *(pictures, *self.parts[1:], stage.batch_size, stage.pictures, derive(config.seed, "basis"))
        )
        groups = [
            {"params": list(codec.numbers.parameters()), "lr": stage.learning_rate, "weight_decay": 0.0},
            {"params": [model.table], "lr": stage.latent_learning_rate, "weight_decay": 0.0},
        ]
        self._train(task, model, groups, stage.train, folder, 0)
        return codec, codec.standardise(model.table.detach())

    def zoo(self, codec: Basis, number: int, start: Tensor | None) -> Tensor:
        """Everybody's latents [people, latents] alone, from nothing or from ``start``, in units of their own deviation,
        which become those of ``codec``."""
        config, stage, first = self.config, self.stage, start is None
        if start is None:
            start = torch.zeros(self.people, codec.latents)
        loop, rate = (stage.zoo, stage.zoo_learning_rate) if first else (stage.round, stage.round_learning_rate)
        model = LatentTable(codec, start.clone())
        task = ZooTask(
            *self.parts, stage.batch_size, stage.zoo_pictures, derive(config.seed, "zoo", number),
            start=start, pull=0.0 if first else stage.round_pull,
        )  # fmt: skip
        loop = replace(loop, gradient_accumulation_steps=task.passes // num_processes())
        groups = [{"params": [model.table], "lr": rate, "weight_decay": 0.0, "betas": (0.9, 0.99)}]
        self._train(task, model, groups, loop, config.out / f"round_{number}" / "zoo", number)
        return codec.standardise(model.table.detach())

    def _train(
        self, task: AutoDecoderTask, model: LatentTable, groups: Any, loop: LoopConfig, folder: Path, number: int
    ) -> None:
        loop = replace(loop, seed=self.config.seed)
        try:
            train(
                task, model, groups, loop, folder, resume="latest", identity=self.identity(number), progress=self.progress,
            )  # fmt: skip
        finally:
            task.release()
        model.requires_grad_(False)
