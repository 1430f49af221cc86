"""The audit as a whole, on a zoo of 6 + 2 people and a generator of four steps."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from damage import rewrite
from PIL import Image

from smidgen.bases.families import load_base
from smidgen.cli.dispatch import main
from smidgen.difflora.generator import settings as generator_settings
from smidgen.difflora.generator.fit import fit
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.zoo import settings as zoo_settings
from smidgen.difflora.zoo.build import build
from smidgen.difflora.zoo.store import DESCRIPTION, Zoo
from smidgen.errors import BaseLockError, ConfigError, DataError
from smidgen.lab.audit import learned
from smidgen.lab.audit.evaluate import Audit, evaluate
from smidgen.lab.audit.scenes import AuditScenes
from smidgen.lab.audit.scores import TABLE, Scores
from smidgen.lab.audit.settings import PRESETS, Drawing
from smidgen.training.interrupts import TrainingInterrupted

SIMPLE = [
    "real photo", "base model", "mean adapter", "nearest training identity", "noise around it (x 1)", "ridge",
    "ridge at full length", "PCA regression", "zoo's trained adapter",
]  # fmt: skip
DRAWING = Drawing(scenes=1, inference_steps=1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "zoo"
    build(replace(zoo_settings.PRESETS["debug"], gate=zoo_settings.Gate(judged_pictures=0), out=folder), progress=False)
    return folder


@pytest.fixture(scope="session")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "small"
    fit(replace(generator_settings.PRESETS["debug"], out=folder), progress=False)
    return folder


@pytest.fixture
def config(generator, tmp_path):
    return replace(PRESETS["debug"], generator=(generator,), drawing=DRAWING, out=tmp_path / "out")


@pytest.fixture
def copied(zoo, tmp_path):
    return shutil.copytree(zoo, tmp_path / "zoo")


@pytest.fixture(scope="session")
def evaluated(zoo, generator, tmp_path_factory):
    config = replace(
        PRESETS["debug"], generator=(generator,), drawing=DRAWING, refine=1, personalize=True, personalize_steps=1,
        out=tmp_path_factory.mktemp("audit") / "out",
    )  # fmt: skip
    return config, evaluate(zoo, config, progress=False)


def test_every_contender_has_its_row(evaluated):
    config, report = evaluated
    generated = ["DiffLoRA (small)", "DiffLoRA (small), shuffled photo", "DiffLoRA (small) + refine 1"]
    assert list(report.scores) == [*SIMPLE, "trained on the same photo", *generated]
    told = json.loads((config.out / "report.json").read_text())
    assert [line["name"] for line in told["contenders"]] == list(report.scores)
    assert told["people"] == 2 and told["judge"]
    lines = {line.name: line for line in report.lines()}
    assert lines["base model"].moved == 0 and lines["base model"].numbers == 0
    assert lines["DiffLoRA (small) + refine 1"].numbers > lines["DiffLoRA (small)"].numbers
    assert all(line.bytes > 4 * line.numbers for line in lines.values() if line.numbers)
    assert lines["trained on the same photo"].share is None and lines["ridge"].share is not None
    assert all(line.moved > 0 for name, line in lines.items() if name not in ("real photo", "base model"))
    assert (lines["noise around it (x 1)"].diversity or 0) > 0 and lines["ridge"].diversity is None
    text = (config.out / "report.md").read_text()
    assert "| ridge at full length " in text and "## Copies?" in text
    with Image.open(config.out / "contact_sheet.png") as sheet:
        assert sheet.width > 100
    assert sorted(path.name for path in config.out.glob("*.png")) == [
        "contact_sheet.png", "memorisation-0.png", "weights-0.png",
    ]  # fmt: skip


def test_copies_are_looked_for_in_weights_and_pictures(evaluated):
    config, _ = evaluated
    (found,) = json.loads((config.out / "memorisation.json").read_text())
    deltas = found["spaces"]["deltas of the weights"]
    assert {who: one["count"] for who, one in deltas.items()} == {
        "training to training": 6, "held-out trained to training": 2, "generated to training": 2,
    }  # fmt: skip
    assert all(0 < one["nearest"][0] <= one["nearest"][2] for one in deltas.values())
    assert set(found["like_neighbour"]) == {"DiffLoRA (small)", "zoo's trained adapter"}
    assert found["spaces"]["the generator's own predictions, deltas"]["of held-out photos, to those"]["count"] == 2


def test_what_was_scored_is_not_drawn_again(evaluated, zoo, generator, monkeypatch):
    config, report = evaluated
    drawn = []
    monkeypatch.setattr(AuditScenes, "draw", lambda self, rows: drawn.append(rows))
    monkeypatch.setattr(learned, "refine_rows", lambda *a, **k: drawn.append(a))
    again = evaluate(zoo, config, progress=False)
    assert not drawn
    assert again.scores == report.scores


def test_a_stopped_run_keeps_what_is_done_and_other_scenes_are_drawn_anew(zoo, config, monkeypatch):
    real, calls = AuditScenes.draw, []

    def stop(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise TrainingInterrupted("stopped", 15)
        return real(self, rows)

    monkeypatch.setattr(AuditScenes, "draw", stop)
    with pytest.raises(TrainingInterrupted):
        evaluate(zoo, config, progress=False)
    kept = Scores(config.out).lines
    assert [own[0].contender for own in kept.values()] == SIMPLE[:3]
    audit = Audit(zoo, config, None, False)
    for contender in audit.contenders()[:2]:
        audit.score(contender)
    assert len(calls) == 2
    other = Audit(zoo, replace(config, drawing=replace(DRAWING, guidance_scale=2.0)), None, False)
    monkeypatch.setattr(AuditScenes, "draw", real)
    other.score(other.contenders()[1])
    assert set(Scores(config.out).lines) > set(kept)


def test_shuffled_photos_are_other_peoples_adapters(zoo, config):
    audit = Audit(zoo, config, None, False)
    (predicted,) = audit.predicted
    straight, mixed = predicted.made.rows, predicted.shuffled().rows
    assert straight.shape == (config.seeds, 2, predicted.generator.layout.size)
    torch.testing.assert_close(mixed, straight.flip(1), rtol=0, atol=0)
    alone = predicted.generator.predict(audit.people[1].photos, [1])[0]
    torch.testing.assert_close(straight[1, 1], alone, rtol=1e-4, atol=1e-6)
    face, image = audit.simple.encoded[1]
    own = predicted.of_photos(Photos(("a", "b"), face, image, ((0,), (1,)), ((0,), (1,))))
    torch.testing.assert_close(own, straight[0], rtol=1e-4, atol=1e-6)


def test_nearest_is_a_training_adapter_and_noise_lies_around_it(zoo, config):
    simple = Audit(zoo, config, None, False).simple
    near = simple.nearest().rows[0]
    assert all(any(torch.equal(row, other) for other in simple.training) for row in near)
    still = replace(config, noise=0.0)
    simple.config = still
    torch.testing.assert_close(simple.noise().rows, near.expand(2, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(simple.mean().rows[0, 0], simple.training.mean(0), rtol=1e-4, atol=1e-6)
    assert not any(person.id in simple.rows.ids for person in simple.people)


def test_command_line(zoo, generator, tmp_path, capsys):
    words = ["zoo", "evaluate", str(zoo), "--preset", "debug", "--out", str(tmp_path / "out"), "--scenes", "1"]
    words += ["--inference-steps", "1", "--people", "1", "--seeds", "1"]
    assert main([*words, "--generator", str(tmp_path / "none")]) == 2
    assert "holds no generator" in capsys.readouterr().err
    assert main([*words, "--generator", str(generator), "--generator", str(generator)]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["zoo", "evaluat", str(zoo)]) == 2
    assert "evaluate" in capsys.readouterr().err
    assert main(["zoo", "evaluate", str(zoo), "--preset", "nothing"]) == 2
    assert not (tmp_path / "out" / TABLE).exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_generator_of_another_base(copied, config):
    described = json.loads((copied / DESCRIPTION).read_text())
    described["layout"]["base"]["sha256"] = "0" * 64
    (copied / DESCRIPTION).write_text(json.dumps(described))
    with pytest.raises(BaseLockError, match="another base"):
        evaluate(copied, config, progress=False)


def test_zoo_of_another_base_than_this_machines(zoo, config, monkeypatch):
    def other(*args):
        base = load_base(*args)
        for name, parameter in base.model.named_parameters():
            parameter.data.mul_(-1 if ".to_" in name else 1)
        return base

    monkeypatch.setattr("smidgen.difflora.adapted_pipeline.load_base", other)
    with pytest.raises(BaseLockError):
        evaluate(zoo, config, progress=False)


def test_nobody_held_out(copied, config):
    zoo = Zoo(copied)
    group = next(line.group for line in zoo.records() if line.split == "test")
    zoo.manifest_path(group).unlink()
    with pytest.raises(DataError, match="no adapters of test/kept"):
        evaluate(copied, config, progress=False)


def test_half_written_shard_is_named(copied, config):
    path = Zoo(copied).shard_path(0)
    rewrite(path, path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=path.name):
        evaluate(copied, config, progress=False)


def test_imported_zoo_has_no_pictures(copied, config):
    (copied / "subjects.parquet").unlink()
    with pytest.raises(DataError, match="imported"):
        evaluate(copied, config, progress=False)


def test_too_many_photos_and_too_few_pictures(zoo, config):
    with pytest.raises(DataError, match="leave none to judge by"):
        evaluate(zoo, replace(config, photos=2), progress=False)
    with pytest.raises(ConfigError, match="to train on"):
        evaluate(zoo, replace(config, personalize_photos=3), progress=False)


def test_photo_without_a_face_is_named(zoo, config):
    audit = Audit(zoo, config, None, False)
    blank = Image.new("RGB", (64, 64), (90, 120, 200))
    audit.simple.people = [replace(person, pictures=(blank, *person.pictures[1:])) for person in audit.people]
    with pytest.raises(DataError, match="No face was found in the photos of 'test-00000'"):
        audit.simple.nearest()
    audit.predicted[0].people = audit.simple.people
    with pytest.raises(DataError, match="photo 1 of 'test-00000'"):
        audit.predicted[0].shuffled()
