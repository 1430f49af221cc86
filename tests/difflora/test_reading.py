"""What the shipped generator says of photos: words and how sure, what it refuses, where it looks, and one person or two."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from smidgen.bases.embedded import pose, wide, world
from smidgen.cli import main
from smidgen.difflora.generator.generator import SHIPPED, load_generator
from smidgen.difflora.generator.reading import (
    FILE,
    Framing,
    Reader,
    Seen,
    _other_shade,
    load_reader,
    save_reader,
    tempered,
)
from smidgen.difflora.use import commands
from smidgen.difflora.use.calibration import calibrate, floor_of
from smidgen.difflora.use.folders import people_in, photos_in, read_recipe
from smidgen.difflora.use.sampler import Output, Sheet
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import make_subjects
from smidgen.errors import DataError

PLAIN = Sheet(sheet=False)
ANN = world.Identity("bob", "purple", "pale", "none")
BOB = world.Identity("short flat", "black", "dark", "full beard")
SCENE = world.Scene("open", "smile", "hoodie", "red", "none", "teal")
OTHER = world.Scene("wide", "frown", "blazer", "blue", "round", "lavender")


@pytest.fixture(scope="module")
def generator():
    return load_generator()


@pytest.fixture(scope="module")
def reader(generator) -> Reader:
    found = load_reader(SHIPPED, generator)
    assert found is not None
    return found


@pytest.fixture
def photo(tmp_path):
    def write(image: Image.Image, name: str = "ann.png") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        return path

    return write


def test_it_says_what_it_read_and_how_surely(photo, tmp_path, capsys):
    path = photo(world.render(ANN, SCENE))
    assert main(["predict", str(path), "--out", str(tmp_path / "out"), "--no-sheet"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith(f"{path}: hair "))
    assert all(word in line for word in ("hair bob", "hair color purple", "skin pale", "facial hair none"))
    told = read_recipe(tmp_path / "out")["read"][0]["words"]
    assert told["hair"][0] == "bob" and 0.5 < told["hair"][1] <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: world.render(ANN, SCENE).convert("L"), "no photo that it learnt from|No face was found"),
        (lambda: wide.render(wide.Identity(**ANN.as_dict()), wide.Scene(**SCENE.as_dict(), hat="turban", hat_color="green")), "at the top"),
        (lambda: wide.lit(world.render(ANN, SCENE), "warm"), "no photo that it learnt from"),
        (lambda: Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)), "No face was found"),
        (lambda: wide.render(wide.Identity(**(ANN.as_dict() | {"skin": "#20e040"})), wide.Scene(**SCENE.as_dict())), "such colours"),
    ],
    ids=["grey", "hat", "warm light", "noise", "green skin"],
)  # fmt: skip
def test_what_it_cannot_read_is_refused(photo, tmp_path, change, reason):
    path = photo(change())
    with pytest.raises(DataError, match=reason) as refused:
        commands.predict([path], Output(tmp_path / "out", sheet=PLAIN))
    assert "(64 x 64 pixels)" in str(refused.value)
    assert ("--unchecked" in str(refused.value)) == ("No face" not in str(refused.value))  # which nothing goes on from
    assert not (tmp_path / "out").exists()


def test_unchecked_goes_on_and_says_so(photo, tmp_path):
    path = photo(wide.lit(world.render(ANN, SCENE), "warm"))
    result = commands.predict([path], Output(tmp_path / "out", sheet=PLAIN, unchecked=True))
    assert any(note.startswith("Unchecked: ") for note in result.notes) and (tmp_path / "out" / "recipe.json").is_file()


@pytest.mark.parametrize("where", [pose.Pose(size=0.96), pose.Pose(size=1.5), pose.Pose(right=10)], ids=str)
def test_another_framing_is_found(generator, reader, where):
    seen = reader.look(generator, pose.Portrait(ANN, SCENE, where).picture())
    assert seen.framing != Framing() and {n: w for n, (w, _) in seen.words.items()} == ANN.as_dict()
    assert "times as large" in str(seen.framing)


def test_a_framing_of_nothing_is_the_photo_itself():
    image = world.render(ANN, SCENE)
    assert Framing().of(image) is image
    zoomed = numpy.asarray(Framing(zoom=2.0).of(image), float)
    middle = numpy.asarray(image.crop((16, 16, 48, 48)).resize((64, 64), Image.Resampling.BICUBIC), float)
    assert numpy.abs(zoomed - middle)[4:-4, 4:-4].mean() < 2
    assert Framing(right=-0.4).of(image).getpixel((0, 32)) == image.getpixel((0, 32))  # the edge goes on


def test_two_people_given_as_one_are_noticed(photo, tmp_path):
    ann, bob, again = (
        photo(world.render(ANN, SCENE)),
        photo(world.render(BOB, OTHER), "b.png"),
        photo(world.render(ANN, OTHER), "c.png"),
    )
    commands.predict([ann, again], Output(tmp_path / "one", sheet=PLAIN))
    with pytest.raises(DataError, match=r"different people \(hair bob and short flat.*--each"):
        commands.predict([ann, bob], Output(tmp_path / "two", sheet=PLAIN))


def test_each_photo_and_each_folder_is_a_person(photo, tmp_path, capsys):
    photo(world.render(ANN, SCENE), "people/ann.png")
    (tmp_path / "people" / "bob").mkdir()
    for number, scene in enumerate((SCENE, OTHER)):
        photo(world.render(BOB, scene), f"people/bob/{number}.png")
    photo(world.render(ANN, SCENE).convert("L"), "people/grey.png")
    given = [str(tmp_path / "people" / name) for name in ("ann.png", "bob", "grey.png")]
    assert main(["predict", *given, "--each", "--out", str(tmp_path / "out"), "--no-sheet"]) == 2
    told = capsys.readouterr()
    assert "grey is left out: " in told.out and "1 of those people could not be read" in told.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ann", "bob"]
    assert len(read_recipe(tmp_path / "out" / "bob")["photos"]) == 2
    with pytest.raises(DataError, match="Nobody could be read"):
        commands.predict([Path(given[2])], Output(tmp_path / "none", sheet=PLAIN), each=True)


def test_folders_of_photos(photo, tmp_path):
    photo(world.render(ANN, SCENE), "people/ann.png")
    (tmp_path / "many" / "ann").mkdir(parents=True)
    (tmp_path / "many" / "bob").mkdir()
    for name in ("ann", "bob"):
        photo(world.render(ANN, SCENE), f"many/{name}/1.png")
    assert photos_in([tmp_path / "people"]) == [tmp_path / "people" / "ann.png"]
    with pytest.raises(DataError, match="--each"):
        photos_in([tmp_path / "many"])
    assert list(people_in([tmp_path / "many"])) == ["ann", "bob"]
    with pytest.raises(DataError, match="Two people are called 'ann'"):
        people_in([tmp_path / "many", tmp_path / "people" / "ann.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no photo"):
        photos_in([tmp_path / "empty"])


def test_a_word_below_its_floor_is_said(generator, reader):
    seen = reader.look(generator, world.render(ANN, SCENE))
    strict = replace(reader, words={name: replace(word, floor=1.1) for name, word in reader.words.items()})
    assert any(said.startswith("hair bob (") and "below 1.10" in said for said in strict.unsure(seen))
    sure = seen.words["hair"][1]
    nearly = replace(reader, words={name: replace(word, floor=sure + 4e-4) for name, word in reader.words.items()})
    said = next(said for said in nearly.unsure(seen) if said.startswith("hair "))
    assert f"({sure:.2f}, below {sure:.2f})" not in said


def test_a_floor_is_where_the_wrong_ones_end():
    sure, right = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, True, False, True])
    assert floor_of(sure, right) == pytest.approx(0.8)
    assert floor_of(sure, ~right) == 1.0
    assert tempered(torch.tensor([0.9, 0.1]), 100.0)[0] == pytest.approx(0.5, abs=0.01)


def test_the_file_belongs_to_one_generator(generator, reader, tmp_path):
    save_reader(reader, tmp_path, generator)
    again = load_reader(tmp_path, generator)
    assert again.limits == reader.limits and again.words == reader.words and torch.equal(again.whiten, reader.whiten)
    other = load_generator()
    other.__dict__["digest"] = "0" * 64
    with pytest.raises(DataError, match="another generator"):
        load_reader(tmp_path, other)
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(DataError, match="damaged"):
        load_reader(tmp_path, generator)
    assert load_reader(tmp_path / "none", generator) is None


def test_limits_need_people_who_are_held_out(generator, tmp_path):
    make_subjects(tmp_path, Subjects(people=2, held_out=1, pictures=1, same_scenes=False))
    with pytest.raises(DataError, match=r"holds out 1 people, and limits need 20"):
        calibrate(generator, 64, tmp_path, progress=False)
    with pytest.raises(DataError, match="has no subjects"):
        calibrate(generator, 64, tmp_path / "none", progress=False)


@pytest.mark.slow
def test_calibration(generator, reader, tmp_path):
    make_subjects(tmp_path, Subjects(people=150, held_out=20, pictures=2, same_scenes=False))
    found = calibrate(generator, 64, tmp_path, progress=False)
    assert set(found.words) == set(reader.words)
    person = world.render(ANN, SCENE)
    assert not found.refusal(found.look(generator, person))
    assert found.refusal(found.look(generator, person.convert("L").convert("RGB")))


def test_free_colours_are_told_with_how_far_off_they_may_be_kept_and_compared(reader, generator, tmp_path):
    image = Image.new("RGB", (64, 64))
    one = Seen(image, Framing(), 1.0, 1.0, "", {"hair": ("bob", 0.9)}, {"skin": ("#8f5b3e", 2.0)})
    assert one.told == ["hair bob 0.90", "skin #8f5b3e ± 2"]
    assert one.facts["words"] == {"hair": ["bob", 0.9], "skin": ["#8f5b3e", 2.0]}
    assert any("skin" in said for said in reader.unsure(replace(one, words={}, shades={"skin": ("#8f5b3e", 40.0)})))
    assert _other_shade(("#8f5b3e", 2.0), ("#3f6fd8", 2.0))
    assert not _other_shade(("#8f5b3e", 2.0), ("#905c3f", 2.0))
    assert not _other_shade(("#8f5b3e", 2.0), ("#3f6fd8", 40.0))  # which was not seen
    save_reader(replace(reader, shades={"skin": 1.5}), tmp_path, generator)
    assert load_reader(tmp_path, generator).shades == {"skin": 1.5}
