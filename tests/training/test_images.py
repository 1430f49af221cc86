"""Folders of pictures: three layouts, and every mistake people make with them said before anything is trained."""

import json
import logging

import numpy
import pytest
import torch
from PIL import Image

from smidgen.errors import DataError
from smidgen.tasks.data import images, pixels
from tests.training import tiny


def png(path, size=(40, 30), color=(200, 10, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, color)
    if mode == "RGB":
        image.paste((255, 255, 255), (0, 0, 2, 2))
    image.save(path)
    return path


def test_an_imagefolder_with_jsonl(pictures):
    found = images.read_folder(pictures)
    assert found.captions == list(tiny.CAPTIONS[:3]) and found.warnings == ()
    assert [picture.size for picture in found.pictures] == [(20, 20)] * 3


def test_an_imagefolder_with_csv(pictures):
    (pictures / "metadata.jsonl").unlink()
    (pictures / "metadata.csv").write_text('file_name,text\n0.png,zero\n1.png,"one, two"\n2.png,three\n')
    assert images.read_folder(pictures).captions == ["zero", "one, two", "three"]


def test_captions_beside_the_pictures(tmp_path):
    png(tmp_path / "a.png").with_suffix(".txt").write_text("first\n")
    png(tmp_path / "b.jpg", color=(0, 0, 9)).with_suffix(".txt").write_text("second")
    (tmp_path / "c.txt").write_text("nobody")
    found = images.read_folder(tmp_path)
    assert found.captions == ["first", "second"]
    assert found.warnings == ("1 caption file without a picture beside it and ignored: c.txt.",)


def test_bare_pictures_need_a_prompt(tmp_path):
    png(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 picture without a caption: a\.png.*--instance-prompt"):
        images.read_folder(tmp_path)
    assert images.read_folder(tmp_path, "a person").captions == ["a person"]


def test_an_instance_prompt_fills_only_what_has_no_caption(tmp_path):
    png(tmp_path / "a.png").with_suffix(".txt").write_text("mine")
    png(tmp_path / "b.png", color=(0, 0, 9))
    assert images.read_folder(tmp_path, "given").captions == ["mine", "given"]


def test_broken_pictures_are_all_named(tmp_path):
    png(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not a picture")
    whole = png(tmp_path / "cut.png", size=(300, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    png(tmp_path / "speck.png", size=(3, 3))
    with pytest.raises(DataError, match=r"3 picture\(s\) cannot be read: cut\.png.*speck\.png.*3x3.*text\.png"):
        images.read_folder(tmp_path, "a person")


def test_pictures_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "LARGEST", 1000)
    png(tmp_path / "huge.png")
    with pytest.raises(DataError, match="40x30 is more than"):
        images.read_folder(tmp_path, "a person")


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"file_name": "9.png", "text": "x"}'], r"1 picture named in metadata\.jsonl but not in the folder: 9\.png"),
        (['{"filename": "0.png"}'], r"no column 'file_name'.*Did you mean 'filename'"),
        (["{"], r"line 1 is not JSON"),
        (["[1]"], r"line 1 must be an object"),
        ([""], r"is empty"),
    ],
)
def test_metadata_mistakes(pictures, lines, message):
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        images.read_folder(pictures)


def test_unknown_columns_and_unlisted_pictures_are_counted(pictures):
    rows = [{"file_name": "0.png", "text": "x", "source": "me"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = images.read_folder(pictures)
    assert len(found.pictures) == 1
    assert "unknown column(s) 'source' ignored" in found.warnings[0]
    assert found.warnings[1] == "2 pictures not named in the metadata and left out: 1.png, 2.png."


def test_a_misnamed_caption_column_is_guessed_at(pictures):
    rows = [{"file_name": "0.png", "texts": "x"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = images.read_folder(pictures, "a person")
    assert "Did you mean 'text'?" in found.warnings[0]


def test_copies_are_left_out_and_small_ones_warned_about(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    found = images.read_folder(tmp_path, "a person", resolution=64)
    assert [picture.path.name for picture in found.pictures] == ["a.png"]
    assert "1 picture byte for byte a copy of another and left out: b.png." in found.warnings
    assert "1 picture smaller than the base's 64 pixels and will be enlarged: a.png." in found.warnings


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        images.read_folder(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="Did you mean 'pictures'"):
        images.read_folder(tmp_path / "picturs")


def test_the_placeholder_goes_before_the_class_word():
    assert images.bind(["A Person and a person", "personal person"], "person", "sks") == [
        "A sks Person and a person",
        "personal sks person",
    ]
    with pytest.raises(DataError, match="--class-word"):
        images.bind(["a dog"], "person", "sks")


def test_pictures_come_upright_on_white_and_square(tmp_path):
    clear = png(tmp_path / "clear.png", (40, 20), (0, 0, 0, 0), "RGBA")
    assert images.load_picture(clear, 16).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (40, 20), "red")
    turned.paste((0, 0, 255), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = pixels.upright(Image.open(tmp_path / "turned.jpg"))
    assert upright.size == (20, 40) and upright.getpixel((10, 2))[2] > 200
    square = images.load_picture(clear, 16)
    assert square.size == (16, 16)


def test_tensors_are_in_minus_one_to_one():
    tensor = images.to_tensor([Image.new("RGB", (4, 6), (0, 255, 51))])
    assert tensor.shape == (1, 3, 6, 4)
    torch.testing.assert_close(tensor[0, :, 0, 0], torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))
    assert numpy.isfinite(tensor.numpy()).all()


def test_reading_says_nothing_by_itself(pictures, caplog):
    with caplog.at_level(logging.DEBUG, "smidgen"):
        images.read_folder(pictures, resolution=64)
    assert not caplog.records
