"""Text encoders of Stable Diffusion and SDXL trained beside the UNet."""

import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.components import Components
from smidgen.bases.families import load_base
from smidgen.errors import CheckpointError, ConfigError
from smidgen.tasks.data.images import read_folder
from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples
from smidgen.tasks.drawing import generate, inspect, verify
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data
from tests.training import tiny, tiny_flow

BUILT = {"sd": tiny.sd_folder, "sdxl": tiny.sdxl_folder}
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


def settings(base, folder: Path, out: str, method: str = "lora", **adapter):
    chosen = PRESETS["debug"]
    data = Data(tiny.pictures(folder / "pictures", size=16), train_batch_size=2)
    options = Adapter(method, learning_rate=1e-2, train_text_encoder=True, **adapter)
    return replace(chosen, base=str(base), data=data, adapter=options, out=folder / out)


@pytest.mark.parametrize("family, method", [pytest.param("sd", "svfit", marks=pytest.mark.slow), ("sdxl", "lora")])
def test_they_are_trained_saved_verified_drawn_with_and_resumed_to_the_bit(family, method, tmp_path, caplog):
    base = BUILT[family](tmp_path / "base")
    made = settings(base, tmp_path, "whole", method)
    made = replace(made, show=replace(made.show, compare_lora=family == "sdxl"))
    report = personalize(made, progress=False)
    assert report.verified
    files = ["adapter_model.safetensors", *(f"{name}/adapter_model.safetensors" for name in ENCODERS[family])]
    stored = sum(value.numel() for file in files for value in load_file(tmp_path / "whole" / file).values())
    assert stored == report.entry.trained_numbers
    if family == "sdxl":
        assert (tmp_path / "whole" / "peft_lora" / files[2]).is_file()

    broken = replace(made, out=tmp_path / "broken", show=replace(made.show, compare_lora=False))
    personalize(broken, progress=False)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    for file in files:
        (tmp_path / "broken" / file).unlink()
    other = replace(broken, adapter=replace(broken.adapter, text_encoder_learning_rate=1.0))
    with pytest.raises(CheckpointError, match="text_encoder"):
        personalize(replace(other, resume_from_checkpoint="latest"), progress=False)
    personalize(replace(broken, resume_from_checkpoint="latest"), progress=False)
    for file in files:
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file

    caplog.clear()
    ok, told = verify(tmp_path / "whole", str(base))
    assert ok and not caplog.records, (told, caplog.text)
    assert all(name in inspect(tmp_path / "whole") for name in ENCODERS[family])
    (place,) = generate(tmp_path / "whole", ["a red person"], str(base), tmp_path / "drawn", steps=2)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, safety_checker=None)  # as a user would
    smidgen.load(pipe, tmp_path / "whole")
    assert place.is_file() and smidgen.names(pipe.text_encoder) == ["default"]


def test_a_word_changes_its_meaning_with_the_unet_as_it_is():
    """The embedded base's text encoder alone learns that a word it never saw means what another caption says."""
    base = load_base("embedded")
    layers = base.train_text_encoders()["text_encoder"]
    word, meaning = (base.encode_prompts([text]) for text in ("a portrait of a zyx person", base.scenes(1, 0)[0]))
    options = {"negative": base.encode_prompts([""]), "steps": 4, "guidance": 3.0}
    draw = lambda prompts: numpy.asarray(base.draw(prompts, [0], **options)[0], int)  # noqa: E731
    before, wanted = draw(word), draw(meaning)
    encoder, g = base.encoders["text_encoder"], torch.Generator().manual_seed(0)
    noisy = torch.randn(4, *base.latent_shape(64), generator=g)
    timesteps = base.schedule.timesteps(torch.tensor([0.9, 0.95, 0.98, 0.99]))
    with torch.no_grad():
        target = base.predict(base.model, noisy, timesteps, meaning[[0] * 4])
    unet = {name: value.clone() for name, value in base.model.state_dict().items()}
    smidgen.adapt(encoder, "lora", r=4, target_modules=list(layers))
    whole = Components(base.model, {"text_encoder": encoder})
    optimizer, losses = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], 1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((base.predict(whole, noisy, timesteps, word[[0] * 4]) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    after = draw(word)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, unet[name]) for name, value in base.model.state_dict().items())
    assert abs(after - wanted).mean() < 0.7 * abs(before - wanted).mean()
    with smidgen.disabled(whole):
        assert (draw(word) == before).all()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_live_prompts_give_the_loss_of_those_encoded_before(family, tmp_path):
    name = str(BUILT[family](tmp_path / "base"))
    found = read_folder(tiny.pictures(tmp_path / "pictures", size=16))
    losses = []
    for live in (False, True):
        base = load_base(name)
        if live:
            base.train_text_encoders()
        task = PersonalizeTask(encode_examples(base, found.pictures, found.captions, 16), base, batch_size=2)
        base.release_encoders()
        assert (base.pipe.text_encoder is None) != live
        with torch.no_grad():
            losses.append(task.loss(base.model, task.batch(0)))
    assert torch.equal(*losses)


def test_families_with_large_text_encoders_refuse(tmp_path):
    base = tiny_flow.flow_folder("flux2-klein", tmp_path / "base")
    with pytest.raises(ConfigError, match=r"--train-text-encoder is for Stable Diffusion and SDXL.*family flux2-klein"):
        personalize(settings(base, tmp_path, "out"), progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is for --train-text-encoder, which is off"):
        Adapter(text_encoder_learning_rate=1e-3)
