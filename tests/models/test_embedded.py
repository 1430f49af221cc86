"""What ships: the pipeline folder and the judge."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from smidgen.bases import embedded
from smidgen.bases.embedded import embedded_base, world
from smidgen.bases.embedded.judge import as_tensor, load_judge
from smidgen.errors import DataError, SmidgenError

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(embedded_base())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def held_out():
    """(people, scenes, drawings) of 60 held-out identities."""
    pytest.importorskip("dicebear")
    rng = np.random.default_rng(11)
    people = [world.sample_identity(rng, "test") for _ in range(60)]
    scenes = [world.sample_scene(rng) for _ in people]
    return people, scenes, [world.render(p, s) for p, s in zip(people, scenes, strict=True)]


def test_the_text_encoder_has_the_names_that_every_transformers_reads():
    with safe_open(f"{embedded_base()}/text_encoder/model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118


def test_the_folder_holds_stable_diffusions_classes(pipe):
    names = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert names == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
    }
    modules = dict(pipe.unet.named_modules())
    for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"):
        for attention in ("attn1", "attn2"):
            assert f"{block}.attentions.0.transformer_blocks.0.{attention}.to_q" in modules
    assert {next(p.parameters()).dtype for p in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_the_folder_is_small_and_holds_no_pickle():
    files = [f for f in embedded_base().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 15_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ".md"}
    for path in (f for f in files if f.suffix == ".safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(n).get_dtype() for n in weights.keys()} == {"F16"}  # noqa: SIM118


def test_a_picture_follows_from_its_seed(pipe):
    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe("a portrait of a person, smiling", generator=generator, num_inference_steps=4).images[0])

    assert draw(0).shape == (64, 64, 3)
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


def test_captions_decide_the_background(pipe):
    words = list(world.BACKGROUND)
    captions = [f"a portrait of a person, against a {w} background" for w in words]
    generators = [torch.Generator().manual_seed(i) for i in range(len(words))]
    images = pipe(captions, generator=generators, num_inference_steps=10, guidance_scale=3.0).images
    assert np.mean([r == w for r, w in zip(load_judge().read(images)["background"], words, strict=True)]) >= 0.75


def test_the_judge_reads_held_out_drawings(held_out):
    _, scenes, drawings = held_out
    scores = load_judge().caption_score(drawings, scenes)
    assert scores["background"] >= 0.98 and scores["clothes_color"] >= 0.95 and scores["glasses"] >= 0.95
    assert scores["mouth"] >= 0.85 and scores["eyes"] >= 0.85
    shuffled = load_judge().caption_score(drawings, scenes[1:] + scenes[:1])
    assert shuffled["mean"] < 0.5


def test_the_judge_tells_people_apart(held_out):
    people, scenes, drawings = held_out
    again = [world.render(p, s) for p, s in zip(people, scenes[::-1], strict=True)]
    judge = load_judge()
    same = torch.cat([judge.identity_score([a], [b]) for a, b in zip(drawings, again, strict=True)])
    other = torch.cat([judge.identity_score([a], [b]) for a, b in zip(drawings, again[1:] + again[:1], strict=True)])
    assert same.mean() > 0.9 and abs(other.mean()) < 0.15
    assert (same > 0.7).float().mean() > 0.9 and (other > 0.7).float().mean() < 0.05


def test_the_judge_takes_tensors_and_refuses_nonsense(held_out):
    judge, drawings = load_judge(), held_out[2][:3]
    tensor = (as_tensor(drawings) + 1) / 2
    assert judge.read(tensor) == judge.read(drawings)
    with pytest.raises(DataError, match="not"):
        judge.read(torch.zeros(3, 64, 64))
    with pytest.raises(DataError, match="No images"):
        judge.read([])
    with pytest.raises(DataError, match="one scene"):
        judge.caption_score(drawings, held_out[1][:2])


def test_a_missing_folder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "FOLDERS", {"embedded": (tmp_path,), "embedded-flow": (embedded.PIPELINE, tmp_path)})
    with pytest.raises(SmidgenError, match="--stage all"):
        embedded_base()
    with pytest.raises(SmidgenError, match="--stage flow"):
        embedded_base("embedded-flow")
    with pytest.raises(SmidgenError, match=r"'embedded_flow'.* Did you mean 'embedded-flow'"):
        embedded_base("embedded_flow")
