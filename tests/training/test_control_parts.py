"""Control's parts: the hint encoder, control pictures, metrics, pairs, and what the embedded world knows of a pose."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from PIL import Image, ImageDraw

import smidgen
from smidgen.bases import families
from smidgen.bases.embedded import pose, world
from smidgen.errors import AdapterFileError, ConfigError, DataError
from smidgen.tasks.control import conditions, hint, metrics
from smidgen.tasks.control.pairs import as_controls, control_of, read_pairs, write_pairs
from smidgen.tasks.control.sampling import draw_controlled, scores, wanted
from smidgen.training import engine
from tests.training import tiny

CONTROLS = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ADAPTERS = [
    lambda: smidgen.config("tlora(1,2)", target_modules=["to_q", "to_v"]),
    lambda: peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]),
]


def drawn(base, controls=None, **options):
    prompts = base.encode_prompts(tiny.CAPTIONS[:3])
    options |= {"negative": base.encode_prompts([""]), "steps": 2, "guidance": 3.0, "size": 16}
    if controls is None:
        return base.draw(prompts, [1, 2, 3], **options)
    return draw_controlled(base, prompts, [1, 2, 3], controls, **options)


def same(first, second) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def wake(unet) -> None:
    """Move the zero layer of the encoder in use."""
    with torch.no_grad():
        for parameter in list(hint._named(unet, "hint").parameters())[-2:]:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


# ---- the hint encoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_at_the_start_the_steered_model_is_the_base_to_the_bit(request, kind, adapter):
    base = families.load_base(str(request.getfixturevalue(kind)))
    before = drawn(base)
    hint.attach(base.model, hint.config_for(base, "canny", width=8))
    engine.adapt(base.model, adapter(), (hint.NAME,))
    assert same(drawn(base, CONTROLS), before)
    wake(base.model)
    steered = drawn(base, CONTROLS)
    assert not same(steered, before) and not same(steered, drawn(base, CONTROLS.flip(0)))
    assert same(drawn(base), before) and not base.model.conv_in._forward_hooks  # nothing stays behind
    assert same(drawn(base, CONTROLS, scale=0.0), before)
    with smidgen.disabled(base.model):
        assert same(drawn(base, CONTROLS), before)


def test_guidance_gives_each_picture_its_own_control_in_both_halves(sd):
    base = families.load_base(str(sd))
    hint.attach(base.model, hint.config_for(base, "canny", width=8))
    wake(base.model)
    together = drawn(base, CONTROLS)
    alone = [drawn(base, CONTROLS[[number] * 3])[number] for number in range(3)]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_features_are_encoded_once_without_gradients_and_trained_with_them(sd):
    base = families.load_base(str(sd))
    encoder = hint.attach(base.model, hint.config_for(base, "canny", width=8))
    encoder.requires_grad_(True)
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    drawn(base, CONTROLS, batch=3)
    assert len(calls) == 1
    noise, embeds = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 16)
    with hint.steering(base.model, CONTROLS.float() / 255):
        base.model(noise, torch.tensor(5), encoder_hidden_states=embeds).sample.square().mean().backward()
    assert encoder[-1].weight.grad.abs().sum() > 0


def test_controls_of_another_size_are_refused(sd):
    base = families.load_base(str(sd))
    hint.attach(base.model, hint.config_for(base, "canny", width=8))
    with pytest.raises(DataError, match="do not fit what is drawn"):
        drawn(base, torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert not base.model.conv_in._forward_hooks


def test_configs_are_checked(sd, tmp_path):
    base = families.load_base(str(sd))
    made = hint.config_for(base, "canny", width=8)
    assert (made.factor, made.channels) == (2, 8) and hint.read_config(tmp_path) is None
    (tmp_path / hint.FILE).write_text(hint.dump_config(made))
    assert hint.read_config(tmp_path) == made
    for text in ('{"control": "canny"}', "[1]", "{", hint.dump_config(made).replace("canny", "cany")):
        (tmp_path / hint.FILE).write_text(text)
        with pytest.raises(AdapterFileError, match="is damaged"):
            hint.read_config(tmp_path)
    with pytest.raises(AdapterFileError, match="another base"):
        hint.attach(base.model, replace(made, channels=320))
    with pytest.raises(ConfigError, match="multiple of 4"):
        replace(made, width=6)
    with pytest.raises(ConfigError, match="no 'hint'"), hint.steering(base.model, CONTROLS):
        pass
    first = hint.attach(base.model, made, seed=3)
    with pytest.raises(ConfigError, match="already"):
        hint.attach(base.model, made)
    again = hint.attach(families.load_base(str(sd)).model, made, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    numbers = 3 * 2**2 * 8 + 8 + 2 * (2 * 8) + (9 * 8 + 1) * 8 + (9 * 8 + 1) * 8
    assert sum(parameter.numel() for parameter in first.parameters()) == numbers


# ---- control pictures ------------------------------------------------------------------------------------------------


def test_edges_of_a_known_picture():
    image = Image.new("RGB", (32, 32))
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill="white")
    found = conditions.edges(image) > 0
    inside = np.zeros((32, 32), bool)
    inside[8:24, 8:24] = True
    near = np.zeros((32, 32), bool)
    near[7:25, 7:25] = True
    near[9:23, 9:23] = False
    assert found.any() and not (found & ~near).any()  # on the border, and nowhere else
    assert all(found[10:22, columns].any(1).all() for columns in (slice(7, 9), slice(23, 25)))
    assert not conditions.edges(Image.new("RGB", (32, 32), "red")).any()


def test_dots_come_back_as_landmarks():
    points = np.array([[10.0, 12.0], [40.5, 20.5], [70.0, 5.0], [33.0, 50.0]])
    found = conditions.points_of(conditions.dot_picture(points, 64), 4)
    assert np.isnan(found[2]).all()  # out of sight
    assert np.abs(found[[0, 1, 3]] - points[[0, 1, 3]]).max() <= 0.5


def test_unknown_controls_have_a_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'segmentation'"):
        conditions.check("segmentations")


def test_poses_move_points_as_computed_by_hand():
    points = np.array([[140.0, 112.0]])
    np.testing.assert_allclose(pose.Pose().move(points), [[32, (140 - 28 * 1.2 + 5.6) * 64 / 280]])
    turned = pose.Pose(right=10, down=0, turn=90, size=1).move(points, 280)  # up becomes right
    np.testing.assert_allclose(turned, [[140 + 28 + 28, 140]], atol=1e-9)


def test_parts_and_landmarks_are_those_of_the_drawing():
    scene = world.Scene("open", "scream", "t-shirt", "red", "none", "teal")
    person = world.Identity("bald top", "black", "pale", "none")
    for given in (pose.Pose(), pose.Pose(right=10, down=5, turn=8, size=1.1)):
        portrait = pose.Portrait(person, scene, given)
        labels, picture = portrait.parts(), np.asarray(portrait.picture(), int)
        names = list(pose.PARTS)
        for part, color in (("background", "#1f9d94"), ("skin", "#ffdbb4"), ("clothes", "#e5383b")):
            wanted_color = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
            exact = (picture == wanted_color).all(-1)
            assert exact.sum() > 100 and (labels[exact] == names.index(part)).mean() > 0.97
        rows, columns = np.nonzero(labels == names.index("mouth"))
        mouth = portrait.landmarks()[list(pose.LANDMARKS).index("mouth")]
        assert np.hypot(columns.mean() + 0.5 - mouth[0], rows.mean() + 0.5 - mouth[1]) < 2
        assert np.array_equal(pose.labels_of(pose.colored(labels)), labels)
    assert np.array_equal(np.asarray(pose.Portrait(person, scene).picture()), np.asarray(world.render(person, scene)))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_edge_scores_against_hand_values():
    wanted_edges, found = np.zeros((1, 6, 6)), np.zeros((1, 6, 6))
    wanted_edges[0, 2, :4] = 1  # four pixels
    found[0, 2, 0] = found[0, 3, 1] = found[0, 5, 5] = 1  # right, one off, wrong
    measured = metrics.edge_scores(found, wanted_edges)
    assert measured["iou"] == pytest.approx(1 / 6) and measured["f1"] == pytest.approx(2 / 7)
    precision, recall = 2 / 3, 3 / 4  # the fourth wanted pixel has no neighbour
    assert measured["f1_1px"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics.edge_scores(wanted_edges, wanted_edges) == {"iou": 1.0, "f1": 1.0, "f1_1px": 1.0}
    assert metrics.edge_scores(np.zeros((1, 6, 6)), wanted_edges) == {"iou": 0.0, "f1": 0.0, "f1_1px": 0.0}


def test_part_and_landmark_scores_against_hand_values():
    wanted_labels, found = np.array([[[0, 0], [1, 1]]]), np.array([[[0, 1], [1, 2]]])
    assert metrics.aacc(found, wanted_labels) == 0.5
    assert metrics.miou(found, wanted_labels, 4) == pytest.approx((1 / 2 + 1 / 3) / 2)  # 2 was not asked for
    assert metrics.landmark_error(np.array([[[3.0, 4.0], [0.0, 0.0]]]), np.zeros((1, 2, 2))) == 2.5
    with pytest.raises(DataError, match="one shape"):
        metrics.aacc(found, wanted_labels[:, :1])


def test_real_pictures_follow_their_own_controls():
    rng = np.random.default_rng(5)
    portraits = [pose.sample_portrait(rng, "test") for _ in range(12)]
    images = [portrait.picture() for portrait in portraits]
    strangers = images[1:] + images[:1]
    for control, name in (("canny", "iou"), ("segmentation", "miou"), ("landmarks", "landmarks")):
        asked = wanted(control, [control_of(portrait, control) for portrait in portraits])
        own, other = scores(control, images, asked)[name], scores(control, strangers, asked)[name]
        assert own < other - 0.5 if control == "landmarks" else own > other + 0.15, (control, own, other)


# ---- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", "segmentation", 4, seed=0)
    return tmp_path / "pairs"


def test_pairs_come_back_as_written(folder):
    pairs = read_pairs(folder, "segmentation")
    assert len(pairs) == 4 and not pairs.warnings and pairs.pictures[0].control == folder / "control" / "00000.png"
    assert all(picture.caption.startswith("a portrait of a person") for picture in pairs.pictures)
    assert as_controls(pairs.controls).shape == (4, 3, 64, 64)
    seen, held_out = pairs.split(1)
    assert len(seen) == 3 and held_out.pictures == pairs.pictures[3:]
    with pytest.raises(ConfigError, match="between 1 and 3"):
        pairs.split(4)


def test_edges_are_found_where_there_are_no_controls(tmp_path):
    pictures = tiny.pictures(tmp_path / "plain", size=40)
    pairs = read_pairs(pictures, "canny", resolution=16)
    assert as_controls(pairs.controls).any() and pairs.controls[0].size == (16, 16)
    with pytest.raises(DataError, match="Only canny is drawn"):
        read_pairs(pictures, "landmarks", resolution=16)


def break_missing(folder):
    (folder / "control" / "00001.png").unlink()


def break_picture(folder):
    (folder / "control" / "00001.png").write_bytes(b"no picture")


def break_size(folder):
    Image.new("RGB", (32, 64)).save(folder / "control" / "00001.png")


def break_row(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del rows[1]["control_file_name"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("harm, message", [
    (break_missing, r"not there, for example .*00001\.png"), (break_picture, r"00001\.png cannot be read"),
    (break_size, r"00001\.png is 32x64 pixels, but its picture 00001\.png is 64x64"),
    (break_row, "have no control picture"),
])  # fmt: skip
def test_what_is_wrong_with_a_control_is_said_before_training(folder, harm, message):
    harm(folder)
    with pytest.raises(DataError, match=message):
        read_pairs(folder, "segmentation")
