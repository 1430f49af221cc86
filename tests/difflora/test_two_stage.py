"""The two stages inside one basis: the zoo of latents, its tasks, and a whole training that is killed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from damage import rewrite
from PIL import Image

from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator import encoders, two_stage
from smidgen.difflora.generator import fit as fitting
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.generator import load_generator
from smidgen.difflora.generator.latent_zoo import (
    AutoDecoderTask,
    LatentTable,
    ZooTask,
    first_latents,
    read_latents,
    strong_first,
)
from smidgen.difflora.generator.people import people_of
from smidgen.difflora.generator.settings import PRESETS, GeneratorConfig, SharedBasis, TwoStage
from smidgen.difflora.generator.tasks import LatentTask
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.zoo.settings import Subjects, ZooConfig, adapter_config
from smidgen.errors import BaseLockError, ConfigError, DataError
from smidgen.tasks.data.images import to_tensor
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.loop import LoopConfig, train
from tests.difflora.test_generator_parts import some_layout

LATENTS = 4


class Colours(PictureEncoder):
    """The mean colour of each quarter of a picture."""

    width, name, reads = 12, "colours", "any picture"

    def encode(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(to_tensor(images), 2).flatten(1)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda name: Colours())


@pytest.fixture(scope="module")
def made(base, people, tmp_path_factory) -> SimpleNamespace:
    """A tiny base with a basis, and the people's pictures encoded."""
    pipeline = AdaptedPipeline.load(str(base), adapter_config(ZooConfig()))
    folder = tmp_path_factory.mktemp("encoded")
    photos, encoded = people_of(
        folder, Subjects(folder=people, held_out_share=0.0), pipeline.base, Colours(), Colours(), False
    )
    bank = pipeline.bank(["start"])
    codec = Basis.fresh(pipeline.layout, pipeline.layout.pack(bank.get("start")), LATENTS)
    with torch.no_grad():
        codec.numbers.basis.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    codec.numbers.requires_grad_(False)
    mean = encoded.mean[list(range(len(encoded)))]
    pictures = PersonalizeTask(
        replace(encoded, mean=mean, std=torch.zeros_like(mean)), pipeline.base, 1, noise_power=3.0
    )
    return SimpleNamespace(pipeline=pipeline, photos=photos, pictures=pictures, bank=bank, codec=codec)


def zoo_parts(made, people=slice(None)):
    return made.pictures, made.photos.places[people], made.pipeline.model, made.bank, made.pipeline.layout


def zoo_task(made, people=slice(None), size=2, **options) -> ZooTask:
    return ZooTask(*zoo_parts(made, people), size, 2, 7, **options)


def trained(made, task, start, folder, steps=3):
    model = LatentTable(made.codec, start.clone())
    loop = LoopConfig(max_train_steps=steps, lr_warmup_steps=0, gradient_accumulation_steps=task.passes)
    train(task, model, [{"params": [model.table], "lr": 0.1, "weight_decay": 0.0}], loop, folder, progress=False)
    task.release()
    return model.table.detach()


# ---- the tasks -------------------------------------------------------------------------------------------------------


def test_everybody_sees_the_same_pictures_times_and_noise_in_a_step(made):
    task = zoo_task(made)
    assert task.passes == 3
    batches = [task.batch(6 + part) for part in range(3)]  # step 2: pictures 4 and 5 of three
    assert [batch["people"] for batch in batches] == [[0], [1, 2], [3, 4]]
    assert [batch["weight"] for batch in batches] == [1, 2, 2]
    for batch in batches:
        for key in ("noise", "levels"):
            assert all(torch.equal(part, batches[0][key]) for part in batch[key].split(2))
        assert [name.rpartition(" ")[2] for name in batch["names"][:2]] == ["1", "2"]
    assert not torch.equal(task.batch(0)["noise"], task.batch(3)["noise"])


def test_a_latent_of_the_zoo_does_not_depend_on_who_is_trained_beside_it(made, tmp_path):
    start = torch.zeros(5, LATENTS)
    together = trained(made, zoo_task(made, size=3), start, tmp_path / "all")
    alone = trained(made, zoo_task(made, slice(3, 4), size=3), start[:1], tmp_path / "one")
    assert together.abs().min() > 0.02
    torch.testing.assert_close(together[3:4], alone, atol=2e-3, rtol=1e-2)


def test_a_strong_pull_keeps_latents_where_they_were_predicted(made, tmp_path):
    start = torch.randn(5, LATENTS, generator=torch.Generator().manual_seed(1))
    free = trained(made, zoo_task(made, start=start), start, tmp_path / "free")
    held = trained(made, zoo_task(made, start=start, pull=1e4), start, tmp_path / "held")
    assert (held - start).norm() < 0.5 * (free - start).norm()


def test_the_pull_is_the_mean_square_of_the_way(made):
    start, latents = torch.zeros(5, LATENTS), torch.full((2, LATENTS), 3.0)
    losses = []
    for pull in (0.0, 0.5):
        task = zoo_task(made, start=start, pull=pull)
        with torch.no_grad():
            losses.append(task.losses(latents, made.codec.decode(latents), task.batch(1)))
        task.release()
    torch.testing.assert_close(losses[1] - losses[0], torch.full((2,), 4.5))


def test_an_auto_decoder_learns_basis_and_latents_of_the_people_in_its_batches(made):
    codec = Basis.fresh(made.pipeline.layout, made.codec.numbers.mean, LATENTS)
    model = LatentTable(codec, torch.randn(5, LATENTS, generator=torch.Generator().manual_seed(2)))
    codec.numbers.requires_grad_(True)
    task = AutoDecoderTask(*zoo_parts(made), 2, 1, 0)
    batch = task.batch(3)
    assert batch["people"] == task.batch(3)["people"] and torch.equal(batch["noise"], task.batch(3)["noise"])
    task.loss(model, batch).backward()
    assert codec.numbers.basis.grad.norm() > 0 and model.table.grad.norm() == 0  # a basis of zeros moves first
    with torch.no_grad():
        codec.numbers.basis.sub_(codec.numbers.basis.grad)
    task.loss(model, batch).backward()
    task.release()
    moved = model.table.grad.norm(dim=1) > 0
    assert sorted(moved.nonzero().flatten().tolist()) == sorted(batch["people"])


def test_strong_noise_is_shown_more_often_by_the_power(made):
    quantiles = torch.linspace(0.05, 0.95, 5)
    plain, strong = (replace(made.pictures, noise_power=power) for power in (1.0, 3.0))
    schedule = made.pipeline.base.schedule
    assert torch.equal(plain.levels_at(quantiles), schedule.levels(quantiles))
    assert torch.equal(strong.levels_at(quantiles**3), schedule.levels((quantiles**3) ** (1 / 3)))
    assert strong.levels_at(quantiles).mean() > plain.levels_at(quantiles).mean() + 0.1
    falling = strong_first(made.pictures, 3.0, LoopConfig(max_train_steps=50, gradient_accumulation_steps=2))
    assert torch.equal(falling.levels_at(quantiles, 0), strong.levels_at(quantiles))
    between = replace(made.pictures, noise_power=2.0)
    assert torch.equal(
        falling.levels_at(quantiles, 30), between.levels_at(quantiles)
    )  # of 60 batches, those of 30 steps
    assert all(torch.equal(falling.levels_at(quantiles, at), plain.levels_at(quantiles)) for at in (60, 99))


def test_the_first_latents_tell_people_apart_by_their_pictures_alone(made):
    start = made.codec.numbers.mean.detach()
    found = first_latents(zoo_task(made, size=3), start, LATENTS)
    torch.testing.assert_close(found.square().mean(0), torch.ones(LATENTS), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.mean(0), torch.zeros(LATENTS), atol=1e-3, rtol=0)
    again = first_latents(zoo_task(made, size=5), start, LATENTS)  # in other groups
    torch.testing.assert_close((found.T @ again).abs() / 5, torch.eye(LATENTS), atol=2e-2, rtol=0)
    assert first_latents(zoo_task(made, size=5), start, 7)[:, 5:].abs().max() == 0  # more latents than people


def test_condition_noise_is_counted_in_deviations_and_zero_changes_nothing(made):
    latents, photos = torch.randn(5, LATENTS), made.photos
    plain, same, noisy = (LatentTask(latents, photos, 64, 0.1, 0, noise) for noise in (0.0, 0.0, 0.5))
    assert torch.equal(plain.batch(1)["face"], same.batch(1)["face"])
    widths = []
    for number in range(60):
        found = noisy.batch(number)["face"]
        nearest = torch.cdist(found[:, 0], photos.face).min(1)
        widths.append(((found[:, 0] - photos.face[nearest.indices]) / photos.face.std(0)).square().mean().sqrt())
    assert 0.3 < torch.stack(widths).mean() < 0.6


@pytest.mark.parametrize(("world_size", "size"), [(1, 2), (2, 2), (2, 1), (3, 4), (5, 2)])
def test_a_step_of_a_zoo_sees_everybody_once_over_all_processes(made, monkeypatch, world_size, size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    task = zoo_task(made, size=size)
    assert task.passes % world_size == 0
    seen = [task.batch(index)["people"] for index in range(task.passes, 2 * task.passes)]
    assert [person for own in seen for person in own] == list(range(5)) and all(seen)


def test_more_processes_than_people_are_refused(made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(DataError, match="5 people cannot be shared by 6 processes"):
        zoo_task(made)


# ---- the basis -------------------------------------------------------------------------------------------------------


def test_standardised_latents_decode_as_before():
    codec = Basis.fresh(some_layout(), torch.randn(18), 5)
    with torch.no_grad():
        codec.numbers.basis.normal_()
    latents = 3 * torch.randn(50, 5) + 2
    before = codec.decode(latents)
    found = codec.standardise(latents)
    torch.testing.assert_close(codec.decode(found), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.std(0), torch.ones(5))
    again = codec.standardise(2 * found)
    torch.testing.assert_close(codec.decode(again), codec.decode(again))
    torch.testing.assert_close(again, found, atol=1e-4, rtol=1e-4)


def test_the_shipped_basis_is_counted_in_lengths_of_its_vectors():
    shipped = load_generator()
    codec = two_stage.given_basis("shipped", shipped.layout)
    one = codec.decode(torch.eye(codec.latents)[:1]) - codec.decode(torch.zeros(1, codec.latents))
    assert abs(float(one.norm()) - 1) < 1e-3
    with pytest.raises((DataError, BaseLockError)):
        two_stage.given_basis("shipped", some_layout())


def test_only_one_kind_of_two_stages_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="shared_basis"):
        GeneratorConfig(two_stage=TwoStage(zoo=tmp_path), shared_basis=SharedBasis())
    with pytest.raises(ConfigError, match="rounds"):
        SharedBasis(rounds=0)


# ---- a whole training ------------------------------------------------------------------------------------------------


def config(base, people, out) -> GeneratorConfig:
    preset, loop = PRESETS["two-stage"], LoopConfig(max_train_steps=3, lr_warmup_steps=0, checkpointing_steps=1)
    stage = SharedBasis(
        people=Subjects(folder=people, held_out_share=0.0), batch_size=3, train=loop, zoo=loop, round=loop, rounds=2,
    )  # fmt: skip
    model = replace(PRESETS["debug"].model, latents=LATENTS, inference_steps=3)
    diffusion = replace(preset.two_stage, batch_size=4, train=loop)
    return replace(preset, base=str(base), out=out, model=model, shared_basis=stage, two_stage=diffusion)


@pytest.mark.parametrize("dies_after", [3, 8])  # in the basis, in the second zoo; two batches find the first latents
def test_a_training_that_is_killed_ends_with_the_same_bytes(base, people, tmp_path, monkeypatch, colours, dies_after):
    whole = fitting.fit(config(base, people, tmp_path / "whole"), progress=False)
    losses, calls = AutoDecoderTask.losses, []

    def dies(self, *parts):
        calls.append(1)
        if len(calls) > dies_after:
            raise KeyboardInterrupt
        return losses(self, *parts)

    monkeypatch.setattr(AutoDecoderTask, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(config(base, people, tmp_path / "killed"), progress=False)
    assert not (tmp_path / "killed" / "generator.json").exists()
    monkeypatch.setattr(AutoDecoderTask, "losses", losses)
    again = fitting.fit(config(base, people, tmp_path / "killed"), progress=False)
    assert again.digest == whole.digest


def test_a_round_is_a_generator_with_everybodys_latents_and_the_last_is_the_whole(base, people, tmp_path, colours):
    made = fitting.fit(config(base, people, tmp_path), progress=False)
    last = load_generator(tmp_path / "round_2")
    assert last.digest == made.digest != load_generator(tmp_path / "round_1").digest
    ids, latents = read_latents(tmp_path / "round_2")
    assert ids == ("ann", "bob", "cleo", "dan", "eve") and latents.shape == (5, LATENTS)
    torch.testing.assert_close(latents.mean(0), last.codec.latent_mean, atol=1e-4, rtol=1e-3)
    photo = Image.open(people / "ann" / "0.png").convert("RGB")
    assert made.predict([photo]).shape == (1, made.layout.size)
    rewrite(tmp_path / "round_2" / "zoo.safetensors", b"no tensors")
    with pytest.raises(DataError, match=r"zoo\.safetensors"):
        read_latents(tmp_path / "round_2")


def test_the_basis_of_a_generator_is_taken_as_it_is(base, people, tmp_path, colours):
    first = fitting.fit(config(base, people, tmp_path / "first"), progress=False)
    chosen = config(base, people, tmp_path / "second")
    chosen = replace(chosen, shared_basis=replace(chosen.shared_basis, basis=str(tmp_path / "first"), rounds=1))
    second = fitting.fit(chosen, progress=False)
    assert not (tmp_path / "second" / "basis").exists()
    latent = torch.randn(1, LATENTS)
    moved = [g.codec.decode(latent) - g.codec.decode(torch.zeros(1, LATENTS)) for g in (first, second)]
    span = torch.linalg.svd(first.codec.numbers.basis, full_matrices=False).Vh
    torch.testing.assert_close(moved[1] @ span.T @ span, moved[1], atol=2e-3, rtol=1e-2)
