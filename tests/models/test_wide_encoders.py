"""What sees photos of the wide world: words, colours in any light and framing, no face, captions; and its people as training takes
them."""

import numpy as np
import pytest
import torch
from PIL import Image

from smidgen.bases.embedded import colors, wide, wide_encoders
from smidgen.bases.embedded.wide_encoders import load_wide_encoder
from smidgen.difflora.generator import encoders
from smidgen.difflora.generator.encoders.embedded import _scene
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import make_subjects, read_subjects

pytest.importorskip("dicebear", reason="drawing needs smidgen[world]")
torch.set_num_threads(1)


def _people(count: int, **changes: str) -> list[tuple[wide.Identity, wide.Scene]]:
    rng, found = np.random.default_rng(3), []
    while len(found) < count:
        person = wide.sample_identity(rng, "test")
        scene = wide.sample_scene(rng, person)
        if scene.style == "plain" and scene.hat == "none" and person.hair != "bald":
            found.append((person, wide.Scene(**(scene.as_dict() | {"light": "normal"} | changes))))
    return found


def test_it_ships_small_and_sees_unseen_people():
    assert wide_encoders.FILE.stat().st_size < 1_000_000
    drawn = _people(48)
    seen = load_wide_encoder().see([wide.render(*pair) for pair in drawn])
    assert seen.who.shape == (48, encoders.load("wide-face").width)
    assert seen.scene.shape == (48, encoders.load("wide-scene").width)
    assert (seen.face > 0.5).all()
    for name, least in (("hair", 0.85), ("facial_hair", 0.75), ("clothes", 0.8), ("background", 0.95)):
        known = list(wide.ATTRIBUTES[name])
        right = [
            known[int(at)] == getattr(pair[name not in wide.IDENTITY_ATTRIBUTES], name)
            for pair, at in zip(drawn, seen.words[name].argmax(1), strict=True)
        ]
        assert np.mean(right) >= least, name


@pytest.mark.parametrize("light", ["normal", "warm", "dim"])
def test_a_skin_of_any_colour_is_told_as_it_is_in_normal_light(light):
    drawn = _people(24, light=light)
    seen = load_wide_encoder().see([wide.render(*pair) for pair in drawn])
    wanted = torch.tensor(np.stack([colors.lab(str(wide.color_of(person, "skin"))) for person, _ in drawn])).float()
    assert (seen.colors[:, wide.COLORS.index("skin")] - wanted).norm(dim=1).median() < 6


def test_grey_light_leaves_colours_in_doubt():
    plain, grey = (
        load_wide_encoder().see([wide.render(*pair) for pair in _people(24, light=light)]).doubt[:, wide_encoders.FREE]
        for light in ("normal", "grey")
    )
    assert grey.mean() > plain.mean() + 1


def test_no_face_is_no_person():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    face = encoders.load("wide-face")
    assert face.encode([Image.fromarray(noise), Image.new("RGB", (64, 64), "teal")]).isnan().all()


def test_captions_say_what_is_to_be_seen():
    drawn = _people(24)
    said = encoders.load("wide-scene").captions([wide.render(*pair) for pair in drawn])
    right = [f"{scene.background} background" in text for text, (_, scene) in zip(said, drawn, strict=True)]
    assert np.mean(right) > 0.9


def test_words_that_contradict_each_other_become_a_scene():
    plain = _people(1)[0][1].as_dict()
    assert _scene(plain | {"glasses": "sunglasses", "eyes": "open"}).eyes == "hidden"
    assert _scene(plain | {"hat": "turban", "hat_color": "none"}).hat == "none"
    assert _scene(plain | {"style": "inked", "clothes": "hoodie"}).style == "plain"


def test_people_are_invented_in_the_world_of_the_base(tmp_path):
    make_subjects(tmp_path, Subjects(people=3, held_out=1, pictures=1), wide)
    people = read_subjects(tmp_path)
    assert [person.split for person in people] == ["train"] * 3 + ["test"]
    assert set(people[0].attributes) == set(wide.IDENTITY_ATTRIBUTES) and "CC BY 4.0" in people[0].licence
    assert any(color.startswith("#") for p in people for color in (p.attributes["hair_color"], p.attributes["skin"]))


def test_a_placed_portrait_is_as_large_and_where_it_is_asked_for():
    person, scene = _people(1, framing="portrait", head="straight")[0]
    assert wide.drawing(person, scene, wide.placement(scene)) == wide.drawing(person, scene)
    assert wide.placement(scene, 1.25, 5.0, -5.0) == {"scale": 1.5, "translateX": 5.0, "translateY": -3.0}
