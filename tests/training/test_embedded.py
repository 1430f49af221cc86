"""Personalisation on the embedded base, judged: the short way in every test run, the real one among the slow tests."""

from dataclasses import replace

import numpy
import pytest

from smidgen.bases.families import load_base
from smidgen.errors import ConfigError
from smidgen.tasks.control.pairs import write_pairs
from smidgen.tasks.diffusion.limits import words_alike
from smidgen.tasks.drawing import draw_subject
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data, PersonalizeConfig, Show
from smidgen.training.loop import LoopConfig

pytest.importorskip("resvg_py")


def test_the_judge_scores_and_peft_is_compared(tmp_path):
    draw_subject(tmp_path / "pictures", seed=7, num_pictures=3)
    made = replace(PRESETS["debug"], data=Data(tmp_path / "pictures"), out=tmp_path / "out", adapter=Adapter("svfit"))
    report = personalize(made, progress=False)
    assert [entry.name for entry in report.entries] == ["base model", "svfit", "peft's LoRA"]
    for entry in report.entries:
        assert -1 <= entry.identity <= 1.2 and 0 <= entry.caption <= 1
        assert {"traits", "hair", "skin", "background"} <= set(entry.details)
    assert "Scored by the embedded base's attribute classifiers." in report.notes
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(
        code.replace("path/of/this/folder", str(tmp_path / "out")).replace("inference_steps=20", "inference_steps=1"),
        names,
    )
    assert names["pipe"].unet.peft_config.keys() == {"default"}


def test_subjects_are_held_out_and_repeatable(tmp_path):
    from smidgen.bases.embedded import world

    draw_subject(tmp_path / "a", seed=3, num_pictures=2)
    draw_subject(tmp_path / "b", seed=3, num_pictures=2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["000.png", "001.png", "metadata.jsonl"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    identity = world.sample_identity(numpy.random.default_rng(3), "test")
    assert world.split_of(identity) == "test"
    draw_subject(tmp_path / "a", seed=3, num_pictures=2)  # the same again


@pytest.mark.parametrize(
    "draw", [lambda folder: draw_subject(folder, 3, 2), lambda folder: write_pairs(folder, "canny", 2, 3)]
)
def test_nobodys_pictures_are_drawn_over(tmp_path, draw):
    draw(tmp_path / "drawn")
    name = min(path.name for path in (tmp_path / "drawn").glob("*.png"))
    for found in (name, "holiday.jpg", "metadata.jsonl"):
        own = tmp_path / found.replace(".", "-")
        own.mkdir()
        (own / found).write_bytes(b"mine")
        with pytest.raises(ConfigError, match=f"holds {found} already; give a new folder"):
            draw(own)
        assert [(path.name, path.read_bytes()) for path in own.iterdir()] == [(found, b"mine")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tlora", "svfit", "loldu"])
def test_the_defaults_bring_the_subject_and_follow_the_captions(tmp_path, method):
    draw_subject(tmp_path / "pictures", seed=11, num_pictures=6)
    made = replace(PRESETS["default"], data=Data(tmp_path / "pictures"), out=tmp_path / "out", adapter=Adapter(method))
    report = personalize(replace(made, show=Show(compare_lora=False)), progress=False)
    base, adapter = report.entries
    assert base.identity < 0.3 and adapter.identity > 0.7
    assert adapter.caption > base.caption - 0.15


def test_words_that_the_base_ignores_are_named_before_two_people_are_mixed():
    base = load_base("embedded")
    (told,) = words_alike(base, ["sks person", "ohwx person", "teal person"])
    assert (
        told.startswith("1 word pair that embedded encodes nearly alike") and "'sks person' and 'ohwx person'" in told
    )
    assert not words_alike(base, ["striped person", "teal person"]) and not words_alike(base, ["sks person"])


@pytest.mark.slow
def test_two_people_in_one_adapter_are_told_apart(tmp_path):
    """Two people nobody was trained on, each under a word that the base tells apart: a prompt draws its own person rather."""
    from smidgen.bases.embedded import world

    rng = numpy.random.default_rng(11)
    for name in ("ann", "bob"):
        world.write_subject(tmp_path / name, world.sample_identity(rng, "test"), 6, seed=len(name) + ord(name[0]))
    (tmp_path / "people.yaml").write_text(
        "- {folder: ann, placeholder_token: striped}\n- {folder: bob, placeholder_token: teal}\n"
    )
    made = PersonalizeConfig(
        data=Data(subjects=tmp_path / "people.yaml"),
        adapter=Adapter("lora", rank=4),
        train=LoopConfig(max_train_steps=300),
        show=Show(num_prompts=6, num_seeds=2, inference_steps=12, compare_lora=False),
        out=tmp_path / "out",
    )
    report = personalize(made, progress=False)
    before, after = report.entries[0], report.entry
    assert abs(before.identity - before.details["identity of others"]) < 0.1  # the base knows neither
    assert after.identity > after.details["identity of others"] + 0.1, (after.identity, after.details)
