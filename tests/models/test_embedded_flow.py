"""The embedded flow base: a genuine pipeline that ships in part, draws what is asked, and is made by a recipe of minutes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import smidgen
from smidgen.bases.embedded import EMBEDDED_FLOW, FLOW, PIPELINE, embedded_base, layers, world
from smidgen.bases.embedded.base import EmbeddedFlow
from smidgen.bases.embedded.judge import load_judge
from smidgen.bases.families import load_base
from smidgen.lab.embedded_base import cli
from smidgen.lab.embedded_base.config import Budget, preset

diffusers = pytest.importorskip("diffusers")


def _draw(base: EmbeddedFlow, scenes: list[world.Scene], steps: int) -> list[Image.Image]:
    prompts = base.encode_prompts([world.caption(scene) for scene in scenes])
    return base.draw(
        prompts, range(len(scenes)), negative=base.encode_prompts([""]), steps=steps, guidance=base.sampling.guidance
    )


def _scenes(count: int) -> list[world.Scene]:
    rng = np.random.default_rng(5)
    return [world.sample_scene(rng) for _ in range(count)]


def test_what_ships_is_small_and_holds_no_pickle():
    files = [path for path in FLOW.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md"}
    with safe_open(FLOW / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_it_draws_what_a_caption_asks():
    scenes = _scenes(24)
    scores = load_judge().caption_score(_draw(load_base(EMBEDDED_FLOW), scenes, 8), scenes)
    assert scores["mean"] > 0.9 and scores["background"] > 0.9


def test_the_call_of_its_card_gives_what_the_family_draws():
    pipe = diffusers.DiffusionPipeline.from_pretrained(embedded_base(EMBEDDED_FLOW))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is diffusers.Flux2KleinPipeline
    scene, seed = _scenes(1)[0], torch.Generator().manual_seed(3)
    steps, guidance = EmbeddedFlow.sampling
    call = {"num_inference_steps": steps, "guidance_scale": guidance, **EmbeddedFlow.drawing}
    image = pipe(prompt=world.caption(scene), generator=seed, **call).images[0]
    assert image.size == (64, 64)
    assert load_judge().caption_score([image], [scene])["background"] == 1


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Iterator[Path]:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "bases"


def test_its_folder_is_put_together_once_and_again_when_what_ships_has_changed(cache, tmp_path):
    folder = embedded_base(EMBEDDED_FLOW)
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert folder.parent == cache and embedded_base(EMBEDDED_FLOW) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before and len(list(cache.iterdir())) == 1
    other = tmp_path / "other"
    layers.lay([PIPELINE, FLOW], other)
    (other / "README.md").write_text("another card")
    assert layers.put_together(EMBEDDED_FLOW, [PIPELINE, other]) != folder


def test_an_adapter_of_the_unet_base_is_refused(tmp_path):
    unet = load_base("embedded").model
    smidgen.adapt(unet, "svfit", r=4)
    smidgen.save(unet, tmp_path / "adapter")
    with pytest.raises(smidgen.SmidgenError):
        smidgen.load(load_base(EMBEDDED_FLOW).model, tmp_path / "adapter")


@pytest.mark.slow
def test_its_recipe_learns_scenes_in_minutes(tmp_path):
    pytest.importorskip("dicebear")
    config = preset("full", train_pictures=3000, test_pictures=8, flow=Budget(steps=220, batch=48, lr=1.5e-3))
    for stage in ("render", "flow"):
        cli.run(stage, config, tmp_path / "work", tmp_path / "out")
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(tmp_path / "work" / "flow")
    pipe.set_progress_bar_config(disable=True)
    scenes = _scenes(48)
    scores = load_judge().caption_score(_draw(EmbeddedFlow("flow", pipe), scenes, 12), scenes)
    assert scores["background"] > 0.9 and scores["glasses"] > 0.8 and scores["mean"] > 0.6
