"""Personalisation end to end on tiny random pipelines of exactly the classes of SD 1.5 and SDXL."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import smidgen
from smidgen.bases import families
from smidgen.bases.schedules import DiscreteSchedule
from smidgen.errors import CheckpointError, ConfigError, DataError, TrainingError
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples, encode_prior
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data, PersonalizeConfig, Show
from smidgen.tasks.png import read_facts
from smidgen.training.loop import LoopConfig
from tests.training import tiny

METHODS = ["tlora", "tlora_star", "svfit", "loldu", "lora", "oft"]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-4"]
FILES += ["config.yaml", "contact_sheet.png", "loss.png", "report.json"]


def config(base, pictures, out, method="svfit", **show) -> PersonalizeConfig:
    return PersonalizeConfig(
        data=Data(pictures, train_batch_size=2),
        adapter=Adapter(method, learning_rate=0.05),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2),
        show=Show(**({"num_prompts": 2, "num_seeds": 1, "inference_steps": 2, "compare_lora": False} | show)),
        base=str(base),
        out=out,
    )


def run(made: PersonalizeConfig, **options):
    return personalize(made, progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_stable_diffusion(sd, pictures, tmp_path, method):
    report = run(config(sd, pictures, tmp_path / "out", method))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    entry = report.entry
    size = sum((tmp_path / "out" / name).stat().st_size for name in FILES[1:3])
    assert entry.trained_numbers > 0 and entry.bytes_on_disk == size
    base = families.load_base(str(sd))
    smidgen.load(base.model, tmp_path / "out")
    assert smidgen.verify(base.model, tmp_path / "out").ok
    assert type(base.model).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize("method", ["seeded", "rotation+low_rank"])
def test_the_debug_preset_takes_any_method_at_its_own_rate(sd, pictures, tmp_path, method):
    out, preset = tmp_path / "out", PRESETS["debug"]
    made = replace(preset, data=replace(preset.data, folder=pictures), adapter=Adapter(method), base=str(sd), out=out)
    assert run(replace(made, show=replace(made.show, compare_lora=False))).entry.trained_numbers > 0
    base = families.load_base(str(sd))
    smidgen.load(base.model, out)
    assert smidgen.verify(base.model, out).ok


@pytest.mark.parametrize("method", ["tlora", "svfit"])
def test_sdxl_takes_the_same_recipe(sdxl, pictures, tmp_path, method):
    made = config(sdxl, pictures, tmp_path / "out", method, compare_lora=True)
    made = replace(made, data=replace(made.data, with_prior_preservation=True, num_class_images=3))
    report = run(replace(made, gradient_checkpointing=True))
    assert [entry.name for entry in report.entries] == ["base model", method, "peft's LoRA"]
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "out" / "peft_lora"))
    assert isinstance(theirs, peft.LoraConfig) and report.entries[2].trained_numbers == sum(
        tensor.numel() for tensor in load_file(tmp_path / "out" / "peft_lora" / "adapter_model.safetensors").values()
    )


def test_what_is_left_behind_can_be_read(sd, pictures, tmp_path):
    out = tmp_path / "out"
    made = config(sd, pictures, out)
    report = run(replace(made, data=replace(made.data, placeholder_token="sks")))
    saved = json.loads((out / "report.json").read_text())
    assert saved["verified"] is True
    assert saved["method"] == "svfit" and saved["base"] == "sd" and len(saved["entries"]) == 2
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "README.md").read_text()
    card = (out / "README.md").read_text()
    assert saved["coverage"]["entries"] and "## What it covers" in card and " of the base's parameters" in card
    assert "sks person" in card and "smidgen.load(pipe, " in card and "## Licence" in card
    assert "No judge is known for this base" in card
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.size[0] > 2 * 128 and sheet.size[1] > 3 * 128  # subject, base, adapter
    assert len({sheet.getpixel((x, y)) for x in range(0, sheet.width, 7) for y in range(0, sheet.height, 7)}) > 50
    assert Image.open(out / "loss.png").size[0] > 400
    assert report.notes[0] == "Trained on 3 pictures with 3 captions." and report.notes[0] in card
    assert "changes the UNet's answer by" in report.notes[2]


def test_a_judge_of_your_own_scores_base_adapter_and_lora(sd, pictures, tmp_path):
    class Redness:
        name = "redness"

        def prompts(self, count, seed):
            return [f"a person, number {number}" for number in range(count)]

        def scores(self, images, prompts, references):
            assert len(images) == len(prompts) == 2 and len(references) == 3
            return {"identity": 0.5, "caption": 0.25, "red": sum(i.getpixel((0, 0))[0] for i in images) / 510}

    report = run(config(sd, pictures, tmp_path / "out", compare_lora=None), judge=Redness())
    assert [entry.identity for entry in report.entries] == [0.5] * 3  # a judge: peft's LoRA is compared
    assert "red" in report.entry.details and "Scored by redness." in report.notes
    assert "| svfit       |" in report.table()


def test_resume_gives_the_same_file_and_refuses_other_settings(sd, pictures, tmp_path):
    made = config(sd, pictures, tmp_path / "whole", "tlora")
    run(made)
    broken = replace(made, out=tmp_path / "broken")
    run(broken)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"already holds checkpoint-2.*--overwrite"):
        run(broken)
    other = replace(broken, adapter=replace(broken.adapter, rank=3), resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"adapter\.rank: None then, 3 now"):
        run(other)
    Image.new("RGB", (20, 20), "green").save(pictures / "2.png")
    with pytest.raises(CheckpointError, match="pictures"):
        run(replace(broken, resume_from_checkpoint="latest"))
    tiny.pictures(pictures)
    run(replace(broken, resume_from_checkpoint="latest"))
    for name in FILES[1:3]:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_diverging_run_saves_nothing_bad(sd, pictures, tmp_path, monkeypatch):
    made = config(sd, pictures, tmp_path / "out")
    monkeypatch.setattr(DiscreteSchedule, "add_noise", lambda *_: (torch.full((2, 4, 8, 8), float("nan")),) * 2)
    with pytest.raises(TrainingError, match=r"loss of step 1 is nan.*\.png"):
        run(made)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_previews_are_drawn(sd, pictures, tmp_path):
    made = config(sd, pictures, tmp_path / "out")
    run(replace(made, train=replace(made.train, preview_steps=3)))
    assert Image.open(tmp_path / "out" / "preview-3.png").size[0] > 2 * 128


def test_previews_are_of_the_users_own_prompts_seeds_and_negative_prompt(sd, pictures, tmp_path):
    """Before the first step the base draws, so that the first preview is what the base's row of the sheet shows."""
    prompts = tuple(f"a person, {number}" for number in range(5))
    chosen = {"validation_prompt": prompts, "seeds": (7, 8), "guidance_scale": 3.0}
    made = config(sd, pictures, tmp_path / "out", **chosen, negative_prompt="rain")
    run(replace(made, train=replace(made.train, preview_steps=4)))
    assert sorted(path.name for path in (tmp_path / "out").glob("preview-*")) == ["preview-0.png", "preview-4.png"]
    facts = json.dumps(Image.open(tmp_path / "out" / "preview-0.png").info)
    assert "a person, 4" in facts and "negative_prompt" in facts and "[7, 7, 7, 7, 7]" in facts.replace("\\", "")
    base = families.load_base(str(sd))
    drawn = {}
    for negative in ("rain", ""):
        scenes = Scenes(prompts[:1], (7,), steps=2, guidance=3.0, size=16, negative=negative)
        drawn[negative] = scenes.drawn_by(base)()[0].tobytes()
    assert drawn["rain"] != drawn[""]
    with pytest.raises(ConfigError, match="seed must be from 0"):
        Show(seeds=(1, -1))


def test_previews_and_sheet_may_be_wider_than_high(sd, pictures, tmp_path, monkeypatch):
    class OfSquares:
        name = "squares"
        prompts = staticmethod(lambda count, seed: ["a person"] * count)

    monkeypatch.setattr(families.FAMILIES["sd"].cls, "judge", lambda self: OfSquares())
    made = config(sd, pictures, tmp_path / "out", preview_size="32x16", num_prompts=1)
    report = run(replace(made, train=replace(made.train, preview_steps=4)))
    for name in ("preview-0.png", "contact_sheet.png"):
        assert read_facts(tmp_path / "out" / name)["drawn_size"] == [32, 16]
    assert any("reads squares" in note for note in report.notes) and report.entry.identity is None
    for size, message in (
        ("32x15", r"multiples of 4 pixels: 12 and 16 are near 15"), ("wide", "such as 96x64"), ("0x16", "such as 96x64"),
        ("40000x16", "at most"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run(config(sd, pictures, tmp_path / "refused", preview_size=size))
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("method", METHODS)
def test_bf16_base_keeps_fp32_numbers(sd, pictures, tmp_path, method):
    made = config(sd, pictures, tmp_path / "out", method)
    run(replace(made, train=replace(made.train, mixed_precision="bf16")))
    saved = load_file(tmp_path / "out" / "checkpoint-4" / "trained.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("change, error, message", [
    ({"base": "/nowhere/base"}, ConfigError, "There is no base"),
    ({"base": "embeded"}, ConfigError, "Did you mean 'embedded'"),
    ({"data": Data(None)}, DataError, "Which pictures"),
])  # fmt: skip
def test_refusals_come_before_any_training(sd, pictures, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(replace(config(sd, pictures, tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_fp16_on_a_cpu_is_refused(sd, tmp_path):
    with pytest.raises(ConfigError, match="use --mixed-precision bf16 or no"):
        families.load_base(str(sd), "fp16")


def test_a_folder_that_is_no_pipeline(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        families.load_base(pictures)
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="is a FluxPipeline, and no family here knows"):
        families.load_base(tmp_path / "flux")


# ---- the task --------------------------------------------------------------------------------------------------------


def test_batches_follow_from_their_number_and_methods_share_them(sd, pictures):
    from smidgen.tasks.data.images import read_folder

    base = families.load_base(str(sd))
    found = read_folder(pictures)
    subject = encode_examples(base, found.pictures, found.captions, 16)
    first = PersonalizeTask(subject, base, batch_size=2, seed=1).batch(5)
    again = PersonalizeTask(subject, base, batch_size=2, seed=1).batch(5)
    for key in ("latents", "noise", "levels"):
        assert torch.equal(first[key], again[key])
    assert torch.equal(first["prompts"].tensors["embeds"], again["prompts"].tensors["embeds"])
    assert not torch.equal(first["noise"], PersonalizeTask(subject, base, batch_size=2, seed=2).batch(5)["noise"])
    assert first["latents"].shape == (2, 4, 8, 8) and len(first["names"]) == 2


def test_class_pictures_are_drawn_once_and_weighted(sd, pictures, tmp_path, monkeypatch):
    from smidgen.tasks.data.images import read_folder

    base = families.load_base(str(sd))
    found = read_folder(pictures)
    subject = encode_examples(base, found.pictures, found.captions, 16)
    scenes = Scenes(("a person",) * 3, (1, 2, 3), steps=2, guidance=2.0, size=16)
    prior = encode_prior(base, scenes, tmp_path / "class", "base")
    monkeypatch.setattr(base, "draw_latents", lambda *_, **__: pytest.fail("drawn twice"))
    again = encode_prior(base, scenes, tmp_path / "class", "base")
    assert torch.equal(prior.mean, again.mean)
    task = PersonalizeTask(subject, base, batch_size=2, prior=prior, prior_batch_size=1, prior_weight=0.5)
    batch = task.batch(0)
    assert batch["latents"].shape[0] == 3
    torch.testing.assert_close(batch["weights"], torch.tensor([0.5, 0.5, 0.5]))
    assert batch["names"][2].startswith("class picture")


def test_released_encoders_are_gone(sd):
    base = families.load_base(str(sd))
    base.release_encoders()
    assert base.pipe.text_encoder is None and base.pipe.vae is None and base.model is not None


def test_timesteps_are_uniform_and_spread(sd, pictures):
    from smidgen.tasks.data.images import read_folder

    base = families.load_base(str(sd))
    found = read_folder(pictures)
    task = PersonalizeTask(encode_examples(base, found.pictures, found.captions, 16), base, batch_size=4)
    levels = torch.stack([task.batch(index)["levels"] for index in range(200)])
    times = base.schedule.timesteps(levels).sort(dim=1).values
    assert times.min() >= 0 and times.max() <= 999
    assert ((times[:, 1:] - times[:, :-1] - 250).abs() <= 1).all()
    assert abs(float(times.float().mean()) - 499.5) < 20
