"""The recipe, in its debug preset: every stage runs, and an interrupted training resumes to the bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smidgen.bases.embedded import FLOW, PIPELINE, embedded_base, wide, world
from smidgen.bases.embedded.base import EmbeddedFlow, EmbeddedWide
from smidgen.bases.embedded.layers import lay, tensors_of
from smidgen.lab.embedded_base import autoencoder, cli, diffusion, draw, flow, text
from smidgen.lab.embedded_base.config import Budget, preset
from smidgen.lab.embedded_base.run import Muon, Run, learning_rate

pytest.importorskip("dicebear")
diffusers = pytest.importorskip("diffusers")
VAE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(work folder, shipped folder) of one debug run of all stages."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    assert cli.main(["--preset", "debug", "--work", str(work), "--out", str(out)]) == 0
    return work, out


def test_all_stages_give_a_pipeline_that_draws(made):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(made[1] / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a portrait of a person", num_inference_steps=2).images[0].size == (64, 64)
    assert (made[1] / "pipeline" / "README.md").read_text().count("Pablo Stanley") == 1
    assert {p.name for p in (made[1] / "judge_weights").iterdir()} == {"reader.safetensors", "identity.safetensors"}


def test_training_pictures_hold_no_held_out_person(made):
    for split in ("train", "test"):
        codes = draw.load(made[0], split)[1]
        for row in codes:
            words = {n: list(o)[c] for (n, o), c in zip(world.ATTRIBUTES.items(), row, strict=True)}
            person = world.Identity(**{n: words[n] for n in world.IDENTITY_ATTRIBUTES})
            assert world.split_of(person) == split


@pytest.mark.parametrize(("stage", "stop"), [(diffusion, 1), (diffusion, 4), (flow, 3)])
def test_an_interrupted_training_resumes_to_the_bit(made, tmp_path, stage, stop, monkeypatch):
    config, folder = preset("debug"), tmp_path
    name = stage.__name__.rpartition(".")[2]
    for path in made[0].glob("*.npy"):
        (folder / path.name).symlink_to(path)
    stage.train(config, made[0])
    whole = Run.train
    monkeypatch.setattr(Run, "train", lambda self, *a, **k: whole(self, *a, **{**k, "stop": stop}))
    assert stage.train(config, folder).step == stop
    monkeypatch.setattr(Run, "train", whole)
    assert stage.train(config, folder).step == getattr(config, name).steps
    ours, theirs = (load_file(f / f"{name}.safetensors") for f in (folder, made[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_finished_stage_does_nothing_when_run_again(made):
    before = (made[0] / "diffusion.safetensors").read_bytes()
    cli.run("diffusion", preset("debug"), *made)
    assert (made[0] / "diffusion.safetensors").read_bytes() == before


def test_standardised_latents_draw_the_same_pictures(made):
    config = preset("debug")
    pictures, _ = draw.load(made[0], "test")
    before, after = (autoencoder.averaged(config, made[0] / "autoencoder.safetensors") for _ in range(2))
    autoencoder.standardise(after, pictures)
    with torch.no_grad():
        x = autoencoder.to_tensor(pictures)
        first, second = (m.decode(m.encode(x).latent_dist.mode()).sample for m in (before, after))
        latents = after.encode(x).latent_dist.mode()
    assert (first - second).abs().max() < 1e-3
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    covariance = torch.cov(flat.T)
    assert flat.mean(0).abs().max() < 0.1 and abs(covariance.diagonal().mean() - 1) < 0.1
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.1


def test_every_word_of_the_world_is_one_token(tmp_path):
    words = text.tokenizer(tmp_path)
    assert type(words).__name__ == "CLIPTokenizer"
    assert [w for w in world.vocabulary() if len(words.tokenize(w)) != 1] == []
    rng = np.random.default_rng(0)
    captions = [world.caption(world.sample_scene(rng), rng, "a sks person", omit=0) for _ in range(200)]
    assert max(len(words(c).input_ids) for c in captions) <= text.TOKENS
    assert words.decode(words("wholly unknown zebra").input_ids, skip_special_tokens=True) == "wholly unknown zebra"


def test_training_captions_are_dropped_and_named_now_and_then():
    rng = np.random.default_rng(0)
    row = np.zeros(len(world.ATTRIBUTES), int)
    captions = [text.training_caption(row, rng) for _ in range(2000)]
    assert 0.07 < sum(c == "" for c in captions) / 2000 < 0.13
    assert 0.06 < sum(any(p in c for p in world.PLACEHOLDERS) for c in captions) / 2000 < 0.13


def test_the_learning_rate_ends_annealed_by_steps_or_by_the_clock():
    assert Budget(steps=10).progress(5, 999) == 0.5
    assert Budget(minutes=2).progress(5, 60) == 0.5 and Budget(minutes=2).progress(5, 600) == 1
    assert learning_rate(0) < learning_rate(0.03) == 1 and learning_rate(1) == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(24, 80), (80, 24)])
def test_muon_is_that_of_torch_in_fp32(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for step in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        if not step:
            mine = Muon([ours], lr=0.01)
            torchs = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        mine.step()
        torchs.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # bf16's part of it


def test_the_flow_stage_gives_a_klein_pipeline_on_the_shipped_parts(made):
    cli.run("flow", preset("debug"), *made)
    folder = made[0] / "flow"
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(prompt="a person", num_inference_steps=2, **EmbeddedFlow.drawing).images[0].size == (64, 64)
    ours, shipped = pipe.vae.state_dict(), diffusers.AutoencoderKL.from_pretrained(embedded_base() / "vae").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in shipped.items())
    base = EmbeddedFlow("flow", pipe)
    pixels = torch.from_numpy(draw.load(made[0], "train")[0].copy()).permute(0, 3, 1, 2) / 127.5 - 1
    latents = base.encode_images(pixels)[0]
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(latents.shape[1]), atol=0.05, rtol=0)


def test_what_ships_of_the_flow_base_gives_its_whole_folder(made, tmp_path):
    cli.run("flow", preset("debug"), *made)
    own, whole = made[1] / "flow", made[0] / "flow"
    assert not (own / "text_encoder").exists() and set(load_file(own / "vae" / VAE)) < set(
        load_file(whole / "vae" / VAE)
    )
    lay([PIPELINE, own], tmp_path)
    for path in whole.rglob("*.safetensors"):
        ours, its = load_file(tmp_path / path.relative_to(whole)), load_file(path)
        assert ours.keys() == its.keys() and all(torch.equal(ours[name], tensor) for name, tensor in its.items())
    assert not (tmp_path / "unet").exists()
    assert "Flux2KleinPipeline" in (tmp_path / "README.md").read_text()


def test_the_flow_stage_of_the_wide_world_learns_its_words_and_starts_from_what_ships(tmp_path):
    config, work, out = preset("debug", world="wide"), tmp_path / "work", tmp_path / "out"
    for stage in ("render", "autoencoder"):
        cli.run(stage, config, work, out)
    words, start = flow.words_of(config, work), flow.Denoiser(config, flow.words_of(config, work))
    ids = words(["a portrait of a person, smiling"], padding="max_length", max_length=40, return_tensors="pt").input_ids
    base = EmbeddedFlow("flow", diffusers.Flux2KleinPipeline.from_pretrained(embedded_base("embedded-flow")))
    shipped = base.encode_prompts(["a portrait of a person, smiling"]).tensors["embeds"]
    found = start.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
    told = ids[0] != words.pad_token_id
    assert torch.allclose(found[0, told], shipped[0, told], atol=1e-5)  # the old words mean what they meant
    cli.run("flow", config, work, out)
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(work / "flow")
    pipe.set_progress_bar_config(disable=True)
    caption = "an inked closeup of a person, in a red turban, in warm light"
    assert pipe(prompt=caption, num_inference_steps=2, **EmbeddedWide.drawing).images[0].size == (64, 64)
    assert [w for w in wide.vocabulary() if len(pipe.tokenizer.tokenize(w)) != 1] == []
    assert pipe.text_encoder.dtype == torch.float32
    drawings = autoencoder.to_tensor(draw.load(work, "test")[0][:8])
    old, new = (vae.encode(drawings).latent_dist.mode() for vae in (base.pipe.vae, pipe.vae))
    assert 0 < (new - old).square().mean() < 0.05 * old.var()  # latents that the transformer knows
    written = tensors_of(out / "wide_flow" / "vae" / VAE)
    for name, tensor in autoencoder.of_world(config, work).state_dict().items():
        most = tensor.abs().amax(tuple(range(1, tensor.ndim)), keepdim=True) if tensor.ndim > 1 else tensor.abs() / 5
        assert ((written[name].float() - tensor).abs() <= most / 200 + 1e-6).all(), (
            name
        )  # int8 by rows, vectors in fp16
    lay([PIPELINE, FLOW, out / "wide_flow"], tmp_path / "laid")
    laid = diffusers.Flux2KleinPipeline.from_pretrained(tmp_path / "laid")
    for part in ("text_encoder", "transformer", "vae"):
        for name, tensor in getattr(pipe, part).state_dict().items():
            step = tensor.abs().max() / (1e9 if part == "text_encoder" else 200)
            found = getattr(laid, part).state_dict()[name]
            assert ((found - tensor).abs() <= step + 1e-6).all(), (part, name)
    assert laid.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    assert "Flux2KleinPipeline" in (tmp_path / "laid" / "README.md").read_text()
    after = {name: tensor.half() for name, tensor in start.text_encoder.state_dict().items()}
    assert any(not torch.equal(after[name], tensor.half()) for name, tensor in pipe.text_encoder.state_dict().items())
