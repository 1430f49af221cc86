"""The embedded base and what lies outside its world: said before training, never scored, still drawn."""

import logging
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from smidgen.bases.embedded import world
from smidgen.bases.families import load_base
from smidgen.tasks.diffusion.limits import unknown_words
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
from smidgen.training.loop import LoopConfig

PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


def portraits(count, seed=0, size=64):
    rng = np.random.default_rng(seed)
    return [world.render(world.sample_identity(rng, "test"), world.sample_scene(rng), size) for _ in range(count)]


def photos(count=4):
    whole = Image.open(PHOTO).convert("RGB")
    return [whole.crop((30 * n, 40 * n, 30 * n + 300, 40 * n + 300)).resize((64, 64)) for n in range(count)]


def test_photographs_and_pictures_without_a_face_are_told_from_drawings(base):
    assert base.foreign(portraits(12)) == [False] * 12
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    shape = Image.new("RGB", (64, 64), "teal")
    shape.paste((220, 40, 40), (10, 10, 50, 50))
    assert base.foreign([*photos(), noise, shape, portraits(1)[0]]) == [True] * 6 + [False]


def test_every_word_of_the_world_is_known_and_others_are_named(base):
    captions = base.scenes(200, 0)
    assert base.unknown_words([*captions, "a photo of a sks person"]) == []
    said = unknown_words(base, ["an astronaut riding a horse", "a portrait of a person, Smiling", "an astronaut"])
    assert said == [
        "3 words that embedded has never seen and reads as meaningless pieces: 'astronaut', 'riding', 'horse'."
    ]


def run(folder, out, **show):
    for number, image in enumerate(show.pop("pictures")):
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number}.png")
    made = PersonalizeConfig(
        data=Data(folder, instance_prompt="a portrait of a person", train_batch_size=1),
        adapter=Adapter("svfit"),
        train=LoopConfig(max_train_steps=2, lr_warmup_steps=1, checkpointing_steps=2),
        show=Show(**{"num_prompts": 2, "num_seeds": 1, "inference_steps": 2, "compare_lora": False} | show),
        out=out,
    )
    return personalize(made, progress=False)


def test_photographs_are_said_before_training_and_not_scored(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "smidgen"):
        report = run(tmp_path / "photos", tmp_path / "out", pictures=[Image.open(PHOTO).convert("RGB"), *photos(1)])
    said = "2 pictures without a face as embedded draws them"
    assert any(said in one and "0.png (512 x 600 pixels)" in one and "--base" in one for one in report.warnings)
    messages = [record.getMessage() for record in caplog.records]
    told = next(at for at, one in enumerate(messages) if said in one)
    assert told < next(at for at, one in enumerate(messages) if one.startswith("Training on 2 pictures with 1 caption"))
    assert [entry.identity for entry in report.entries] == [None, None]
    assert "Nothing was scored: the judge of embedded reads portraits drawn in its own style alone" in report.notes[1]
    assert "Nothing was scored" in (tmp_path / "out" / "README.md").read_text()


def test_own_prompts_are_drawn_and_only_what_can_be_is_scored(tmp_path):
    prompts = ("an astronaut on a horse", "a portrait of a person, smiling")
    found = run(tmp_path / "mixed", tmp_path / "out", pictures=[*portraits(2), *photos(1)], validation_prompt=prompts)
    assert any("1 picture without a face" in one and "2.png" in one for one in found.warnings)
    assert any("words that embedded has never seen" in one and "'astronaut'" in one for one in found.warnings)
    assert found.entry.identity is not None and found.entry.caption is None
    assert "Captions were not scored" in found.notes[2]
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert "an astronaut on a horse" in sheet.info["smidgen"] and sheet.height > 3 * 128
