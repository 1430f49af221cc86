"""predict, edit, blend, sample and invert, with a generator that was trained for a moment through the command line."""

import hashlib
import json
import signal
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from damage import rewrite
from PIL import Image
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.checkpoint.files import LORA_NAME, is_recipe
from smidgen.bases.embedded import world
from smidgen.bases.families import load_base
from smidgen.cli import main
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.directions import Space, fit_space, load_directions, parse_sliders, save_directions
from smidgen.difflora.generator.generator import load_generator
from smidgen.difflora.use import commands
from smidgen.difflora.use.commands import parse_seeds
from smidgen.difflora.use.folders import read_recipe
from smidgen.difflora.use.refine import Refine
from smidgen.difflora.use.sampler import Output, Sheet
from smidgen.difflora.use.sliders import calibrate
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.errors import BaseLockError, ConfigError, DataError
from smidgen.tasks.diffusion.gallery import answer

PLAIN = Sheet(sheet=False)
QUICK = ["--num-prompts", "1", "--inference-steps", "1"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generator") / "debug"
    words = [
        "generator",
        "train",
        "--preset",
        "debug",
        "--end-to-end.people.people",
        "12",
        "--end-to-end.train.max-train-steps",
        "6",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    """One photo each of three held-out people."""
    folder, found = tmp_path_factory.mktemp("photos"), []
    for number in range(3):
        rng = numpy.random.default_rng(number)
        identity = world.sample_identity(rng, "test")
        found.append(folder / f"{number}.png")
        world.render(identity, world.sample_scene(rng)).save(found[-1])
    return found


@pytest.fixture(scope="session")
def predicted(trained, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("predicted") / "ann"
    commands.predict([photos[0]], Output(out, trained, sheet=PLAIN))
    return out


@pytest.fixture(scope="session")
def embedded():
    return load_base("embedded")


@pytest.fixture(scope="session")
def space(trained) -> Space:
    assert main(["generator", "directions", str(trained), "--people", str(trained / "people"), "--no-calibrate"]) == 0
    return load_directions(trained, load_generator(trained))


@pytest.fixture(scope="session")
def sliders(space) -> list:
    return list(space.directions)


def _rank(folder: Path) -> int:
    return int(json.loads((folder / "adapter_config.json").read_text())["r"])


def work(out: Path, trained: Path, **options) -> Output:
    return Output(out, trained, sheet=PLAIN, **options)


# ---- an ordinary adapter folder -----------------------------------------------------------------------------------


def test_predict_writes_what_it_says(trained, photos, tmp_path, capsys):
    out = tmp_path / "ann"
    assert main(["predict", str(photos[0]), "--out", str(out), "--generator", str(trained), *QUICK]) == 0
    said = capsys.readouterr().out
    size = sum((out / name).stat().st_size for name in ("adapter_config.json", WEIGHTS))
    assert f"{out}: {size:,} bytes" in said
    assert all(f"{part} " in said for part in ("loading", "prediction", "drawing", "writing"))
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", WEIGHTS, LORA_NAME, "recipe.json", "README.md", "contact_sheet.png"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["ann"]
    recipe, generator = json.loads((out / "recipe.json").read_text()), load_generator(trained)
    assert recipe["generator"] == generator.digest and recipe["photos"] == [
        hashlib.sha256(photos[0].read_bytes()).hexdigest()
    ]
    assert recipe["seed"] == 0 and recipe["base"] == "embedded" and len(recipe["latent"]) == 8
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 128  # photo, base, adapter


def test_its_numbers_are_the_generators(trained, photos, predicted):
    generator = load_generator(trained)
    image = Image.open(photos[0]).convert("RGB")
    row = generator.predict([image])[0]
    tensors = load_file(predicted / LORA_NAME)
    for a, b in generator.layout.factor_pairs():
        assert torch.equal(tensors[f"unet.{a.key}.lora_A.weight"], row[a.columns].reshape(a.shape))
        assert torch.equal(tensors[f"unet.{b.key}.lora_B.weight"], row[b.columns].reshape(b.shape))


def test_smidgen_peft_and_diffusers_read_the_same_adapter(predicted):
    import peft

    def answers(put) -> torch.Tensor:
        base = load_base("embedded")
        put(base)
        with torch.no_grad():
            return answer(base, base.encode_prompts(["a portrait of a person"]), 64)

    def by_peft(base) -> None:
        model = peft.PeftModel.from_pretrained(base.model, str(predicted))
        assert type(model.base_model) is peft.LoraModel  # peft's own, which needs no smidgen

    plain = answers(lambda base: None)
    ours = answers(lambda base: smidgen.load(base.model, predicted))
    assert (ours - plain).norm() > 1e-4 * plain.norm()
    assert torch.allclose(answers(by_peft), ours, atol=1e-6)
    theirs = answers(lambda base: base.pipe.load_lora_weights(str(predicted), weight_name=LORA_NAME))
    assert torch.allclose(theirs, ours, atol=1e-5)
    merged = answers(lambda base: smidgen.merge(smidgen.load(base.model, predicted)))
    assert torch.allclose(merged, ours, atol=1e-4)


def test_it_can_be_trained_further(predicted, embedded):
    base = load_base("embedded")
    smidgen.load(base.model, predicted)
    answer(base, base.encode_prompts(["a portrait of a person"]), 64).square().mean().backward()
    trained = [p for p in base.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_verify_and_generate_take_it(predicted, tmp_path):
    assert main(["verify", str(predicted)]) == 0
    out = str(tmp_path / "a.png")
    assert main(["generate", str(predicted), "--prompt", "a portrait of a person", "--steps", "1", "--out", out]) == 0


# ---- seeds --------------------------------------------------------------------------------------------------------


def test_seeds_give_seeds(trained, photos, predicted, tmp_path):
    many = tmp_path / "many"
    commands.predict([photos[0]], work(many, trained), seeds=(0, 3), steps=4)
    commands.predict([photos[0]], work(tmp_path / "three", trained), seeds=(3,), steps=4)
    assert sorted(path.name for path in many.iterdir()) == ["seed-0", "seed-3"]
    weights = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in ("many/seed-0", "many/seed-3", "three")}
    assert weights["many/seed-3"] == weights["three"] != weights["many/seed-0"]


def test_the_same_command_writes_the_same_adapter(trained, photos, predicted, tmp_path):
    commands.predict([photos[0]], work(tmp_path / "again", trained))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (predicted / WEIGHTS).read_bytes()


def test_seeds_in_words():
    assert parse_seeds("0..7") == tuple(range(8)) and parse_seeds("0,3,5") == (0, 3, 5)
    for text in ("", "a", "3..1", "1,1", "-1", "0..5000"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


# ---- photos -------------------------------------------------------------------------------------------------------


def test_a_turned_transparent_or_large_photo_is_the_same_person(trained, photos, predicted, tmp_path):
    image = Image.open(photos[0]).convert("RGB")
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    for name in ("turned", "alpha"):
        commands.predict([tmp_path / f"{name}.png"], work(tmp_path / name, trained))
        assert (tmp_path / name / WEIGHTS).read_bytes() == (predicted / WEIGHTS).read_bytes()
    image.resize((700, 700), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    commands.predict([tmp_path / "large.png"], work(tmp_path / "large", trained))
    small, large = (torch.tensor(read_recipe(folder)["latent"]) for folder in (predicted, tmp_path / "large"))
    assert (large - small).norm() < 0.1 * small.norm()


def bomb(path: Path) -> None:
    """A PNG that says it is 40,000 pixels on a side."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))


@pytest.mark.parametrize(
    ("name", "message"),
    [("1.png", r"1.png does not exist\. Did you mean '0.png'"), ("folder", "is a folder that holds no photo"),
     ("text.png", "cannot be read as a photo"), ("cut.png", "cannot be read as a photo"), ("bomb.png", "bomb.png cannot be read"),
     ("large.png", "more than 100 million pixels"), ("dot.png", "smaller than 16 pixels"),
     ("plain.png", r"plain.png \(64 x 64 pixels\) shows nobody: it is of one colour"),
    ("wall.png", r"No face was found in .*wall.png \(640 x 480 pixels\); give a portrait drawn as the embedded base draws")],
)  # fmt: skip
def test_photos_that_are_none(trained, photos, tmp_path, name, message, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "0.png").write_bytes(photos[0].read_bytes())
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(photos[0].read_bytes()[:300])
    bomb(folder / "bomb.png")
    Image.new("L", (12_000, 9_000)).save(folder / "large.png")
    Image.new("RGB", (8, 8)).save(folder / "dot.png")
    Image.new("RGB", (64, 64), "teal").save(folder / "plain.png")
    wall = Image.new("RGB", (640, 480), "teal")
    wall.paste((90, 40, 40), (0, 0, 320, 480))
    wall.save(folder / "wall.png")
    out = tmp_path / "some" / "where"
    with pytest.raises(DataError, match=message):
        commands.predict([photos[1], folder / name], work(out, trained))
    with pytest.raises(DataError, match=message):
        commands.invert_photos([photos[1], folder / name], work(out, trained))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_no_photo_at_all(trained, tmp_path, capsys):
    assert main(["predict", "--out", str(tmp_path / "a"), "--generator", str(trained)]) == 2
    assert "at least one photo" in capsys.readouterr().err


# ---- other things that are wrong ----------------------------------------------------------------------------------


def test_files_are_not_overwritten_unasked(trained, photos, tmp_path, predicted):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    (out / WEIGHTS).write_text("old")
    with pytest.raises(DataError, match="--overwrite"):
        commands.predict([photos[0]], work(out, trained))
    assert (out / WEIGHTS).read_text() == "old"
    commands.predict([photos[0]], work(out, trained, overwrite=True))
    assert (out / WEIGHTS).read_bytes() == (predicted / WEIGHTS).read_bytes()
    assert (out / "notes.txt").read_text() == "keep me"
    with pytest.raises(DataError, match="is a file"):
        commands.predict([photos[0]], work(out / "notes.txt", trained))


def test_another_base_is_refused(trained, photos, tmp_path, base):
    with pytest.raises(BaseLockError, match="another base"):
        commands.predict([photos[0]], work(tmp_path / "a", trained, base=str(base)))
    assert not (tmp_path / "a").exists()


def test_no_generator(photos, tmp_path, capsys):
    words = ["predict", str(photos[0]), "--out", str(tmp_path / "a"), "--generator", str(tmp_path / "none")]
    assert main(words) == 2
    assert "holds no generator" in capsys.readouterr().err and not (tmp_path / "a").exists()


# ---- refinement ---------------------------------------------------------------------------------------------------


def test_a_refined_prediction_is_an_adapter_too(trained, photos, tmp_path, predicted, embedded):
    out = tmp_path / "ann"
    assert (
        main(["predict", str(photos[0]), "--out", str(out), "--generator", str(trained), "--refine", "2", "--no-sheet"])
        == 0
    )
    recipe = read_recipe(out)
    assert recipe["refine"]["steps"] == 2 and recipe["latent"] == read_recipe(predicted)["latent"]
    assert recipe["captions"][0].startswith("a portrait of a person")
    assert _rank(out) == _rank(predicted) + 1
    base = load_base("embedded")
    smidgen.load(base.model, out)
    assert smidgen.verify(base.model, out).ok
    commands.predict([photos[0]], work(tmp_path / "kept", trained), refine=Refine(steps=2, keep_rank=True))
    assert _rank(tmp_path / "kept") == _rank(predicted)
    commands.predict([photos[0]], work(tmp_path / "zero", trained), refine=Refine(steps=0))
    assert (tmp_path / "zero" / WEIGHTS).read_bytes() == (predicted / WEIGHTS).read_bytes()


def test_a_generator_of_vectors(photos, tmp_path):
    """SVFit: no factors, so no file for diffusers and no extra rank."""
    trained, out = tmp_path / "svfit", tmp_path / "ann"
    words = ["generator", "train", "--preset", "debug", "--adapter.method", "svfit", "--adapter.rank", "8"]
    assert main([*words, "--end-to-end.train.max-train-steps", "1", "--out", str(trained)]) == 0
    commands.predict([photos[0]], work(out, trained), refine=Refine(steps=1))
    assert not (out / LORA_NAME).exists()
    assert _rank(out) == 8
    base = load_base("embedded")
    smidgen.load(base.model, out)
    assert smidgen.verify(base.model, out).ok


# ---- edit ---------------------------------------------------------------------------------------------------------


def test_directions_leave_other_attributes_alone():
    """Two attributes that go together in people: each direction is its own effect, not the other's."""
    rng = torch.Generator().manual_seed(0)
    first = torch.rand(400, generator=rng) < 0.5
    second = torch.where(torch.rand(400, generator=rng) < 0.8, first, ~first)
    latents = torch.stack([first.float(), second.float()], 1) + 0.01 * torch.randn(400, 2, generator=rng)
    people = [{"hat": "yes" if a else "no", "scarf": "yes" if b else "no"} for a, b in zip(first, second, strict=True)]
    space = fit_space(latents, people)
    found = {d.name: d.vector for d in space.directions}
    assert torch.allclose(found["hat=yes"], torch.tensor([0.5, 0.0]), atol=0.01)
    assert torch.allclose(found["scarf=no"], torch.tensor([0.0, -0.5]), atol=0.01)
    somebody = torch.tensor([0.0, 1.0])  # no hat, a scarf
    assert torch.allclose(space.toward(somebody, "hat=yes"), torch.tensor([1.0, 0.0]), atol=0.02)
    assert torch.allclose(space.toward(somebody, "hat=no"), torch.tensor([-0.5, 0.0]), atol=0.02)
    with pytest.raises(DataError, match="No attribute tells"):
        fit_space(latents, [{"hat": "yes"}] * 400)


def test_an_edit_of_nothing_changes_nothing(trained, sliders, photos, predicted, tmp_path):
    name = sliders[0].name
    for number, source in enumerate((photos[0], predicted)):
        out = tmp_path / str(number)
        commands.edit([source], work(out, trained), {name: 0.0})
        assert (out / WEIGHTS).read_bytes() == (predicted / WEIGHTS).read_bytes()


def test_an_edit_moves_the_latent_along_its_direction(trained, space, sliders, predicted, tmp_path):
    slider, out = sliders[0], tmp_path / "edited"
    words = ["edit", str(predicted), "--set", f"{slider.name}:0.5", "--set", f"{sliders[1].name}:-1", "--out", str(out)]
    assert main([*words, "--generator", str(trained), *QUICK]) == 0
    before, after = (torch.tensor(read_recipe(folder)["latent"]) for folder in (predicted, out))
    way = 0.5 * space.toward(before, slider.name) - space.toward(before, sliders[1].name)
    assert way.norm() > 0.1 and torch.allclose(after, space.moved(before, way), atol=1e-5)
    assert read_recipe(out)["set"] == {slider.name: 0.5, sliders[1].name: -1.0}
    assert (out / "contact_sheet.png").is_file()


def test_sliders_that_are_none(trained, space, sliders, predicted, tmp_path):
    with pytest.raises(ConfigError, match=r"no attribute 'hairs'\. Did you mean 'hair"):
        space.edited(torch.zeros(8), {"hairs=long": 1.0})
    name = sliders[0].name
    with pytest.raises(ConfigError, match=f"There is no slider '{name}x'. Did you mean"):
        space.edited(torch.zeros(8), {name + "x": 1.0})
    assert parse_sliders(["skin=dark:1.5", "hair=long parted"]) == {"skin=dark": 1.5, "hair=long parted": 1.0}
    for text in ("skin", "skin=:1", "skin=dark:much", "skin=dark:nan"):
        with pytest.raises(ConfigError, match="ATTRIBUTE=WORD:NUMBER"):
            parse_sliders([text])
    with pytest.raises(ConfigError, match="Which sliders"):
        commands.edit([predicted], work(tmp_path / "a", trained), {})


def test_directions_belong_to_one_generator(trained, sliders, tmp_path):
    generator = load_generator(trained)
    with pytest.raises(DataError, match=r"has no directions\.safetensors"):
        load_directions(tmp_path, generator)
    space = load_directions(trained, generator)
    path = save_directions(space, tmp_path, generator)
    again = load_directions(tmp_path, generator)
    assert [d.name for d in again.directions] == [d.name for d in sliders]
    assert torch.equal(again.directions[0].vector, sliders[0].vector) and torch.equal(again.spread, space.spread)
    with torch.no_grad():
        generator.network.nobody += 1.0
    del generator.digest
    with pytest.raises(DataError, match="another generator"):
        load_directions(tmp_path, generator)
    rewrite(path, path.read_bytes()[:40])
    with pytest.raises(DataError, match="damaged"):
        load_directions(tmp_path, generator)


def test_an_edit_stays_among_people(space, sliders):
    """A slider far out is drawn back to where the farthest of the training people are; whoever is farther out stays there."""
    name = sliders[0].name
    near = space.edited(space.mean, {name: 0.01})
    assert torch.allclose(near - space.mean, 0.01 * space.toward(space.mean, name), atol=1e-6)
    far = space.edited(space.mean, {name: 1000.0})
    assert space.radius(far) == pytest.approx(space.reach, rel=1e-3)
    assert torch.cosine_similarity(far - space.mean, space.toward(space.mean, name), dim=0) > 0.9999
    outside = space.mean + 10 * (far - space.mean)
    back = -0.5 * space.toward(outside, name)
    assert torch.equal(space.edited(outside, {name: -0.5}), outside + back)
    assert space.radius(space.edited(outside, {name: 3.0})) == pytest.approx(float(space.radius(outside)), rel=1e-3)


def test_calibration_takes_the_least_length_at_which_the_word_is_read(trained, sliders, monkeypatch):
    """Pictures are stood in for by the latents themselves; the reader sees the word from a length of 1.5 on."""
    generator = load_generator(trained)
    people = [person.attributes for person in read_subjects(trained / "people")]
    direction = sliders[0]
    latents = torch.zeros(len(people), 8)
    latents[[own[direction.attribute] == direction.word for own in people]] = 5 * direction.vector

    class Reader:
        def read(self, pictures):
            along = torch.stack(pictures) @ direction.vector / direction.vector.square().sum()
            sure = (along >= 1.49).float()
            words = {direction.word: sure, "else": 1 - sure}
            return {direction.attribute: words, "other": {"x": sure * 0 + 1, "y": sure * 0}}

    class Table:
        base = load_base("embedded")

        def draw(self, rows, scenes):
            return [[row] for row in rows]

    generator.__dict__["face"] = Reader()
    monkeypatch.setattr(generator, "rows", lambda latents: latents)
    alone = Space((direction,), torch.zeros(8), torch.eye(8), 1e9, torch.zeros(8, 1), torch.zeros(1))
    found = calibrate(generator, Table(), alone, latents, people, progress=False).directions[0]
    assert found.length == 1.5 and torch.equal(found.vector, direction.vector)
    assert (found.before, found.read, found.own, found.kept) == (0.0, 1.0, 1.0, 1.0)


# ---- blend, sample, invert ----------------------------------------------------------------------------------------


def test_a_blend_ends_at_its_ends(trained, photos, predicted, tmp_path):
    commands.predict([photos[1]], work(tmp_path / "bob", trained))
    for share, end in ((0.0, predicted), (1.0, tmp_path / "bob")):
        out = tmp_path / str(share)
        commands.blend(predicted, photos[1], work(out, trained), share)
        assert (out / WEIGHTS).read_bytes() == (end / WEIGHTS).read_bytes()
    out = tmp_path / "half"
    assert (
        main(["blend", str(photos[0]), str(tmp_path / "bob"), "--out", str(out), "--generator", str(trained), *QUICK])
        == 0
    )
    ends = [torch.tensor(read_recipe(end)["latent"]) for end in (predicted, tmp_path / "bob")]
    assert torch.allclose(torch.tensor(read_recipe(out)["latent"]), (ends[0] + ends[1]) / 2)


def test_an_adapter_of_another_generator_has_no_latent_here(trained, predicted, photos, tmp_path):
    other = tmp_path / "other"
    words = [
        "generator",
        "train",
        "--preset",
        "debug",
        "--seed",
        "1",
        "--end-to-end.train.max-train-steps",
        "1",
        "--out",
        str(other),
    ]
    assert main(words) == 0
    with pytest.raises(DataError, match="made by another generator"):
        commands.blend(predicted, photos[0], work(tmp_path / "a", other))
    with pytest.raises(DataError, match="one adapter folder, or photos"):
        commands.edit([predicted, photos[0]], work(tmp_path / "a", trained), {"a=b": 1.0})


def test_an_adapter_without_a_recipe_is_encoded(trained, predicted, tmp_path, photos):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (bare / name).write_bytes((predicted / name).read_bytes())
    outcome = commands.blend(bare, photos[1], work(tmp_path / "a", trained))
    assert "no recipe" in outcome.notes[0] and "loses" in outcome.notes[0]
    (predicted_copy := tmp_path / "copy").mkdir()
    (predicted_copy / "recipe.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="damaged"):
        commands.blend(predicted_copy, photos[1], work(tmp_path / "b", trained))


@pytest.mark.parametrize("by", ["gaussian", "diffusion"])
def test_sample_makes_people(trained, sliders, tmp_path, by):
    out, words = tmp_path / "people", ["--generator", str(trained), "--by", by, "--steps", "3", *QUICK]
    assert main(["sample", "--seeds", "0..2", "--out", str(out), *words]) == 0
    made = [read_recipe(out / f"seed-{seed}")["latent"] for seed in range(3)]
    assert made[0] != made[1] != made[2] and (out / "contact_sheet.png").is_file()


def test_people_who_do_not_exist_are_spread_as_those_who_do():
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])  # one direction nobody differs in
    people = 3 + torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) @ mixing.T
    halves = [{"half": str(number % 2)} for number in range(4000)]
    space = fit_space(people, halves)
    drawn = torch.stack([space.sample(seed) for seed in range(4000)])
    assert torch.allclose(drawn.mean(0), people.mean(0), atol=0.15)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(people.T), atol=0.3)
    assert drawn[:, 2].std() < 1e-2


def test_inversion_finds_a_latent_that_draws_the_photo_better(trained, photos, tmp_path):
    from smidgen.difflora.use.invert import Invert, invert
    from smidgen.difflora.use.refine import PhotoTask, photo_task

    generator = load_generator(trained)
    pipeline = AdaptedPipeline.load("embedded", generator.layout)
    image = Image.open(photos[0]).convert("RGB")
    latent, start = invert(
        generator, pipeline, [image], Invert(invert_steps=12, invert_rate=0.3), from_prediction=False
    )
    near, predicted = invert(generator, pipeline, [image], Invert(invert_steps=12, invert_rate=0.3))
    task = photo_task(pipeline, [image], ["a portrait of a person"], 8, seed=5)

    def loss(latent: torch.Tensor) -> float:
        with torch.no_grad(), pipeline.banked(generator.layout) as bank:
            measured = PhotoTask(pipeline, bank, generator.layout, [task])
            value = measured.loss(lambda: generator.rows(latent[None]), measured.batch(0))
            measured.release()
        return float(value)

    assert torch.equal(start, torch.zeros(8)) and loss(latent) < loss(start)
    assert torch.equal(predicted, generator.latents(generator.condition([image]), [0])[0])
    assert loss(near) < loss(predicted)


@pytest.mark.parametrize("command", ["invert", "predict"])
def test_stopping_a_training_on_photos_promises_nothing_that_is_gone(
    command, trained, photos, tmp_path, monkeypatch, capsys
):
    from smidgen.difflora.use.refine import PhotoTask

    batch = PhotoTask.batch

    def stopped(task, index):
        if index == 1:
            signal.raise_signal(signal.SIGINT)
        return batch(task, index)

    monkeypatch.setattr(PhotoTask, "batch", stopped)
    steps = ["--refine", "5"] if command == "predict" else ["--invert-steps", "5"]
    assert (
        main([command, str(photos[0]), "--out", str(tmp_path / "a"), "--generator", str(trained), *steps, *QUICK])
        == 130
    )
    said = capsys.readouterr().err
    assert "Stopped by SIGINT. This training keeps nothing on the way" in said and "resume" not in said
    assert not list(tmp_path.iterdir())


def test_invert_writes_an_adapter(trained, photos, predicted, tmp_path):
    out = tmp_path / "ann"
    words = ["invert", str(photos[0]), "--out", str(out), "--generator", str(trained), "--invert-steps", "2", *QUICK]
    assert main([*words, "--invert-batch", "1"]) == 0
    recipe = read_recipe(out)
    assert recipe["invert_steps"] == 2 and recipe["from_prediction"] is True
    assert recipe["latent"] != read_recipe(predicted)["latent"]
    assert main([*words[:2], "--recipe", *words[2:], "--invert-batch", "1", "--overwrite"]) == 0
    assert is_recipe(out / "ann.recipe")


def test_inspect_tells_what_a_generator_is(trained, sliders, capsys):
    assert main(["generator", "inspect", str(trained)]) == 0
    said = capsys.readouterr().out
    layout = load_generator(trained).layout
    assert f"lora, rank {layout.config['r']}: {layout.size:,} numbers" in said and f"sliders: {sliders[0].name}" in said
    assert main(["generator", "inspct"]) == 2
    assert "Did you mean 'inspect'" in capsys.readouterr().err


def test_a_base_that_no_generator_ships_for_is_refused_in_words(photos, tmp_path):
    words = "No generator ships for 'embedded-flow', only for embedded and embedded-wide: name one with --generator"
    with pytest.raises(BaseLockError, match=words):
        commands.predict([photos[0]], Output(tmp_path / "out", base="embedded-flow"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["embedded-flow", "embedded-wide"])
@pytest.mark.parametrize(
    "preset", [["debug"], ["two-stage", "--shared-basis.train.max-train-steps", "2", "--shared-basis.rounds", "1"]]
)
def test_a_generator_of_a_flow_base_is_trained_and_gives_adapters_that_are_on(base, preset, photos, tmp_path):
    people = ["--shared-basis.people.people", "70", "--shared-basis.people.pictures", "1"]
    few = [*people, "--two-stage.train.max-train-steps", "2", "--shared-basis.round.max-train-steps", "1"]
    words = ["generator", "train", "--base", base, "--preset", *preset, *(few if len(preset) > 1 else [])]
    assert main([*words, "--out", str(tmp_path / "g")]) == 0
    folder = tmp_path / "adapter"
    assert main(["predict", str(photos[0]), "--generator", str(tmp_path / "g"), "--out", str(folder), *QUICK]) == 0
    loaded = load_base(base)
    smidgen.load(loaded.model, folder)
    assert smidgen.verify(loaded.model, folder).ok
