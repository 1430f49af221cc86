"""Folders of labelled pictures: every layout is read, every mistake is an error or a counted warning."""

import json
import shutil

import pytest
import torch
from PIL import Image

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data.pictures import read_pictures
from smidgen.tasks.image_classification.task import ImageClassificationTask, choose_resolution


def draw(path, number, label, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (10 * number % 256, 7 * number % 256, 200 if label == "cat" else 30))
    image.paste((255, 255, 255), (9, 7, 11, 9))
    image.save(path)
    return path


def classes(folder, count=12, start=0):
    for number in range(start, start + count):
        label = ("cat", "dog")[number % 2]
        draw(folder / label / f"{number}.png", number, label)
    return folder


def read(folder, label_column="label", resolution=16, held_out=0.1, **options):
    return read_pictures(folder, label_column, resolution, held_out, **options)


def sizes(found):
    return [len(found.splits[name]) for name in ("train", "validation", "test")]


def test_class_folders_are_cut_by_content(tmp_path):
    found = read(classes(tmp_path / "a"))
    assert found.labels == ("cat", "dog") and sizes(found) == [8, 2, 2] and not found.warnings
    shutil.copytree(tmp_path / "a" / "cat", tmp_path / "b" / "cats")
    shutil.copytree(tmp_path / "a" / "dog", tmp_path / "b" / "dogs")
    again = read(tmp_path / "b")
    assert {p.digest for p in again.splits["test"]} == {p.digest for p in found.splits["test"]}
    picture = found.splits["train"][0]
    pixels = found.pixels(picture)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    number = int(picture.path.stem)
    assert pixels[:, 0, 0].tolist() == [10 * number % 256, 7 * number % 256, 200 if picture.label == 0 else 30]


def test_split_folders(tmp_path):
    classes(tmp_path / "train", 8)
    classes(tmp_path / "val", 4, start=8)
    classes(tmp_path / "test", 2, start=12)
    (tmp_path / "notes").mkdir()
    found = read(tmp_path)
    assert sizes(found) == [8, 4, 2]
    assert found.warnings == ("1 folder beside the splits and left out: notes.",)


def labelled(folder, labels):
    """Pictures with these labels in their metadata."""
    rows = [{"file_name": draw(folder / f"{n}.png", n, "cat").name, "label": label} for n, label in enumerate(labels)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return read(folder)


@pytest.mark.parametrize("labels, names", [
    ([float(n % 2) if n % 3 else n % 2 for n in range(20)], ("0", "1")),
    ([f"{' ' * (n % 3)}{('dog', 'cat')[n % 2]}" for n in range(20)], ("cat", "dog")),
    ([(True, "false", 1, 0)[n % 4] for n in range(20)], ("False", "True")),
])  # fmt: skip
def test_labels_follow_the_rule_of_texts(tmp_path, labels, names):
    found = labelled(tmp_path, labels)
    assert found.labels == names and not found.several and not found.warnings


@pytest.mark.parametrize("nothing", [None, float("nan"), " ", "null"])
def test_pictures_without_a_label_are_left_out(tmp_path, nothing):
    found = labelled(tmp_path, [nothing, *(("dog", "cat")[n % 2] for n in range(20))])
    assert found.labels == ("cat", "dog") and sum(sizes(found)) == 20
    assert found.warnings == ("1 row of metadata.jsonl without a label, left out: metadata.jsonl row 1.",)


def test_pictures_of_several_classes(tmp_path):
    found = labelled(tmp_path, [["warm"] * (n % 2) + ["wet"] * (n % 3 == 0) for n in range(24)])
    assert found.several and found.labels == ("warm", "wet")
    assert {picture.label for picture in found.splits["train"]} == {(), (0,), (1,), (0, 1)}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata(tmp_path, suffix):
    rows = []
    for number in range(12):
        draw(tmp_path / "images" / f"{number}.png", number, "cat")
        rows.append({"file_name": f"images/{number}.png", "kind": str(number % 3)})
    rows.append({"file_name": "images/0.png", "kind": ""})
    if suffix == "csv":
        lines = ["file_name,kind", *(f"{row['file_name']},{row['kind']}" for row in rows)]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read(tmp_path, "kind")
    assert found.labels == ("0", "1", "2") and sum(sizes(found)) == 12
    assert "1 row of metadata" in found.warnings[0] and "without a label, left out" in found.warnings[0]
    with pytest.raises(DataError, match=r"no column 'label'.* Its columns are file_name, kind"):
        read(tmp_path)
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 picture named in metadata.* but not in the folder: images/3.png"):
        read(tmp_path, "kind")


def test_pixels_read_again_are_those_kept_in_memory(tmp_path):
    kept, again = read(classes(tmp_path)), read(tmp_path, memory=0)
    for one, other in zip(kept.splits["train"], again.splits["train"], strict=True):
        assert one == other and torch.equal(kept.pixels(one), again.pixels(other))


def test_broken_pictures_are_named_and_left_out(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "broken.png").write_bytes(b"\x89PNG no")
    draw(tmp_path / "dog" / "tiny.png", 1, "dog", size=(4, 4))
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    draw(tmp_path / "loose.png", 3, "cat")
    found = read(tmp_path)
    text = " ".join(found.warnings)
    assert sum(sizes(found)) == 12 and "3 train pictures cannot be read and left out: cat/broken.png" in text
    assert "cat/cut.png" in text and "dog/tiny.png (4x4 is smaller than 8 pixels)" in text
    assert "1 picture in" in text and "outside any class folder, left out: loose.png" in text


def test_pictures_in_two_splits_are_counted(tmp_path):
    classes(tmp_path / "train", 8)
    classes(tmp_path / "test", 4)
    classes(tmp_path / "validation", 4, start=8)
    assert "4 test examples also in the train split" in read(tmp_path).warnings[0]


@pytest.mark.parametrize("make, message", [
    (lambda f: f / "nowhere", "is not a folder of pictures"),
    (lambda f: f, "holds no labelled pictures: class folders"),
    (lambda f: draw(f / "cat" / "1.png", 1, "cat").parent.parent, "Every picture of train has the label 'cat'"),
    (lambda f: [(f / x).mkdir() or (f / x / "1.png").write_bytes(b"no") for x in "ab"] and f, "No picture of train can be read"),
    (lambda f: classes(f / "train") and classes(f / "val") and draw(f / "val" / "cow" / "1.png", 1, "x") and f,
     r"val/cow/1.png \(validation\) has the label 'cow', which train has not\..* Train knows cat, dog"),
    (lambda f: classes(f, 2), "Nothing is left to train on: 2 example"),
])  # fmt: skip
def test_mistakes_that_leave_nothing_to_learn(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        read(make(tmp_path))


def test_augmentation_follows_from_the_batch_number(tmp_path):
    found = read(classes(tmp_path))
    still = torch.full((3,), 0.5)

    def task(**options):
        return ImageClassificationTask(found.splits, found.pixels, still, still, batch_size=6, **options)

    plain = task().batch(1)["pixel_values"]
    moved = [task(random_crop=True, random_flip=True).batch(at)["pixel_values"] for at in (1, 1, 2)]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    assert plain.min() >= -1 and plain.max() <= 1
    for picture, other in zip(plain, moved[0], strict=True):  # nothing but its own colours
        assert {*map(tuple, picture.flatten(1).T.tolist())} == {*map(tuple, other.flatten(1).T.tolist())}
    assert task().batch(1)["weight"] == 6.0


def test_crops_shift_and_flips_mirror(tmp_path):
    folder = tmp_path / "lines"
    for number in range(12):
        image = Image.new("RGB", (16, 16), (number, number, number))
        image.putpixel((3, 5), (255, 255, 255))
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    found = read(folder)
    zero, one = torch.zeros(3), torch.ones(3)
    options = {"batch_size": 8, "mean": zero, "std": one}
    flips = ImageClassificationTask(found.splits, found.pixels, random_flip=True, **options)
    crops = ImageClassificationTask(found.splits, found.pixels, random_crop=True, **options)
    spots = {tuple(p[0].eq(1).nonzero()[0].tolist()) for at in range(4) for p in flips.batch(at)["pixel_values"]}
    assert spots == {(5, 3), (5, 12)}
    spots = {tuple(p[0].eq(1).nonzero()[0].tolist()) for at in range(8) for p in crops.batch(at)["pixel_values"]}
    assert spots <= {(5 + y, 3 + x) for x in range(-2, 3) for y in range(-2, 3)} and len(spots) > 10


def test_resolutions():
    class Config:
        image_size, patch_size = 32, 8

    assert choose_resolution(None, Config) == 32 and choose_resolution(48, Config) == 48
    with pytest.raises(ConfigError, match=r"multiple of the model's patch of 8 pixels, not 50; 48"):
        choose_resolution(50, Config)
