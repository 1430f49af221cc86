"""Picture folders as people really have them: what is there is used, or named with the reason."""

import json
import os

import pytest
from PIL import Image, ImageDraw

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.control.pairs import read_pairs
from smidgen.tasks.data.images import read_folder
from smidgen.tasks.data.listing import holds_training_data
from smidgen.tasks.data.pictures import read_pictures
from smidgen.tasks.drawing import generate
from smidgen.tasks.png import write_png

CAPTION = "a portrait of a person, smiling"


def drawn(number, size=(40, 40), mode="RGB"):
    image = Image.new("RGB", size, (30 * number % 256, 90, 200))
    ImageDraw.Draw(image).ellipse((4, 4, size[0] - 4, size[1] - 6), fill=(220, 40 * number % 256, 40))
    return image.convert(mode)


def fill(folder, *names, start=0):
    """Pictures of these names, each its own."""
    for number, name in enumerate(names, start):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA"}.get(path.suffix)
        drawn(number).save(path, **({"format": kind} if kind else {}))
    return folder


def say(folder, *names, text=CAPTION):
    for name in names:
        (folder / name).write_text(text)
    return folder


def rows(folder, *values, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(value) for value in values))
    return folder


def names(found):
    return [picture.path.name for picture in found.pictures]


def text(found):
    return " ".join(found.warnings)


# ---- endings and what is left out ----------------------------------------------------------------------------------


def test_every_ending_that_pillow_reads_is_read_and_the_rest_is_named_by_its_reason(tmp_path):
    good = ["a.png", "b.jpg", "c.jpeg", "d.webp", "e.jfif", "f.jpe", "g.tga", "h.jp2", "i.PNG", "j.bmp", "k.ico"]
    fill(tmp_path, *good)
    for name in ("phone.HEIC", "scan.jxl", "raw.CR2", "clip.mp4", "logo.svg", "sheet.eps"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "README.md").write_text("mine")
    found = read_folder(tmp_path, "a person")
    assert names(found) == sorted(good) and str(found) == "11 pictures with 1 caption"
    for said in (".heic needs pillow-heif: pip install pillow-heif: phone.HEIC", "pip install pillow-jxl-plugin: scan.jxl",
                 "a camera's raw file; save it as PNG or JPEG: raw.CR2", "a video; save stills of it: clip.mp4",
                 "logo.svg", "sheet.eps"):  # fmt: skip
        assert said in text(found)
    assert "README" not in text(found)


def test_things_that_are_no_files_are_named(tmp_path):
    fill(tmp_path, "a.png", "folder.png/inside.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "round").symlink_to(tmp_path)
    elsewhere = fill(tmp_path.parent / f"{tmp_path.name} elsewhere", "linked.png", start=5)
    (tmp_path / "other").symlink_to(elsewhere)
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["a.png", "inside.png", "linked.png"]
    assert "1 picture left out: it is a link to nothing: gone.png." in found.warnings
    assert "1 picture left out: it is no file: pipe.jpg." in found.warnings
    assert "1 folder named like a picture; it is read as a folder: folder.png." in found.warnings
    assert "1 folder a link back to what is read anyway, not followed: round." in found.warnings


def test_hidden_files_and_those_of_systems_are_passed_over(tmp_path):
    fill(tmp_path, "a.png", ".b.png", "._a.png", "__MACOSX/a.png", ".cache/c.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["a.png"] and found.warnings == ()


# ---- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".caption", ".TXT", ".txt", ".Caption", ".png.txt"])
def test_captions_of_every_spelling_are_used(tmp_path, ending):
    fill(tmp_path, "p0.png", "p1.png")
    for number in range(2):
        (tmp_path / f"p{number}{ending}").write_text(f"person number {number}")
    found = read_folder(tmp_path)
    assert found.captions == ["person number 0", "person number 1"] and found.warnings == ()


def test_caption_files_in_other_encodings_and_cases(tmp_path):
    fill(tmp_path, "Ann.png", "b.png")
    (tmp_path / "ann.txt").write_bytes("ein Porträt".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("\ufeffa café".encode())
    assert read_folder(tmp_path).captions == ["ein Porträt", "a café"]


def test_captions_that_are_not_used_are_named(tmp_path):
    fill(tmp_path, "a.png", "b.png", "c.png", "d.png")
    say(tmp_path, "a.txt", "a.caption", "x.txt", "masks.txt")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.json").write_text('{"caption": "a person"}')
    found = read_folder(tmp_path, "a person")
    assert found.captions == [CAPTION, "a person", "a person", "a person"]
    assert "1 caption file beside a.txt and not read: a.caption." in found.warnings
    assert "2 caption files without a picture beside it and ignored: masks.txt, x.txt." in found.warnings
    assert "1 caption file that is empty: b.txt." in found.warnings
    assert "1 file beside a picture, of no kind that is read: c.json." in found.warnings
    assert "3 pictures captioned 'a person', the prompt for all: b.png, c.png, d.png." in found.warnings
    with pytest.raises(DataError, match=r"3 pictures without a caption: b.png.*1 file of no kind that is read: c.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize("stems", [("ann.jpg", "ann.png"), ("ann.png", "ann.webp"), ("ann.jpeg", "ann.tga")])
def test_two_pictures_of_one_stem_are_named(tmp_path, stems):
    say(fill(tmp_path, *stems), "ann.txt")
    found = read_folder(tmp_path)
    assert found.captions == [CAPTION] * 2
    said = f"2 pictures with one caption file between them, ann.txt; all are used: {', '.join(stems)}."
    assert found.warnings == (said,)


# ---- layouts of other trainers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [
    "masks/{}.png", "Mask/{}.png", "_masks/{}.png", "{}-masklabel.png", "{}_mask.png", "conditioning_images/{}.png",
    "control/{}.png", "{}-condlabel.png", "{}_depth.png", "reg/{}.png", "reg/1_person/{}.png", "class_images/{}.png",
    "regularization/{}.png",
])  # fmt: skip
def test_what_other_trainers_keep_beside_the_subject_is_left_out_and_named(tmp_path, other):
    fill(tmp_path, "p0.png", "p1.png")
    fill(tmp_path, *(other.format(f"p{number}") for number in range(2)), start=4)
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["p0.png", "p1.png"]
    assert len(found.warnings) == 1 and found.warnings[0].startswith("2 pictures that folder or name call ")
    assert other.format("p0") in found.warnings[0]


def test_a_name_alone_makes_no_mask(tmp_path):
    fill(tmp_path, "party_mask.png", "masks.png", "dog_depth.png")
    assert len(read_folder(tmp_path, "a person").pictures) == 3
    fill(tmp_path / "masks", "a.png")
    assert len(read_folder(tmp_path / "masks", "a person").pictures) == 1  # asked for by name


def test_kohyas_folders_are_understood(tmp_path):
    fill(tmp_path / "img" / "10_ann person", "a.png", "b.png")
    fill(tmp_path / "img" / "5_ann hat", "c.png", start=3)
    say(fill(tmp_path / "reg" / "1_person", "r0.png", "r1.png", start=6), "r0.txt", "r1.txt")
    found = read_folder(tmp_path)
    assert [picture.repeats for picture in found.pictures] == [10, 10, 5]
    assert found.captions == ["ann person", "ann person", "ann hat"]
    assert "captioned 'ann hat' by its folder's name: img/5_ann hat/c.png." in text(found)
    assert "2 pictures that folder or name call regularisation pictures, left out" in text(found)
    assert "caption file" not in text(found)
    assert str(found) == "3 pictures with 2 captions, counted 5 times (1 picture), 10 times (2 pictures)"
    assert found.identity()[0][1:] == ["ann person", 10]
    assert read_folder(tmp_path, "given").captions == ["given"] * 3  # what is said beats a folder's name
    inside = read_folder(tmp_path / "img" / "10_ann person")
    assert inside.captions == ["ann person"] * 2 and inside.pictures[0].repeats == 10


@pytest.mark.parametrize("name", ["2024_summer", "01_front", "ann_10", "10"])
def test_other_numbers_in_folder_names_mean_nothing(tmp_path, name):
    found = read_folder(fill(tmp_path / name, "a.png"), "a person")
    assert found.pictures[0].repeats == 1


def test_repeats_decide_how_often_a_picture_comes():
    import torch

    from smidgen.bases.protocol import Prompts
    from smidgen.tasks.diffusion.task import Encoded, in_proportion

    def places(*repeats):
        times = in_proportion(repeats)
        return Encoded(torch.zeros(3, 1), torch.zeros(3, 1), Prompts({}), ("a", "b", "c"), times).places

    assert places() == places(10, 10, 10) == [0, 1, 2]
    assert places(10, 5, 5) == [0, 0, 1, 2]


def test_splits_keep_their_test_pictures(tmp_path):
    fill(tmp_path / "train", "a.png")
    fill(tmp_path / "test", "b.png", start=1)
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["a.png"]
    assert found.warnings == ("1 picture in a split kept from training, left out: test/b.png.",)
    assert len(read_folder(tmp_path / "test", "a person").pictures) == 1


@pytest.mark.parametrize("place", ["control", "conditioning_images", "Conditioning"])
def test_conditioning_folders_are_control_pictures_where_they_are_wanted(tmp_path, place):
    fill(tmp_path, "a.png", "b.png")
    fill(tmp_path / place, "a.png", "b.png", start=5)
    pairs = read_pairs(tmp_path, "other", "a person", 40)
    assert len(pairs) == 2 and pairs.warnings == ()
    assert [control.tobytes() for control in pairs.controls] == [drawn(5).tobytes(), drawn(6).tobytes()]
    (tmp_path / place / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 picture.* have no control picture, for example b.png"):
        read_pairs(tmp_path, "other", "a person", 40)


def test_a_control_picture_is_read_as_pictures_are(tmp_path):
    import numpy as np

    fill(tmp_path, "a.png")
    (tmp_path / "control").mkdir()
    grey = (np.linspace(0, 1, 1600).reshape(40, 40) * 65535).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "control" / "a.png")
    found = np.asarray(read_pairs(tmp_path, "other", "a person", 40).controls[0]).astype(int)
    assert found[..., 0].max() == 255 and abs(found[..., 0] - grey / 257).max() <= 1
    clear = drawn(1, mode="RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "control" / "a.png")
    with pytest.raises(DataError, match=r"a.png cannot be used: it is transparent throughout"):
        read_pairs(tmp_path, "other", "a person", 40)


# ---- what Smidgen wrote ----------------------------------------------------------------------------------------------


def test_nothing_that_smidgen_wrote_is_trained_on(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    for place in ("", "out", "out/peft_lora"):
        for number, name in enumerate(("contact_sheet.png", "loss.png", "preview-50.png", "00-a-person-0.png")):
            write_png(drawn(number), tmp_path / place / name)
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["a.png", "b.png"] and "12 pictures written by Smidgen and left out" in text(found)
    with pytest.raises(DataError, match=r"holds no pictures to train on.*4 pictures written by Smidgen and left out"):
        read_folder(tmp_path / "out" / "peft_lora", "a person")
    rows(tmp_path, *({"file_name": name, "text": CAPTION} for name in ("a.png", "loss.png")))
    found = read_folder(tmp_path)
    assert names(found) == ["a.png"] and "1 picture named in metadata.jsonl but written by Smidgen" in text(found)


def test_sheets_of_earlier_versions_are_known_by_what_lies_beside_them(tmp_path):
    fill(tmp_path / "me", "contact_sheet.png", "loss.png", "preview-10.png", "portrait.png")
    assert len(read_folder(tmp_path, "a person").pictures) == 4
    (tmp_path / "me" / "adapter_config.json").write_text("{}")
    assert names(read_folder(tmp_path, "a person")) == ["portrait.png"]


def test_an_output_folder_is_no_class(tmp_path):
    for label in ("cat", "dog"):
        fill(tmp_path / label, *(f"{number}.png" for number in range(8)), start=ord(label[0]))
    for name in ("loss.png", "contact_sheet.png"):
        write_png(drawn(1), tmp_path / "run" / name)
    found = read_pictures(tmp_path, "label", 16, 0.1)
    assert found.labels == ("cat", "dog")
    assert "2 pictures written by Smidgen and left out: run/contact_sheet.png, run/loss.png." in found.warnings


def test_masks_are_no_class_but_people_with_masks_are(tmp_path):
    for label in ("cat", "dog"):
        fill(tmp_path / label, *(f"{label}{number}.png" for number in range(6)), start=ord(label[0]))
    fill(tmp_path / "masks", *(f"{label}{number}.png" for label in ("cat", "dog") for number in range(6)), start=50)
    found = read_pictures(tmp_path, "label", 16, 0.1)
    assert found.labels == ("cat", "dog") and "12 pictures that are masks of other classes' pictures" in text(found)
    fill(tmp_path / "masks", "someone.png", start=70)
    assert read_pictures(tmp_path, "label", 16, 0.1).labels == ("cat", "dog", "masks")


def test_a_picture_is_not_drawn_into_a_folder_to_train_on_nor_over_another(tmp_path):
    adapter = tmp_path / "adapter"
    mine = fill(tmp_path / "mine", "a.png")
    with pytest.raises(ConfigError, match=r"mine looks like a folder to train on: it holds a.png"):
        generate(adapter, ["a person"], out=mine)
    with pytest.raises(ConfigError, match="looks like a folder to train on"):
        generate(adapter, ["a person"], out=mine, overwrite=True)
    say(mine, "a.txt")
    with pytest.raises(ConfigError, match="looks like a folder to train on"):
        generate(adapter, ["a person"], out=mine / "new.png")
    old = write_png(drawn(1), tmp_path / "drawn" / "00-a-person-0.png")
    with pytest.raises(ConfigError, match=r"00-a-person-0.png is there already.*--overwrite"):
        generate(adapter, ["a person"], out=tmp_path / "drawn")
    with pytest.raises(ConfigError, match=r"00-a-person-0.png is there already"):
        generate(adapter, ["a person"], out=old)
    assert old.read_bytes() == write_png(drawn(1), tmp_path / "again.png").read_bytes()
    assert holds_training_data(tmp_path / "drawn") == holds_training_data(tmp_path / "none") == ""
    assert holds_training_data(rows(tmp_path / "t", {}), whole=False) == "it holds metadata.jsonl"


# ---- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("metadata.csv", 'file_name,text\np0.png,"one, two"\np1.png,"three, four"\n'),
    ("metadata.csv", "file_name;text\np0.png;one, two\np1.png;three, four\n"),
    ("metadata.tsv", "file_name\ttext\np0.png\tone, two\np1.png\tthree, four\n"),
    ("Metadata.CSV", '\ufefffile_name,text\r\np0.png,"one, two"\r\np1.png,"three, four"\r\n'),
    ("metadata.csv", "file_name|text\np0.png|one, two\np1.png|three, four\n"),
])  # fmt: skip
def test_tables_of_every_dialect(tmp_path, name, content):
    (fill(tmp_path, "p0.png", "p1.png") / name).write_text(content)
    assert read_folder(tmp_path).captions == ["one, two", "three, four"]


@pytest.mark.parametrize("content", [
    "file_name,text\np0.png,a portrait, smiling, in a red hoodie\n",
    "text,file_name\na portrait, smiling,p0.png\n",
    "file_name;text\np0.png;a portrait; smiling\n",
])  # fmt: skip
def test_unquoted_separators_in_captions_are_an_error_with_its_place(tmp_path, content):
    (fill(tmp_path, "p0.png") / "metadata.csv").write_text(content)
    with pytest.raises(DataError, match=r"metadata.csv row 1.*Put quotes around"):
        read_folder(tmp_path)


@pytest.mark.parametrize("below", ["train", "data/train", "2023"])
def test_tables_below_the_folder_are_used(tmp_path, below):
    rows(
        fill(tmp_path / below, "p0.png", "p1.png"), *({"file_name": f"p{n}.png", "text": f"person {n}"} for n in (0, 1))
    )
    assert read_folder(tmp_path).captions == ["person 0", "person 1"]


def test_a_picture_outside_every_table_keeps_its_own_caption(tmp_path):
    say(fill(tmp_path, "loose.png"), "loose.txt", text="loose one")
    rows(fill(tmp_path / "part", "p0.png", "p1.png", start=2), {"file_name": "p0.png", "text": "person"})
    found = read_folder(tmp_path)
    assert found.captions == ["loose one", "person"]
    assert "1 picture not named in the metadata and left out: part/p1.png." in found.warnings


def test_two_tables_in_one_folder_are_named(tmp_path):
    rows(fill(tmp_path, "p0.png"), {"file_name": "p0.png", "text": "from jsonl"})
    (tmp_path / "metadata.csv").write_text("file_name,text\np0.png,from csv\n")
    found = read_folder(tmp_path)
    assert found.captions == ["from jsonl"]
    assert found.warnings == ("1 table beside another table and not read: metadata.csv.",)


@pytest.mark.parametrize("values, message", [
    ([{"text": "x"}, {"file_name": "p1.png", "text": "y"}], "1 row that names no picture in the column 'file_name': metadata.jsonl row 1"),
    ([{"file_name": None, "text": "x"}], "1 row that names no picture in the column 'file_name'"),
    ([{"file_name": ["p0.png"], "text": "x"}], "names no picture in the column 'file_name'"),
    ([{"file_name": "p0.png", "text": ["a", "b"]}], "1 row whose 'text' is no text: metadata.jsonl row 1.* a list"),
    ([{"file_name": "p0.png", "text": "['a', 'b']"}], "1 row whose 'text' is no text.*a list written as text"),
    ([{"file_name": "p0.png", "text": {"en": "a"}}], "no text.* a dict"),
    ([{"file_name": "p0.png", "text": 7}], "no text.* a int"),
    ([{"file_name": "p0.png", "text": "x"}, {"file_name": "p0.png", "text": "y"}], "row 1 and metadata.jsonl row 2 both describe p0.png"),
    ([{"file_name": "./p0.png", "text": "x"}, {"file_name": "p0.png", "text": "y"}], "both describe p0.png"),
    ([{"file_name": "../other.png", "text": "x"}], r"row 1 names '../other.png' in the column 'file_name', which lies outside"),
    ([{"file_name": "/etc/hostname", "text": "x"}], "lies outside"),
    ([{"file_name": "a" * 5000 + ".png", "text": "x"}], r"row 1 names 'a+'\.\.\. in the column 'file_name', too long"),
    ([{"file_name": ".", "text": "x"}], r"not in the folder: \. \(metadata.jsonl row 1\)"),
    ([{"file_name": "p0.png\0", "text": "x"}], r"not in the folder: .* Did you mean 'p0.png'"),
    ([{"file_name": "p0.png", "text": "x", "control_file_name": "../c.png"}], "'control_file_name', which lies outside"),
    ([{"file_name": "P0.PNG", "text": "x"}], r"not in the folder: P0.PNG \(metadata.jsonl row 1\)"),
    ([{"file_name": "p0", "text": "x"}], r"not in the folder: p0 .* Did you mean 'p0.png'"),
    ([{"file_name": "p0.heic", "text": "x"}], "that no picture reader knows by its ending: p0.heic. .heic needs pillow-heif"),
    ([{"file_name": "p0.png", "caption": "x", "prompt": "y"}], "no column 'text', and caption and prompt both may be it"),
    ([{"file_name": "p0.png", "text": None}, {"file_name": "p1.png", "text": "y"}], "1 picture without a caption: p0.png"),
])  # fmt: skip
def test_mistakes_in_tables_are_errors_with_row_and_column(tmp_path, values, message):
    fill(tmp_path, "p0.png", "p1.png")
    (tmp_path / "p0.heic").write_bytes(b"x")
    fill(tmp_path.parent, f"{tmp_path.name} other.png")
    with pytest.raises(DataError, match=message):
        read_folder(rows(tmp_path, *values))


def test_what_can_be_understood_in_a_table_is(tmp_path):
    fill(tmp_path, "p0.png", "p1.png", "sub/p2.png")
    rows(
        tmp_path,
        {"file_name": f"../{tmp_path.name}/p0.png", "caption": "zero"},
        {"file_name": str(tmp_path / "p1.png"), "caption": "one"},
        {"file_name": "sub\\p2.png", "caption": "two"},
        {"file_name": "p0.png", "caption": "zero"},
    )
    found = read_folder(tmp_path)
    assert found.captions == ["zero", "one", "two"]
    assert "metadata.jsonl: 'caption' is read as the captions, as there is no column 'text'." in found.warnings
    assert (
        "1 row of metadata.jsonl whose picture has a row already; each counts once: metadata.jsonl row 4."
        in found.warnings
    )
    rows(tmp_path, {"file_name": "p0.png", "text": None}, {"file_name": "p1.png", "text": "one"})
    found = read_folder(tmp_path, "a person")
    assert found.captions == ["a person", "one"]
    assert "1 picture captioned 'a person', the prompt for all: p0.png." in found.warnings


def test_labels_keep_the_same_rules(tmp_path):
    names = [f"{number}.png" for number in range(12)]
    fill(tmp_path, *names)
    table = [{"file_name": name, "label": str(number % 2)} for number, name in enumerate(names)]
    rows(tmp_path, *table, {"file_name": "0.png", "label": "0"})
    found = read_pictures(tmp_path, "label", 16, 0.1)
    assert sum(
        map(len, found.splits.values())
    ) == 12 and "1 row of metadata.jsonl whose picture has a row already" in text(found)
    for row, message in (
        ({"file_name": "0.png", "label": "1"}, "row 1 and metadata.jsonl row 13 give 0.png two labels, '0' and '1'"),
        ({"label": "1"}, "1 row that names no picture in the column 'file_name': metadata.jsonl row 13"),
        (
            {"file_name": "../x.png", "label": "1"},
            "row 13 names '../x.png' in the column 'file_name', which lies outside",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_pictures(rows(tmp_path, *table, row), "label", 16, 0.1)


# ---- what a picture loses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, share", [((4000, 40), "1%"), ((40, 400), "10%"), ((100, 40), "40%")])
def test_a_picture_that_loses_most_of_itself_is_named(tmp_path, size, share):
    fill(tmp_path, "a.png")
    drawn(3, size).save(tmp_path / "strip.png")
    said = f"strip.png ({size[0]}x{size[1]}, {share} is kept)"
    assert said in text(read_folder(tmp_path, "a person"))
    for label in ("a", "b"):
        fill(tmp_path / "classes" / label, *(f"{number}.png" for number in range(4)), start=ord(label))
    drawn(3, size).save(tmp_path / "classes" / "a" / "strip.png")
    assert said in text(read_pictures(tmp_path / "classes", "label", 16, 0.1))
    drawn(1, (75, 40)).save(tmp_path / "strip.png")
    assert "1 picture that loses most" in text(read_folder(tmp_path, "a person"))  # the one of the class


def test_pictures_with_nothing_to_see_are_named(tmp_path):
    fill(tmp_path, "a.png")
    clear = drawn(1, mode="RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (40, 40), "black").save(tmp_path / "black.png")
    found = read_folder(tmp_path, "a person")
    assert names(found) == ["a.png", "black.png"]
    assert "1 picture transparent throughout and left out: clear.png." in found.warnings
    assert "1 picture with nothing to see: one colour throughout: black.png." in found.warnings
    (tmp_path / "a.png").unlink(), (tmp_path / "black.png").unlink()
    with pytest.raises(DataError, match=r"holds no picture with anything to see.*clear.png"):
        read_folder(tmp_path, "a person")


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_a_closed_folder_is_named(tmp_path):
    fill(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    try:
        assert "1 folder cannot be opened" in text(read_folder(tmp_path, "a person"))
    finally:
        (tmp_path / "closed").chmod(0o755)
