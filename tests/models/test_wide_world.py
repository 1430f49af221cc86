"""The wide world: it contains the smaller one to the pixel, captions never name a person, nothing held out is trained on."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from smidgen.bases.embedded import colors, wide, world
from smidgen.bases.embedded.wide_words import HAT, LIGHT, STYLE
from smidgen.bases.embedded.worlds import load_world
from smidgen.errors import ConfigError, DataError
from smidgen.lab.embedded_base import draw, text
from smidgen.lab.embedded_base.config import preset

pytest.importorskip("dicebear")
PICTURES = "1fcae42c7975b0874aaf3ac9c9293d187734c029a17d1eaaaf457b831296092b"
CODES = "4f55ea5f823ebe87ec16966d98abe825465df6409f71ad77715e45e99be76c32"
WORDS = "1caf34e89da4bf303861f30a44cac798efc2b729d46138532c5e671e3aa17448"
PERSON = wide.Identity("long", "#7a4fd7", "tanned", "none")
SCENE = wide.Scene("open", "smile", "t-shirt", "red", "none", "teal")


def _people(n: int, split: wide.Split = "train") -> list[wide.Identity]:
    rng = np.random.default_rng(5)
    return [wide.sample_identity(rng, split) for _ in range(n)]


def _scenes(n: int) -> list[wide.Scene]:
    rng = np.random.default_rng(6)
    people = _people(n)
    return [wide.sample_scene(rng, person) for person in people]


def _pixels(identity: wide.Identity = PERSON, scene: wide.Scene = SCENE) -> np.ndarray:
    return np.asarray(wide.render(identity, scene), int)


@pytest.mark.parametrize("seed", range(12))
def test_people_scenes_and_captions_of_the_smaller_world_are_here_to_the_pixel(seed):
    rng = np.random.default_rng(seed)
    identity, scene = world.sample_identity(rng), world.sample_scene(rng)
    same, here = wide.Identity(**identity.as_dict()), wide.Scene(**scene.as_dict())
    assert np.array_equal(wide.render(same, here), world.render(identity, scene))
    assert wide.caption(here) == world.caption(scene)
    assert wide.caption(here, np.random.default_rng(seed)) == world.caption(scene, np.random.default_rng(seed))


def test_people_of_the_smaller_world_keep_their_split():
    assert all(wide.split_of(wide.Identity(**i.as_dict())) == world.split_of(i) for i in world.identities())


def test_the_smaller_world_is_what_it_was():
    pictures, codes, shades = draw.draw_chunk("test", 0, 0, 3)
    assert hashlib.sha256(pictures.tobytes()).hexdigest() == PICTURES
    assert hashlib.sha256(codes.tobytes()).hexdigest() == CODES
    assert shades.shape == (3, 0, 3)
    assert hashlib.sha256(" ".join(world.vocabulary()).encode()).hexdigest() == WORDS


def test_a_drawing_repeats_to_the_bit_and_takes_any_size():
    assert np.array_equal(_pixels(), _pixels())
    assert wide.render(PERSON, SCENE, 100).size == (100, 100)


def test_who_a_person_is_changes_no_caption():
    rng = np.random.default_rng(2)
    for scene in _scenes(60):
        text_ = wide.caption(scene)
        for word in ("mohawk", "bald", "beard", "moustache", "skin", "hair", "brows", "#", *world.PLACEHOLDERS):
            assert word not in text_
        assert wide.caption(scene, rng).count(" of a person") == 1


def test_every_word_of_a_caption_is_one_token_and_the_longest_fits(tmp_path):
    words, rng = text.tokenizer(tmp_path, wide), np.random.default_rng(3)
    assert wide.vocabulary()[: len(world.vocabulary())] == world.vocabulary()
    for word in wide.vocabulary():
        assert len(words(word).input_ids) == 3, word
    longest = max(
        len(words(wide.caption(s, rng, "a sks person", omit=0), truncation=False).input_ids) for s in _scenes(2000)
    )
    assert 40 < longest <= 46


def test_no_training_person_is_held_out_and_a_shade_is_no_new_person():
    for person in _people(200):
        assert wide.split_of(person) == "train"
        assert not wide.in_held_range(person)
        near = replace(person, brows="flat" if person.brows == "plain" else "plain")
        assert wide.split_of(near) == "train"
    assert {wide.split_of(p) for p in _people(20, "test")} == {"test"}
    assert all(wide.in_held_range(p) for p in _people(20, "range"))
    named = [i for i in world.identities() if wide.in_held_range(wide.Identity(**i.as_dict()))]
    assert named == []
    shade = colors.hexadecimal(np.add(colors.lab(world.HAIR_COLOR["blue"]), (1, 0, 0)))
    for person in [p for p in world.identities("test") if p.hair_color == "blue"][:20]:
        assert wide.split_of(wide.Identity(**person.as_dict() | {"hair_color": shade})) == "test"


@pytest.mark.parametrize(("name", "color"), [("hair_color", "#12d0c0"), ("skin", "#50c040"), ("skin", "#ffffff")])
def test_a_free_colour_is_drawn_as_it_is(name, color):
    picture = wide.render(replace(PERSON, **{name: color}), SCENE, 128)
    shown = np.asarray(picture).reshape(-1, 3)
    assert (shown == colors.rgb(color)).all(1).sum() > 300


@pytest.mark.parametrize("hat", [h for h in HAT if h != "none"])
def test_a_hat_hides_the_hair_and_its_colour_is_seen(hat):
    scene = replace(SCENE, hat=hat, hat_color="green")
    assert not wide.seen(PERSON, scene)["hair"]
    assert not wide.seen(PERSON, scene)["hair_color"]
    other = replace(PERSON, hair="fro", hair_color="#10e010")
    assert np.array_equal(_pixels(PERSON, scene), _pixels(other, scene))
    assert np.abs(_pixels(PERSON, scene) - _pixels(PERSON, replace(scene, hat_color="pink"))).mean() > 5


def test_a_beard_tells_the_hair_colour_under_a_hat():
    bearded, scene = replace(PERSON, facial_hair="beard"), replace(SCENE, hat="turban", hat_color="red")
    assert wide.seen(bearded, scene)["hair_color"]
    assert not np.array_equal(_pixels(bearded, scene), _pixels(replace(bearded, hair_color="#10e010"), scene))


@pytest.mark.parametrize("style", STYLE)
@pytest.mark.parametrize("attribute", ["hair", "facial_hair", "brows", "eyes", "mouth", "clothes", "glasses", "hat"])
def test_no_two_words_of_a_style_are_drawn_alike(style, attribute):
    pictures = []
    for word in STYLE[style].draws(attribute):
        changes = {attribute: word}
        if word == "sunglasses" or word == "hidden":
            changes = {"glasses": "sunglasses", "eyes": "hidden"}
        if attribute == "hat" and word != "none":
            changes["hat_color"] = "green"
        identity = replace(PERSON, **{k: v for k, v in changes.items() if k in wide.IDENTITY_ATTRIBUTES})
        scene = replace(SCENE, style=style, **{k: v for k, v in changes.items() if k in wide.SCENE_ATTRIBUTES})
        pictures.append(_pixels(identity, scene))
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps, default=1) > 0.1


def test_light_is_what_its_table_says():
    assert np.ptp(_pixels(PERSON, replace(SCENE, light="grey")), axis=-1).max() == 0
    plain = _pixels()
    for light, tint in LIGHT.items():
        if tint is not None:
            assert np.abs(_pixels(PERSON, replace(SCENE, light=light)) - plain * np.array(tint)).max() <= 0.5


def test_a_framing_and_a_tilt_change_the_picture():
    for change in ({"framing": "closeup"}, {"framing": "miniature"}, {"head": "tilted left"}, {"head": "tilted right"}):
        assert np.abs(_pixels() - _pixels(PERSON, replace(SCENE, **change))).mean() > 5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: wide.Identity("long", "#12", "tanned", "none"), "#12"),
        (lambda: wide.Identity("long", "blu", "tanned", "none"), "blue"),
        (lambda: replace(SCENE, clothes_color="#ff0000"), "clothes_color"),
        (lambda: replace(SCENE, hat="turban"), "hat_color"),
        (lambda: replace(SCENE, style="inked", clothes="hoodie"), "inked"),
        (lambda: wide.render(replace(PERSON, hair="dreads"), replace(SCENE, style="inked")), "dreads"),
        (lambda: wide.sample_identity(np.random.default_rng(0), "trian"), "trian"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_drawn_is_refused_in_words(make, said):
    with pytest.raises(DataError, match=said):
        make()


def test_a_subject_is_written_as_pictures_and_captions(tmp_path):
    scenes = wide.write_subject(tmp_path, PERSON, 3, seed=1)
    assert [f.name for f in sorted(tmp_path.glob("*.png"))] == ["000.png", "001.png", "002.png"]
    assert wide.caption(scenes[2]) in (tmp_path / "metadata.jsonl").read_text()


def test_a_stage_takes_either_world(tmp_path):
    config = preset("debug", world="wide", train_pictures=4, test_pictures=2)
    draw.render(config, tmp_path)
    codes = draw.load(tmp_path, "range")[1]
    assert codes.shape == (2, len(wide.ATTRIBUTES))
    rng = np.random.default_rng(0)
    for row in codes:
        scene = text.scene_of(row, wide)
        assert text.training_caption(row, rng, dropped=0, drawn=wide)
        assert wide.caption(scene)
    with pytest.raises(ConfigError, match="another world"):
        draw.render(preset("debug", train_pictures=4, test_pictures=2), tmp_path)
    with pytest.raises(ConfigError, match="wide"):
        load_world("wid")
