"""Shapes, masks, repeats, epochs and several subjects: each is shown by its effect."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import smidgen
from smidgen.bases import families
from smidgen.bases.protocol import Prompts
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data import buckets
from smidgen.tasks.data.images import Picture, read_folder
from smidgen.tasks.data.masks import Masks, fitted_mask, weights
from smidgen.tasks.diffusion.task import Buckets, Encoded, PersonalizeTask, encode_examples, encode_shapes
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
from smidgen.tasks.personalize.subjects import read_subjects
from smidgen.training.loop import LoopConfig
from tests.training import tiny_flow

BESIDE = Masks(wanted=True)


def sized(*sizes) -> list[Picture]:
    return [Picture(Path(f"{n}.png"), "a person", size, str(n)) for n, size in enumerate(sizes)]


def picture(path: Path, size=(20, 20), color=(200, 60, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).ellipse((2, 2, size[0] // 2, size[1] - 4), fill=tuple(255 - part for part in color))
    image.save(path)
    return path


def half(path: Path, size=(20, 20)) -> Path:
    """A mask that is white in its left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


def config(base, out, data, **train) -> PersonalizeConfig:
    loop = {"max_train_steps": 6, "lr_warmup_steps": 1, "checkpointing_steps": 2} | train
    show = Show(num_prompts=2, num_seeds=1, inference_steps=2, compare_lora=False)
    return PersonalizeConfig(data, Adapter("lora", rank=2), LoopConfig(**loop), show, base=str(base), out=out)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_a_picture_goes_to_the_bucket_of_its_own_proportions():
    found, warnings = buckets.shapes_of(sized((64, 64), (300, 200), (200, 300), (900, 300)), [64], 16, bucketing=True)
    assert found == {(48, 80): [2], (48, 96): [], (64, 64): [0], (80, 48): [1], (96, 48): [3]} or found == {
        (48, 80): [2], (64, 64): [0], (80, 48): [1], (96, 48): [3],
    }  # fmt: skip
    assert not warnings
    plain, _ = buckets.shapes_of(sized((64, 64), (300, 200)), [64], 16, bucketing=False)
    assert plain == {(64, 64): [0, 1]}


def test_a_picture_is_seen_at_each_size_that_it_fills():
    found, (warning,) = buckets.shapes_of(sized((100, 100), (70, 80), (40, 40)), [64, 96], 16, bucketing=False)
    assert found == {(64, 64): [0, 1, 2], (96, 96): [0]}
    assert warning == "2 pictures too small for size 96, not trained at it: 1.png, 2.png."


@pytest.mark.parametrize("given, message", [
    ("64;96", "or several with commas, such as 512,768, not '64;96'"), (70, "multiples of 16 pixels. 64 and 80 are near it"),
    ("64,-16", "or several"),
    (8, "16 and 32 are near it"), (0, "not 0"), ("", "or several"), ("99999999", "16,384 at most"),
])  # fmt: skip
def test_sizes_that_make_no_sense(given, message):
    with pytest.raises(ConfigError, match=message):
        buckets.parse_sizes(given, 64, 16)


def encoded(name: str, *repeats: int, side: int = 2) -> Encoded:
    rows = torch.zeros(len(repeats), 1, side, side)
    names = tuple(f"{name}{number}" for number in range(len(repeats)))
    return Encoded(rows, rows, Prompts({"embeds": torch.zeros(len(repeats), 1, 1)}), names, repeats)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_batch_holds_one_bucket_and_every_picture_comes_as_often_as_it_should(size):
    parts = encoded("a", 1, 1, 1, 1, 1), encoded("b", 3, side=4), encoded("c", 1, 2, side=6)
    task, names = Buckets(parts), [name for part in parts for name in part.names]
    drawn, order = Counter(), []
    for index in range(11):
        part, picks, numbers = task.picked(7, index, size)
        assert len(picks) == size and numbers == [names.index(part.names[pick]) for pick in picks]
        drawn.update(part.names[pick] for pick in picks)
        order.append(part)
        again, same, _ = task.picked(7, index, size)
        assert again is part and same == picks
    assert len({id(part) for part in order}) == 3
    assert drawn == {
        "a0": size,
        "a1": size,
        "a2": size,
        "a3": size,
        "a4": size,
        "b0": 3 * size,
        "c0": size,
        "c1": 2 * size,
    }
    others = [task.picked(7, index, size)[0] for index in range(11, 22)]
    assert Counter(map(id, others)) == Counter(map(id, order)) and list(map(id, others)) != list(map(id, order))


def test_sdxl_is_told_the_shape_of_its_bucket(sdxl, tmp_path):
    base = families.load_base(str(sdxl))
    picture(tmp_path / "wide.png", (60, 30)), picture(tmp_path / "tall.png", (20, 40))
    found = read_folder(tmp_path, "a person")
    shapes, _ = buckets.shapes_of(found.pictures, [16], base.step, bucketing=True)
    task = PersonalizeTask(encode_shapes(base, found.pictures, found.captions, shapes), base, batch_size=2)
    told = {tuple(ids) for index in range(2) for ids in task.batch(index)["prompts"].tensors["time_ids"].tolist()}
    for batch in map(task.batch, range(2)):
        height, width = (side * base.factor for side in batch["latents"].shape[-2:])
        assert batch["prompts"].tensors["time_ids"][:, 4:].tolist() == [[height, width]] * 2
        assert torch.isfinite(task.loss(base.model, batch))
    assert {(ids[0], ids[1]) for ids in told} == {(30, 60), (40, 20)} and len({ids[4:] for ids in told}) == 2


@pytest.mark.parametrize("family", sorted(tiny_flow.BUILDERS))
def test_flow_families_train_at_every_shape(family, tmp_path_factory, tmp_path):
    base = families.load_base(str(tiny_flow.flow_folder(family, tmp_path_factory.mktemp("flow") / family)))
    picture(tmp_path / "wide.png", (90, 40)), half(tmp_path / "masks" / "wide.png", (90, 40))
    found = read_folder(tmp_path, "a person", masks=BESIDE)
    wide = {(4 * base.step, 2 * base.step): [0], (2 * base.step, 2 * base.step): [0]}
    task = PersonalizeTask(encode_shapes(base, found.pictures, found.captions, wide, least=0.0), base, batch_size=1)
    seen = set()
    for batch in map(task.batch, range(2)):
        latents, importance = batch["latents"], batch["importance"]
        height, width = latents.shape[-2:]
        seen.add((height, width))
        assert importance.shape == (1, 1, height, width)
        torch.testing.assert_close(importance[..., : width // 2].mean(), torch.tensor(2.0))
        assert not importance[..., width // 2 :].any()
        said = base.predict(base.model, latents, base.schedule.timesteps(batch["levels"]), batch["prompts"])
        assert said.shape == latents.shape
    assert len(seen) == 2 and {width / height for height, width in seen} == {1.0, 2.0}


def test_killed_and_resumed_with_buckets_and_masks_ends_with_the_same_bits(sd, tmp_path):
    folder = tmp_path / "pictures"
    for number, size in enumerate([(20, 20), (60, 30), (20, 40), (24, 24)]):
        picture(folder / f"{number}.png", size, (40 * number, 90, 200)), half(folder / "masks" / f"{number}.png", size)
    data = Data(
        folder, "a person", resolution="16,20", train_batch_size=2, aspect_ratio_bucketing=True, masked_loss=True
    )
    report = personalize(config(sd, tmp_path / "whole", data), progress=False)
    assert any(note.startswith("Pictures at each shape") for note in report.notes)
    assert "4 pictures learnt where a mask is white." in report.notes
    broken = config(sd, tmp_path / "broken", data)
    personalize(broken, progress=False)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6"), (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    personalize(replace(broken, resume_from_checkpoint="latest"), progress=False)
    name = "adapter_model.safetensors"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    half(folder / "masks" / "0.png").write_bytes(picture(tmp_path / "other.png").read_bytes())
    with pytest.raises(smidgen.SmidgenError, match="pictures"):
        personalize(replace(broken, resume_from_checkpoint="latest"), progress=False)


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_what_a_mask_leaves_out_is_not_learnt(sd, tmp_path):
    """The error of the same batches, inside and outside the mask, before and after something of each place's own was trained."""
    picture(tmp_path / "a.png"), half(tmp_path / "masks" / "a.png")
    base, fell = families.load_base(str(sd)), {}
    for name, masks in {"masked": BESIDE, "whole": Masks()}.items():
        found = read_folder(tmp_path, "a person", masks=masks)
        task = PersonalizeTask(encode_examples(base, found.pictures, found.captions, 16, least=0.0), base, batch_size=4)
        batches, own = [task.batch(index) for index in range(4)], torch.zeros(4, 8, 8, requires_grad=True)

        def errors(batch, task=task):
            halves = torch.eye(2).repeat_interleave(4, dim=1)  # the columns of latents inside and outside
            return torch.stack([task.errors(base.model, batch | {"importance": half}).sum() for half in halves])

        with base.model.register_forward_hook(lambda _m, _i, out, own=own: (out[0] + own,)):
            with torch.no_grad():
                before = sum(map(errors, batches))
            optimizer = torch.optim.Adam([own], lr=0.03)
            for index in range(32):
                optimizer.zero_grad()
                task.loss(base.model, batches[index % 4]).backward()
                optimizer.step()
            with torch.no_grad():
                fell[name] = ((before - sum(map(errors, batches))) / before).tolist()
    inside, outside = fell["masked"]
    assert inside > 0.02 and outside == 0.0, fell
    assert min(fell["whole"]) > 0.02, fell


def test_the_loss_of_a_masked_picture_keeps_its_scale(sd, tmp_path):
    picture(tmp_path / "a.png"), half(tmp_path / "masks" / "a.png")
    base, found = families.load_base(str(sd)), read_folder(tmp_path, "a person", masks=BESIDE)
    for least, (inside, outside) in {0.0: (2.0, 0.0), 0.1: (2 / 1.1, 0.2 / 1.1), 1.0: (1.0, 1.0)}.items():
        importance = encode_examples(base, found.pictures, found.captions, 16, least).importance
        torch.testing.assert_close(importance.mean(), torch.tensor(1.0))
        torch.testing.assert_close(importance[0, 0, 0], torch.tensor([inside] * 4 + [outside] * 4))
    assert weights(torch.rand(3, 1, 4, 4), 0.2).mean((1, 2, 3)).sub(1).abs().max() < 1e-6


def test_a_latent_across_the_outline_is_not_learnt(sd):
    base = families.load_base(str(sd))
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, ..., :5], masks[1, ..., 4] = 1, 1  # the second is narrower than a latent, of two pixels
    wide, narrow = base.latent_masks(masks)[:, 0, 0]
    assert wide.tolist() == [1.0] * 2 + [0.0] * 6 and narrow.tolist() == [0.0] * 2 + [0.5] + [0.0] * 5


def test_a_mask_is_cropped_as_its_picture_is(tmp_path):
    left = half(tmp_path / "m.png", (40, 20))
    assert fitted_mask(left, False, (40, 20), 8)[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    small = half(tmp_path / "small.png", (20, 10))  # half as large as its picture
    assert torch.equal(fitted_mask(small, False, (40, 20), (16, 8)), fitted_mask(left, False, (40, 20), (16, 8)))
    edge = Image.new("L", (40, 20), 0)
    edge.paste(255, (0, 0, 4, 20)), edge.save(tmp_path / "edge.png")
    with pytest.raises(DataError, match=r"crop of edge.png to 8x8 pixels keeps nothing.*--aspect-ratio-bucketing"):
        fitted_mask(tmp_path / "edge.png", False, (40, 20), 8)


def test_masks_are_found_by_name_and_what_does_not_fit_is_said(tmp_path):
    for number, name in enumerate(("a.png", "ann/b.png", "bob/b.png", "c.png", "d.png")):
        picture(tmp_path / name, color=(40 * number, 3, 200))
    half(tmp_path / "masks" / "a.webp"), half(tmp_path / "ann" / "masks" / "b.png"), half(tmp_path / "masks/bob/b.png")
    half(tmp_path / "c_mask.png"), half(tmp_path / "masks" / "nobody.png")
    found = read_folder(tmp_path, "a person", masks=BESIDE)
    where = {
        p.path.relative_to(tmp_path).as_posix(): p.mask and p.mask.relative_to(tmp_path).as_posix()
        for p in found.pictures
    }
    assert where == {
        "a.png": "masks/a.webp", "ann/b.png": "ann/masks/b.png", "bob/b.png": "masks/bob/b.png", "c.png": "c_mask.png",
        "d.png": None,
    }  # fmt: skip
    assert "1 picture without a mask, learnt whole: d.png." in found.warnings
    assert "1 mask of no picture that is trained on, not used: masks/nobody.png." in found.warnings
    assert not any("call masks" in warning for warning in found.warnings)
    assert any("call masks" in warning for warning in read_folder(tmp_path, "a person").warnings)


def test_a_mask_folder_of_any_name_is_no_folder_of_pictures(tmp_path):
    picture(tmp_path / "in" / "a.png"), half(tmp_path / "in" / "seg" / "a.png"), half(tmp_path / "out" / "a.png")
    inside = read_folder(tmp_path / "in", "a person", masks=Masks(True, tmp_path / "in" / "seg"))
    assert [p.path.name for p in inside.pictures] == ["a.png"] and inside.pictures[0].mask.parent.name == "seg"
    shutil.rmtree(tmp_path / "in" / "seg")
    assert read_folder(tmp_path / "in", "a person", masks=Masks(True, tmp_path / "out")).pictures[0].mask


def test_opacity_as_a_mask(sd, tmp_path):
    clear = Image.new("RGBA", (20, 20), (200, 30, 30, 255))
    clear.paste((200, 30, 30, 0), (10, 0, 20, 20)), clear.save(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    found = read_folder(tmp_path, "a person", masks=Masks(True, alpha=True))
    assert [p.mask for p in found.pictures] == [tmp_path / "a.png", None]
    assert "1 picture without a transparent part, learnt whole: b.png." in found.warnings
    base = families.load_base(str(sd))
    importance = encode_examples(base, found.pictures, found.captions, 16, 0.0).importance
    assert importance[0, 0, 0].tolist() == [2.0] * 4 + [0.0] * 4 and bool((importance[1] == 1).all())
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="has a transparent part"):
        read_folder(tmp_path, "a person", masks=Masks(True, alpha=True))


@pytest.mark.parametrize("make, message", [
    (lambda root: None, r"has a mask beside it.*masks/ \(--masked-loss\)"),
    (lambda root: half(root / "masks" / "a.png", (20, 30)), "20x30 pixels, but its picture a.png is 20x20"),
    (lambda root: Image.new("L", (20, 20), 0).save(half(root / "masks" / "a.png")), "black throughout: nothing of it"),
    (lambda root: half(root / "masks" / "a.png").write_bytes(b"no picture"), "a.png cannot be read"),
    (lambda root: [half(root / "masks" / "a.png"), half(root / "masks" / "a.webp")], "a.png has 2 masks: masks/a"),
])  # fmt: skip
def test_masks_that_cannot_be_used(tmp_path, make, message):
    picture(tmp_path / "a.png")
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path, "a person", masks=BESIDE)


# ---- repeats, epochs, subjects ---------------------------------------------------------------------------------------


def subjects(tmp_path, *rows: str, sizes=((20, 20), (20, 20))) -> Path:
    for name, color, size in zip(("ann", "bob"), ((200, 0, 0), (0, 0, 200)), sizes, strict=True):
        for number in range(2):
            picture(tmp_path / name / f"{name}{number}.png", size, (*color[:1], 60 * number + 9, color[2]))
    (tmp_path / "people.yaml").write_text("\n".join(rows))
    return tmp_path / "people.yaml"


ANN = "- {folder: ann, placeholder_token: sks, instance_prompt: a person, repeats: 3}"
BOB = "- {folder: bob, placeholder_token: ohwx, instance_prompt: a tall person, loss_weight: 0.5}"


@pytest.mark.parametrize("sizes", [((20, 20), (20, 20)), ((20, 20), (60, 30))])
def test_each_subject_has_its_own_words_repeats_and_weight(sd, tmp_path, sizes):
    path, base = subjects(tmp_path, ANN, BOB, sizes=sizes), families.load_base(str(sd))
    data = Data(None, subjects=path, aspect_ratio_bucketing=True)
    read = read_subjects(data, base.resolution, base.step)
    assert read.captions == ["a sks person"] * 2 + ["a tall ohwx person"] * 2
    assert [one.phrase for one in read.subjects] == ["sks person", "ohwx person"]
    assert read.steps(epochs=3, batch=4) == 6  # (3 + 3 + 1 + 1) * 3 / 4
    task = PersonalizeTask(encode_shapes(base, read.found.pictures, read.captions, read.shapes), base, batch_size=2)
    drawn, weighed = Counter(), {}
    for index in range(8 if len(read.shapes) > 1 else 4):
        batch = task.batch(index)
        drawn.update(batch["names"])
        counts = batch.get("importance", torch.ones(2, 1, 1, 1)).mean((1, 2, 3)).tolist()
        weighed |= dict(zip(batch["names"], counts, strict=True))
    times = 2 if len(read.shapes) > 1 else 1
    assert drawn == {"ann0.png": 3 * times, "ann1.png": 3 * times, "bob0.png": times, "bob1.png": times}
    assert weighed == {"ann0.png": 1.0, "ann1.png": 1.0, "bob0.png": 0.5, "bob1.png": 0.5}


@pytest.mark.parametrize("rows, message", [
    (["- {folder: ann, instance_prompt: a person}", "- {folder: bob, instance_prompt: a person}"], "the same words, 'a person'"),
    (["folder: ann"], "must hold a list of folders"), ([""], "must hold a list"), (["- {folder: ann, repeat: 2}"], "repeats"),
    (["- {folder: nobody}"], "nobody is not a folder"), (["- {folder: ann, repeats: 0}"], "repeats must be from 1"),
    (["- {folder: ann, placeholder_token: x, instance_prompt: a dog}"], "class word 'person'"), (["- 3"], "mapping"),
])  # fmt: skip
def test_lists_of_subjects_that_make_no_sense(tmp_path, rows, message):
    with pytest.raises((DataError, ConfigError), match=message):
        read_subjects(Data(None, subjects=subjects(tmp_path, *rows)), 16, 4)


def test_subjects_on_the_command_line(tmp_path, monkeypatch):
    subjects(tmp_path)
    monkeypatch.chdir(tmp_path)
    read = read_subjects(Data(None, "a pet", subject=("ann=sks pet", f"{tmp_path / 'bob'}=ohwx  pet")), 16, 4)
    assert [one.phrase for one in read.subjects] == ["sks pet", "ohwx pet"]
    assert read.captions == ["a sks pet"] * 2 + ["a ohwx pet"] * 2
    assert read_subjects(Data(None, "a person", subject=("ann=sks",)), 16, 4).subjects[0].phrase == "sks person"
    for wrong in ("ann", "ann=", "=sks"):
        with pytest.raises(ConfigError, match=f"such as ann=sks.*not {wrong!r}"):
            read_subjects(Data(None, "a person", subject=(wrong,)), 16, 4)
    with pytest.raises(DataError, match="Two folders of ann=sks, bob=sks answer to the same words"):
        read_subjects(Data(None, "a person", subject=("ann=sks", "bob=sks")), 16, 4)
    with pytest.raises(ConfigError, match=r"a folder \(ann\) or subject \(bob=sks\), not both"):
        Data(Path("ann"), subject=("bob=sks",))


def test_settings_that_exclude_each_other(sdxl, tmp_path):
    with pytest.raises(ConfigError, match="alpha_mask takes"):
        Data(tmp_path, alpha_mask=True, masked_loss=True)
    with pytest.raises(ConfigError, match="not both"):
        Data(tmp_path, subjects=tmp_path / "people.yaml")
    picture(tmp_path / "in" / "a.png", (60, 30)), picture(tmp_path / "in" / "b.png")
    data = Data(tmp_path / "in", "a person", aspect_ratio_bucketing=True, with_prior_preservation=True)
    with pytest.raises(ConfigError, match="class pictures of one size"):
        read_subjects(data, 16, 4)


class Whose:
    """A judge that notes whose pictures it is to compare with: the reds are Ann's. It scores .1, .2, .3, ... call after call."""

    name = "whose"

    def __init__(self):
        self.calls = []

    def prompts(self, count, seed):
        return [f"a person, number {number}" for number in range(count)]

    def scores(self, images, prompts, references):
        assert len(images) == len(prompts) == 2 and len(references) == 2
        red, _, blue = references[0].getpixel((14, 8))
        self.calls.append("ann" if red > blue else "bob")
        return {"identity": len(self.calls) / 10}


def test_a_report_of_two_subjects_scores_each_for_its_own_and_for_the_other(sd, tmp_path):
    people = subjects(tmp_path, ANN, BOB, sizes=((20, 20), (60, 30)))
    more = {"preservation": "class", "caption_dropout": 0.5, "aspect_ratio_bucketing": True}
    data = Data(None, subjects=people, train_batch_size=2, num_train_epochs=2, **more)
    report = personalize(config(sd, tmp_path / "out", data), judge=(judge := Whose()), progress=False)
    # each one's pictures for its own scenes, then for the other's
    assert judge.calls == ["ann", "bob", "bob", "ann"] * 2
    assert report.entries[0].identity == pytest.approx(0.2) and report.entries[0].details[
        "identity of others"
    ] == pytest.approx(0.3)
    assert (tmp_path / "out" / "checkpoint-8").is_dir()  # 2 epochs of (3 + 3 + 1 + 1) in batches of 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sks person or ohwx person" in card and "a ohwx person, number 0" in card
