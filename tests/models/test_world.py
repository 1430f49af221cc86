"""The world: who, what, caption, drawing."""

import dataclasses
import json

import numpy as np
import pytest

from smidgen.bases.embedded import world
from smidgen.errors import DataError, MissingExtraError


def test_identities_are_distinct_and_split_without_overlap():
    everyone, train, test = (list(world.identities(s)) for s in (None, "train", "test"))
    assert len(set(everyone)) == len(everyone) > 10_000
    assert set(train).isdisjoint(test) and len(train) + len(test) == len(everyone)
    assert 0.07 < len(test) / len(everyone) < 0.1


def test_sampled_identities_keep_to_their_split_and_vary():
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        people = [world.sample_identity(rng, split) for _ in range(200)]
        assert {world.split_of(p) for p in people} == {split}
        assert len(set(people)) > 120
    many = {world.sample_identity(np.random.default_rng(i)) for i in range(3000)}
    assert len(many) > 1500  # a generator that cycles would fall far short


def test_the_split_never_moves():
    held = [i for i, person in enumerate(world.identities()) if world.split_of(person) == "test"]
    assert len(held) == 991 and held[:3] == HELD_OUT_FIRST


HELD_OUT_FIRST = [3, 7, 9]


def test_caption_names_the_scene_and_never_the_identity():
    rng = np.random.default_rng(1)
    allowed = set(world.vocabulary())
    hair_words = {"hair", "beard", "moustache", "skin", "blonde", "auburn", "bob", "bald", "curly", "mullet", "tanned"}
    for _ in range(300):
        scene = world.sample_scene(rng)
        text = world.caption(scene)
        assert text.startswith("a portrait of a person, ")
        assert scene.background in text and scene.clothes in text and scene.clothes_color in text
        assert ("eyes" in text or "winking" in text or "squinting" in text) == (scene.eyes != "hidden")
        words = set(world.caption(scene, rng).replace(",", "").replace("-", " ").split())
        assert words <= allowed and not words & hair_words
    names = {f.name for f in dataclasses.fields(world.Scene)}
    assert names.isdisjoint(f.name for f in dataclasses.fields(world.Identity))


def test_captions_differ_between_scenes_and_vary_in_words():
    rng = np.random.default_rng(2)
    scenes = {world.sample_scene(rng) for _ in range(500)}
    assert len({world.caption(s) for s in scenes}) == len(scenes)
    scene = next(iter(scenes))
    assert len({world.caption(scene, rng) for _ in range(50)}) > 20
    assert world.caption(scene, subject="a sks person").startswith("a portrait of a sks person,")


def test_words_outside_the_world_are_refused():
    with pytest.raises(DataError, match="teal"):
        world.Scene("open", "smile", "hoodie", "red", "none", "teel")
    with pytest.raises(DataError, match="hidden"):
        world.Scene("open", "smile", "hoodie", "red", "sunglasses", "teal")
    with pytest.raises(DataError, match="split"):
        world.sample_identity(np.random.default_rng(0), "validation")  # type: ignore[arg-type]


def test_drawing_is_deterministic_and_shows_every_attribute():
    pytest.importorskip("dicebear")
    rng = np.random.default_rng(3)
    person, scene = (
        world.sample_identity(rng),
        dataclasses.replace(world.sample_scene(rng), glasses="none", eyes="open"),
    )
    drawn = np.asarray(world.render(person, scene))
    assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8
    assert np.array_equal(drawn, np.asarray(world.render(person, scene)))
    for name, words in world.SCENE_ATTRIBUTES.items():
        other = next(w for w in words if w not in (getattr(scene, name), "sunglasses"))
        changed = dataclasses.replace(scene, **{name: other})
        assert not np.array_equal(drawn, np.asarray(world.render(person, changed))), name
    assert world.render(person, scene, size=128).size == (128, 128)


def test_write_subject_is_an_imagefolder_of_one_person(tmp_path):
    pytest.importorskip("dicebear")
    person = world.sample_identity(np.random.default_rng(4), "test")
    scenes = world.write_subject(tmp_path / "a", person, 4, seed=5)
    assert world.write_subject(tmp_path / "b", person, 4, seed=5) == scenes
    lines = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [world.caption(s) for s in scenes]
    for line in lines:
        assert (tmp_path / "a" / line["file_name"]).read_bytes() == (tmp_path / "b" / line["file_name"]).read_bytes()


def test_without_dicebear_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dicebear", None)
    world.drawing_tools.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"pip install 'smidgen\[world\]'"):
            world.render(next(world.identities()), world.sample_scene(np.random.default_rng(0)))
    finally:
        world.drawing_tools.cache_clear()
