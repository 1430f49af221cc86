"""The generator's parts: process, transformer, mixing, basis, tasks, and a training that is killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smidgen.bases.embedded import world
from smidgen.difflora.generator import fit as fitting
from smidgen.difflora.generator.diffusion import Process
from smidgen.difflora.generator.mixing import MixedImageFeatures
from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.generator.settings import PRESETS, Encoders, GeneratorConfig, Model
from smidgen.difflora.generator.tasks import LatentTask
from smidgen.difflora.generator.transformer import DiffusionTransformer
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.weightspace.codecs import load_codec
from smidgen.difflora.weightspace.layout import Entry, Layout
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.weightspace.rows import TensorRows
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data.images import load_picture
from smidgen.training.loop import LoopConfig, train
from tests.difflora import helpers

PREDICTIONS = ("x0", "v", "flow")


def some_layout(residual: str = "low_rank") -> Layout:
    entries = (Entry("q", "residual_a", (2, 5), 0), Entry("q", "residual_b", (4, 2), 10))
    if residual != "low_rank":
        entries = (Entry("q", "residual_s", (18,), 0),)
    return Layout(entries, {"method": "lora", "residual": residual, "r": 2}, {"sha256": "0", "lock": {}})


# ---- the diffusion -------------------------------------------------------------------------------------------------


@given(kind=st.sampled_from(PREDICTIONS), time=st.integers(0, 998), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_clean_latent_follows_from_the_right_answer(kind, time, seed):
    noise = torch.Generator().manual_seed(seed)
    clean, added = torch.randn(3, 7, generator=noise), torch.randn(3, 7, generator=noise)
    process, times = Process(kind), torch.full((3,), time)
    noisy = process.noised(clean, added, times)
    torch.testing.assert_close(
        process.clean(noisy, process.target(clean, added, times), times), clean, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_powers_are_those_of_diffusers(kind):
    import diffusers

    if kind == "flow":
        pytest.skip("a straight line has no table")
    reference = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    torch.testing.assert_close(Process(kind).alphas, reference.alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_sampler_with_the_right_answers_ends_at_the_clean_latent(kind, steps):
    clean, process = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), Process(kind)

    def right(noisy, times):
        signal, spread = process._powers(times)
        noise = (noisy - signal * clean) / spread
        return process.target(clean, noise, times)

    noise = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    found = process.sample(right, noise, steps)
    torch.testing.assert_close(found, clean, atol=2e-2, rtol=2e-2)


# ---- the network ---------------------------------------------------------------------------------------------------


def test_an_untrained_transformer_hears_the_condition_and_hardly_the_noise():
    torch.manual_seed(0)
    network = DiffusionTransformer(30, 4, 32, 2, 4)
    noisy, times, told = torch.randn(8, 30), torch.full((8,), 999), torch.randn(8, 32)
    by_condition = network(noisy[:1].expand(8, -1), times, told).std(0).mean()
    by_noise = network(noisy, times, told[:1].expand(8, -1)).std(0).mean()
    assert network(noisy, times, told).shape == (8, 30)
    assert by_condition > 5 * by_noise > 0


def test_gates_at_zero_leave_the_blocks_out():
    torch.manual_seed(0)
    network = DiffusionTransformer(8, 2, 16, 3, 2)
    x, told = torch.randn(2, 2, 16), torch.randn(2, 16)
    for block in network.blocks:
        assert torch.equal(block(x, told), x)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_mixed_features_are_the_formula_and_the_mean_over_photos(gate):
    torch.manual_seed(0)
    mixing = MixedImageFeatures(5, 7, 16, gate)
    face, image = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    mixing.standardise(torch.randn(50, 5) * 3 + 1, torch.randn(50, 7))
    found = mixing(face, image)
    for person in range(3):
        parts = []
        for photo in range(2):
            f = (face[person, photo] - mixing.face_mean) / mixing.face_width
            g = (image[person, photo] - mixing.image_mean) / mixing.image_width
            scores = mixing.gate(torch.cat([f, g]))
            a, b = scores.softmax(0) if gate == "softmax" else scores.sigmoid()
            parts.append(a * mixing.face(f) + b * mixing.image(g))
        torch.testing.assert_close(found[person], torch.stack(parts).mean(0))


def test_guidance_goes_from_nobody_through_the_condition():
    torch.manual_seed(0)
    network = Network(3, 4, 6, Model(width=8, depth=1, heads=2, tokens=2))
    noise, condition = torch.randn(2, 6), torch.randn(2, 8)
    free, one = network.sample(noise, None, 1), network.sample(noise, condition, 1)
    assert torch.equal(network.sample(noise, condition, 1, guidance=0.0), free)
    torch.testing.assert_close(
        network.sample(noise, condition, 1, guidance=2.0), free + 2 * (one - free), atol=1e-5, rtol=1e-4
    )


# ---- the basis -----------------------------------------------------------------------------------------------------


def test_a_fresh_basis_is_the_start_for_every_latent_and_learns_from_the_first_gradient():
    layout, start = some_layout(), torch.randn(18)
    codec = Basis.fresh(layout, start, 5)
    latents = torch.randn(3, 5)
    assert torch.equal(codec.decode(latents), start.expand(3, -1))
    codec.numbers.requires_grad_(True)
    (codec.decode(latents) * torch.randn(3, 18)).sum().backward()
    assert codec.numbers.basis.grad is not None and codec.numbers.basis.grad.abs().min() > 0


@pytest.mark.parametrize("shared", ["learned", "random"])
def test_a_shared_a_is_the_same_for_all(shared):
    layout = some_layout()
    codec = Basis.fresh(layout, torch.randn(18), 5, shared)
    codec.numbers.requires_grad_(True)
    with torch.no_grad():
        codec.numbers.basis.copy_(torch.randn(5, 18))
    rows = codec.decode(torch.randn(3, 5))
    assert torch.equal(rows[0, :10], rows[1, :10]) and not torch.equal(rows[0, 10:], rows[1, 10:])
    rows.square().sum().backward()
    moved = codec.numbers.mean.grad[:10].abs().sum()
    assert (moved > 0) == (shared == "learned")


def test_only_two_factors_can_share_one():
    with pytest.raises(ConfigError, match="factor A"):
        Basis.fresh(some_layout("spectral"), torch.zeros(18), 3, "learned")


def test_a_basis_decodes_as_the_components_it_came_from(tmp_path):
    rows = TensorRows(torch.randn(12, 18, generator=torch.Generator().manual_seed(0)))
    pca = PCA(some_layout(), components=6).fit(rows)
    codec, latents = Basis.of(pca), torch.randn(4, 6)
    torch.testing.assert_close(codec.decode(latents), pca.decode(latents))
    codec.save(tmp_path)
    torch.testing.assert_close(load_codec(tmp_path).decode(latents), pca.decode(latents), atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(codec._encode(codec.decode(latents)), latents, atol=1e-3, rtol=1e-3)


def test_a_basis_for_each_layer_moves_that_layer_alone_and_counts_as_one_that_is_zero_elsewhere(tmp_path):
    own = helpers.layout()
    codec = Basis.fresh(own, torch.randn(own.size), 3, per_layer=True)
    with torch.no_grad():
        codec.numbers.basis.copy_(torch.randn(3, own.size))
    assert codec.latent_shape == (6,)  # two layers
    latents, whole = torch.randn(4, 6), torch.zeros(6, own.size)
    for number, key in enumerate(("to_k", "to_q")):  # in the order of the row
        for entry in (entry for entry in own.entries if entry.key == key):
            whole[3 * number : 3 * number + 3, entry.columns] = codec.numbers.basis.detach()[:, entry.columns]
    torch.testing.assert_close(codec.decode(latents), codec.numbers.mean + latents @ whole)
    torch.testing.assert_close(codec._encode(codec.decode(latents)), latents, atol=1e-3, rtol=1e-3)
    codec.save(tmp_path)
    torch.testing.assert_close(load_codec(tmp_path).decode(latents), codec.decode(latents), atol=2e-2, rtol=2e-3)


def test_a_basis_in_8_bits_is_off_by_half_a_step_at_most(tmp_path):
    own = some_layout()
    codec = Basis.fresh(own, torch.randn(18), 5, int8=True)
    with torch.no_grad():
        codec.numbers.basis.copy_(torch.randn(5, 18))
    codec.save(tmp_path / "small")
    found = load_codec(tmp_path / "small")
    for entry in own.entries:
        true, kept = (one.numbers.basis[:, entry.columns] for one in (codec, found))
        assert ((true - kept).abs() <= true.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-3)).all()
    latents = torch.eye(5)
    found.save(tmp_path / "again")
    assert torch.equal(load_codec(tmp_path / "again").decode(latents), found.decode(latents))


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_moving_average_is_the_written_out_one_and_survives_a_kill(tmp_path):
    class Squares:
        def batch(self, index):
            return {"x": torch.full((1,), float(index))}

        def loss(self, model, batch):
            return (model.weight * 2 - batch["x"]).square().sum()

        def preview(self, model, step, folder):
            pass

    def run(folder, steps, resume=None, average=True, most=6):
        torch.manual_seed(0)
        model = nn.Linear(1, 1, bias=False)
        loop = LoopConfig(
            max_train_steps=most, lr_warmup_steps=0, lr_scheduler="constant", checkpointing_steps=3,
            ema_decay=0.9 if average else 0.0,
        )  # fmt: skip
        task = Squares()
        if steps < most:
            whole = task.loss
            task.loss = lambda m, b: whole(m, b) if float(b["x"]) < steps else torch.tensor(torch.nan) * m.weight.sum()
        try:
            train(task, model, [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}], loop, folder,
                  resume=resume, progress=False)  # fmt: skip
        except Exception:
            assert steps < most
        return model.weight.detach().clone()

    numbers = [run(tmp_path / f"plain{n}", n, average=False, most=n) for n in range(1, 7)]
    average = numbers[0]
    for step, value in enumerate(numbers[1:], 2):
        average = average.lerp(value, 1 - min(0.9, (1 + step) / (10 + step)))
    whole = run(tmp_path / "whole", 6)
    torch.testing.assert_close(whole, average)
    run(tmp_path / "killed", 4)
    assert torch.equal(run(tmp_path / "killed", 6, resume="latest"), whole)


def test_an_average_and_evaluations_exclude_each_other():
    with pytest.raises(ConfigError, match="ema_decay"):
        LoopConfig(ema_decay=0.9, eval_steps=5)


def test_a_latent_batch_follows_from_its_number_and_hides_its_share():
    photos = Photos(("a", "b"), torch.randn(4, 3), torch.randn(4, 4), ((0, 1), (2, 3)), ((0,), (2, 3)))
    task = LatentTask(torch.randn(2, 6), photos, 64, 0.3, 0)
    first, again = task.batch(5), task.batch(5)
    assert all(torch.equal(first[k], again[k]) for k in first if k != "names")
    hidden = torch.cat([task.batch(n)["hidden"] for n in range(400)]).float().mean()
    assert 0.25 < hidden < 0.35


def debug(out: Path, **changes) -> GeneratorConfig:
    return replace(PRESETS["debug"], out=out, encoders=Encoders(), **changes)


def test_end_to_end_training_that_is_killed_ends_with_the_same_bytes(tmp_path, monkeypatch):
    whole = fitting.fit(debug(tmp_path / "whole"), progress=False)
    losses = fitting.EndToEndTask.loss
    calls = []

    def dies(self, model, batch):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return losses(self, model, batch)

    monkeypatch.setattr(fitting.EndToEndTask, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(debug(tmp_path / "killed"), progress=False)
    assert not (tmp_path / "killed" / "generator.json").exists()
    monkeypatch.undo()
    again = fitting.fit(debug(tmp_path / "killed"), progress=False)
    assert again.digest == whole.digest
    for name in ("network.safetensors", "codec/codec.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_training_goes_on_from_a_generator(tmp_path):
    first = fitting.fit(debug(tmp_path / "first"), progress=False)
    stage = replace(PRESETS["debug"].end_to_end, generator=str(tmp_path / "first"))
    still = replace(stage, learning_rate=1e-12, decoder_learning_rate=1e-12)
    (tmp_path / "still").mkdir()
    (tmp_path / "still" / "people").symlink_to(tmp_path / "first" / "people")
    same = fitting.fit(debug(tmp_path / "still", end_to_end=still), progress=False)
    photo = world.render(world.sample_identity(rng := np.random.default_rng(2)), world.sample_scene(rng))
    one, other = first.predict([photo]), same.predict([photo])
    start = one - first.codec.decode(torch.zeros(1, first.codec.latents))
    assert float(start.norm()) > 0 and float((other - one).norm()) < 1e-2 * float(start.norm())
    wider = replace(PRESETS["debug"].model, latents=9)
    with pytest.raises(ConfigError, match="has latents 8, asked for is 9"):
        fitting.fit(debug(tmp_path / "wider", end_to_end=stage, model=wider), progress=False)
    with pytest.raises(ConfigError, match="leave out the two stages"):
        debug(tmp_path, end_to_end=stage, shared_basis=PRESETS["two-stage"].shared_basis)


def test_a_generator_for_the_wide_base_learns_its_people_and_has_latents_for_each_layer(tmp_path, monkeypatch):
    lengths, batches = set(), fitting.EndToEndTask.batch

    def watched(self, index):
        batch = batches(self, index)
        lengths.add(batch["prompts"].tensors["embeds"].shape[1])
        return batch

    monkeypatch.setattr(fitting.EndToEndTask, "batch", watched)
    wide, small = PRESETS["wide"], debug(tmp_path)
    stage = replace(small.end_to_end, short_captions=20)
    model = replace(wide.model, width=16, depth=1, heads=2, latents=2)
    made = fitting.fit(replace(wide, end_to_end=stage, model=model, out=tmp_path), progress=False)
    assert lengths == {20, 48}
    assert made.base == "embedded-wide" and made.layout.size == 127_488
    assert made.codec.latent_shape == (72,) and (tmp_path / "codec" / "codec.safetensors").stat().st_size < 1_100_000
    people = read_subjects(tmp_path / "people")
    assert "brows" in people[0].attributes
    photo = load_picture(tmp_path / "people" / people[0].pictures[0], 64)
    assert made.predict([photo], seeds=(0, 1)).shape == (2, 127_488)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="Nothing to train"):
        GeneratorConfig(end_to_end=None)
    with pytest.raises(ConfigError, match="heads"):
        Model(width=10, heads=4)
    with pytest.raises(DataError, match="photo"):
        raise_without_photos()


def raise_without_photos():
    from smidgen.difflora.generator.generator import Generator

    Generator.features(object.__new__(Generator), [])


def test_the_papers_preset_fits_the_default_zoo():
    from smidgen.difflora.zoo.settings import ZooConfig

    assert PRESETS["paper"].adapter == ZooConfig().adapter
