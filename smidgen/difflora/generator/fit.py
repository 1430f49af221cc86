"""Train a generator: the paper's two stages, the denoising loss end to end, or the one after the other.

    generator = fit(GeneratorConfig(out=Path("generator")))

Killed at any moment, the same call goes on from the last checkpoint. Read from top to bottom.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator import encoders
from smidgen.difflora.generator.card import write_card
from smidgen.difflora.generator.generator import Generator, load_generator
from smidgen.difflora.generator.latent_zoo import strong_first
from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.people import people_of
from smidgen.difflora.generator.settings import EndToEnd, GeneratorConfig
from smidgen.difflora.generator.tasks import EndToEndTask, Trained
from smidgen.difflora.generator.two_stage import (
    Seen,
    fresh_network,
    given_generator,
    in_a_basis,
    on_a_zoo,
    possible_people,
)
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.weightspace.codec import Codec
from smidgen.difflora.zoo.settings import ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.store import Zoo
from smidgen.errors import ConfigError
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.alone import LOCK, OWNER, runs_alone
from smidgen.training.loop import train
from smidgen.training.processes import by_main, is_main
from smidgen.training.settings import dump_yaml, to_dict

logger = logging.getLogger(__name__)
DECODING = 0.08  # learning rate of a decoder as a share of that of an adapter trained alone


@runs_alone
def fit(config: GeneratorConfig, progress: bool = True) -> Generator:
    """Trains and saves the generator in ``config.out``; returns it.

    Raises:
        DataError: no people, no faces, or a zoo of another adapter.
        BaseLockError: a zoo of another base.
        TrainingInterrupted: on Ctrl-C or SIGTERM; the same call goes on.
    """
    seen = encoders.load(config.encoders.face), encoders.load(config.encoders.image)
    adapter = adapter_config(ZooConfig(adapter=config.adapter))
    pipeline = AdaptedPipeline.load(config.base, adapter, _precision(config))
    codec: Codec | None = None
    network: Network | None = None
    with _settings(config):
        if config.two_stage.zoo is not None:
            codec, network = on_a_zoo(config, config.two_stage.zoo, pipeline, seen, progress)
        if config.shared_basis is not None:
            codec, network = in_a_basis(config, config.shared_basis, pipeline, seen, progress)
        if config.end_to_end is not None:
            origin = None
            if config.end_to_end.generator is not None:
                codec, network, origin = _going_on(config, config.end_to_end.generator, pipeline)
            codec, network = _end_to_end(config, config.end_to_end, pipeline, seen, codec, network, origin, progress)
        if codec is not None and network is not None:
            generator = Generator(config.base, codec, network, config.encoders, config.model)
        else:
            assert config.own_latents is not None
            generator = given_generator(str(config.own_latents.generator), pipeline.layout)
        if config.own_latents is not None:
            generator.possible = possible_people(config, config.own_latents, generator, pipeline, seen, progress)
    by_main(lambda: generator.save(config.out))
    by_main(lambda: write_card(generator, config.out))
    return load_generator(config.out)  # what was written has 16 bits


@contextmanager
def _settings(config: GeneratorConfig) -> Iterator[None]:
    """The settings lie in ``config.out`` while it is trained; they go again when it is refused before there is anything to
    go on from."""
    written = config.out / "config.yaml"
    before = written.read_bytes() if written.is_file() else None
    by_main(lambda: replace_file(written, dump_yaml(config)))
    try:
        yield
    except BaseException:
        if (
            is_main()
            and before is None
            and all(path == written or path.name in (LOCK, OWNER) for path in config.out.iterdir())
        ):
            written.unlink()
        raise


def _precision(config: GeneratorConfig) -> Any:
    """What the frozen base is held in; adapters are of a base to the bit.

    Raises:
        ConfigError: the stages, or the zoo that was built before, ask for different precisions.
    """
    stages = {"shared_basis": config.shared_basis, "end_to_end": config.end_to_end}
    asked = {name: stage.train.mixed_precision for name, stage in stages.items() if stage is not None}
    if config.two_stage.zoo is not None:
        built = Zoo(config.two_stage.zoo).settings.get("train", {}).get("mixed_precision", "no")
        asked = {f"the zoo in {config.two_stage.zoo}": built} | asked
    if len(set(asked.values())) > 1:
        told = ", ".join(f"{name} {precision!r}" for name, precision in asked.items())
        raise ConfigError(
            f"Adapters belong to the base as it was when they were trained, and mixed_precision differs: {told}. Set "
            f"{list(asked)[-1]}.train.mixed_precision to {next(iter(asked.values()))!r}."
        )
    return next(iter(asked.values()), "no")


def _end_to_end(
    config: GeneratorConfig, stage: EndToEnd, pipeline: AdaptedPipeline, seen: Seen, codec: Codec | None, network: Network | None,
    origin: str | None, progress: bool,
) -> tuple[Codec, Network]:  # fmt: skip
    """The transformer and the decoder, from the two stages' weights, a generator's, or from nothing."""
    people, moved = config.out / "people", config.encoders.moved_photos
    photos, encoded = people_of(people, stage.people, pipeline.base, seen[0], seen[1], progress, moved)
    bank = pipeline.bank(["start"])
    codec = _decoder(config, pipeline.layout, pipeline.layout.pack(bank.get("start")), codec)
    network = network or fresh_network(config, photos, torch.Size(codec.latent_shape).numel(), seen)
    decoder: torch.nn.Module = codec.numbers if isinstance(codec, Basis) else codec.network  # type: ignore[attr-defined]
    model = Trained(network, decoder).requires_grad_(True)
    pipeline.base.release_encoders()
    if stage.gradient_checkpointing:
        pipeline.base.model.enable_gradient_checkpointing()
    rows = stage.batch_size * stage.pictures
    pictures = PersonalizeTask(encoded, pipeline.base, rows, config.seed, snr_gamma=stage.snr_gamma)
    pictures = strong_first(pictures, stage.noise_power, stage.train)
    task = EndToEndTask(photos, pictures, pipeline.model, bank, codec, stage, config.seed)
    decoding = (
        stage.decoder_learning_rate or DECODING * rates(ZooConfig(adapter=config.adapter, base=config.base)).residual
    )
    groups = [
        {"params": list(network.parameters()), "lr": stage.learning_rate, "weight_decay": 0.0},
        {"params": list(decoder.parameters()), "lr": decoding, "weight_decay": 0.0},
    ]
    identity: dict[str, Any] = {"stage": to_dict(stage), "model": to_dict(config.model), "shared": config.shared}
    if origin is not None:
        identity["from"] = origin
    identity |= {"layout": pipeline.layout.digest, "decoder_learning_rate": decoding, "zoo": str(config.two_stage.zoo)}
    try:
        train(
            task, model, groups, replace(stage.train, seed=config.seed), config.out / "end_to_end", resume="latest",
            identity=identity, progress=progress,
        )  # fmt: skip
    finally:
        task.release()
    model.requires_grad_(False)
    return codec, network


def _going_on(config: GeneratorConfig, name: str, pipeline: AdaptedPipeline) -> tuple[Codec, Network, str]:
    """What a generator is made of, to be trained on, and its digest.

    Raises:
        ConfigError: its sizes or encoders are not those of ``config``.
        DataError, BaseLockError: it makes other adapters.
    """
    generator = given_generator(name, pipeline.layout)
    its = to_dict(generator.model) | {"face": generator.sees.face, "image": generator.sees.image}
    asked = to_dict(config.model) | {"face": config.encoders.face, "image": config.encoders.image}
    for key in its:
        if its[key] != asked[key]:
            raise ConfigError(
                f"The generator {name!r} to go on from has {key} {its[key]!r}, asked for is {asked[key]!r}. Take its own settings "
                "(config.yaml in its folder), or leave out end_to_end.generator."
            )
    return generator.codec, generator.network, generator.digest


def _decoder(config: GeneratorConfig, layout: Any, start: Tensor, codec: Codec | None) -> Codec:
    """A codec whose decoder can be trained."""
    if codec is None:
        model = config.model
        return Basis.fresh(layout, start, model.latents, config.shared, model.per_layer, model.int8)
    return codec if hasattr(codec, "network") or isinstance(codec, Basis) else Basis.of(codec)
