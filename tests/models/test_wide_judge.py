"""The judge of the wide world its training, what it says, and the measure without networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smidgen.bases.embedded import colors, wide
from smidgen.bases.embedded.judge import IdentityEmbedder, as_tensor
from smidgen.bases.embedded.wide_judge import (
    WideReader,
    lab_tensor,
    load_wide_judge,
    nearest_person,
)
from smidgen.errors import DataError, SmidgenError
from smidgen.lab.embedded_base import cli, draw, wide_judge

pytest.importorskip("dicebear")
PERSON = wide.Identity("bob", "#7a4fd7", "tanned", "none")
SCENE = wide.Scene("open", "smile", "t-shirt", "red", "none", "teal")


def test_lab_in_torch_is_lab_in_numpy():
    values = np.random.default_rng(0).integers(0, 256, (50, 3))
    torch.testing.assert_close(
        lab_tensor(torch.tensor(values) / 255), torch.tensor(colors.lab_of(values)).float(), atol=0.01, rtol=0
    )
    for value in values:
        code = "#{:02x}{:02x}{:02x}".format(*value)
        assert colors.hexadecimal(colors.lab(code)) == code


def test_the_nearest_true_drawing_is_the_person_that_was_drawn():
    people = [PERSON, replace(PERSON, skin="dark"), replace(PERSON, hair="long"), replace(PERSON, hair="dreads")]
    inked = replace(SCENE, style="inked")
    pictures = [wide.render(people[1], SCENE), wide.render(people[2], inked)]
    distances = nearest_person(pictures, [SCENE, inked], people)
    assert distances.argmin(1).tolist() == [1, 2]
    assert distances[0, 1] == 0
    assert distances[1, 3] == float("inf")
    with pytest.raises(DataError, match="one scene for each"):
        nearest_person(pictures, [SCENE], people)


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(SmidgenError, match="--world wide"):
        load_wide_judge(tmp_path)


def test_the_stage_trains_in_the_wide_world_and_resumes(tmp_path):
    work = ["--preset", "debug", "--world", "wide", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    cli.main(["--stage", "render", *work])
    cli.main(["--stage", "judge", *work])
    judge = load_wide_judge(tmp_path / "o" / "wide_judge_weights")
    assert set(wide.ATTRIBUTES) <= set(judge.accuracy)
    pictures, scenes = [wide.render(PERSON, SCENE)] * 2, [SCENE] * 2
    values, sigma = judge.colors(pictures)
    assert values.shape == (2, 5, 3)
    assert (sigma > 0).all()
    assert set(judge.read(pictures)["hat"]) <= set(wide.ATTRIBUTES["hat"])
    assert judge.identity_score(pictures, pictures[:1]).shape == (2,)
    assert set(judge.caption_score(pictures, scenes)) == {*wide.SCENE_ATTRIBUTES, "mean"}
    grey = [replace(SCENE, light="grey")] * 2
    assert "background" not in judge.caption_score(pictures, grey)  # grey light hides it
    with pytest.raises(DataError, match="one scene for each"):
        judge.caption_score(pictures, scenes[:1])
    before = load_file(tmp_path / "o" / "wide_judge_weights" / "reader.safetensors")
    cli.main(["--stage", "judge", *work])
    after = load_file(tmp_path / "o" / "wide_judge_weights" / "reader.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_colour_is_what_it_is_in_normal_light():
    """The attention is put on one place in the hair, whose colour must then be read in each light."""
    reader = WideReader().eval()
    where = torch.zeros(1, len(wide.COLORS), 32, 32)
    where[:, :, 2, 16] = 1e4
    reader.looks[0].register_forward_hook(lambda *_: where)
    for look in list(reader.looks)[1:]:
        look.register_forward_hook(lambda _, inputs, out: out * 0)
    for light in ("normal", "warm", "cold", "dim"):
        picture = wide.render(PERSON, replace(SCENE, light=light))
        code = list(wide.LIGHT).index(light)
        reader.heads["light"].register_forward_hook(
            lambda _, inputs, out, code=code: torch.nn.functional.one_hot(torch.tensor([code]), len(wide.LIGHT)) * 99.0
        )
        with torch.no_grad():
            values = reader(as_tensor([picture]))[1]
        wanted = colors.lab(wide.color_of(PERSON, "hair_color"))
        assert np.linalg.norm(values[0, 0] - wanted) < 5, light


def test_two_pictures_in_a_row_show_one_person_and_likeness_counts_what_both_show():
    _, codes, shades = draw.draw_chunk("train", 3, 0, 6, "wide")
    people = codes[:, [list(wide.ATTRIBUTES).index(n) for n in wide.IDENTITY_ATTRIBUTES]]
    assert (people[0::2] == people[1::2]).all()
    assert (shades[0::2, :2] == shades[1::2, :2]).all()
    assert not (people[0] == people[2]).all()
    drawings = wide_judge.Drawings.__new__(wide_judge.Drawings)
    drawings.codes, drawings.lab = codes, lab_tensor(torch.from_numpy(shades).float() / 255)
    drawings.seen = torch.from_numpy(wide_judge.seen_of(codes))
    alike, weight = wide_judge.likeness_of(drawings, torch.arange(6))
    assert alike[0, 1] == pytest.approx(1, abs=1e-3)
    assert (weight <= 1).all()
    assert IdentityEmbedder()(torch.zeros(2, 3, 64, 64)).shape == (2, 64)
