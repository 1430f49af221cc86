"""A plan of a personalisation: shapes against published sizes, counts against a real run of the CPU, settings that fit, refusals."""

import json
from dataclasses import replace

import pytest
import torch

from smidgen.bases.families import load_base
from smidgen.bases.shapes import full_size, shapes_of
from smidgen.cli.dispatch import main
from smidgen.errors import ConfigError
from smidgen.tasks.personalize import plan as planning
from smidgen.tasks.personalize import plan_text, presets
from smidgen.tasks.personalize.plan import fitting, make_plan
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig
from smidgen.training import engine
from smidgen.training.loop import LoopConfig
from tests.training import tiny, tiny_flow

SMALL = PersonalizeConfig(Data(train_batch_size=2), Adapter("lora"))
FLUX = PersonalizeConfig(
    Data(train_batch_size=1), Adapter("lora"), LoopConfig(mixed_precision="bf16"), base="flux2-klein-4b"
)


@pytest.mark.parametrize("name", full_size()["bases"])
def test_a_published_base_has_its_published_size(name):
    base = shapes_of(name).base()
    assert sum(p.numel() for p in base.model.parameters()) == full_size()["bases"][name]["parameters"]
    assert base.model.device.type == "meta" and base.resolution in (480, 512, 1024)


@pytest.mark.parametrize("name", [n for n, row in full_size()["text_encoders"].items() if row["parameters"] < 6e9])
def test_a_text_encoder_has_its_published_size(name):
    transformers = pytest.importorskip("transformers")
    row = full_size()["text_encoders"][name]
    with torch.device("meta"):
        made = getattr(transformers, row["class"])(getattr(transformers, row["config"])(**row["options"]))
    assert sum(p.numel() for p in made.parameters()) == row["parameters"]


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("svfit", "tlora", "loldu"))]
)
def test_what_is_planned_is_what_a_run_trains(method):
    plan = make_plan(replace(SMALL, adapter=Adapter(method)), measured=False)
    base = load_base("embedded")
    engine.adapt(base.model, planning.adapter_setup(plan.config, method, list(base.targets)), ())
    assert plan.trained == sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    assert plan.covered.layers == sum(
        name.endswith(base.targets) for name, _ in load_base("embedded").model.named_modules()
    )
    assert plan.training["denoiser"] == 4 * plan.parameters


@pytest.mark.parametrize(
    "family",
    [
        "flux2-klein",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("z-image", "qwen-image", "sd3", "krea2", "wan")),
    ],
)
def test_a_pipelines_folder_is_planned_from_its_configs_alone(family, tmp_path):
    folder = tiny_flow.flow_folder(family, tmp_path)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    plan = make_plan(replace(SMALL, base=str(folder), data=Data(train_batch_size=2, resolution=64)), measured=False)
    assert plan.shapes.family == family and plan.trained > 0 and not plan.card
    assert all(stack.touched for stack in plan.covered.stacks if "block" in stack.name)
    model = plan.shapes.base().model  # SD3's grid of positions is no parameter
    assert plan.training["denoiser"] == sum(4 * t.numel() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
def test_costs_move_as_they_must():
    plain = make_plan(FLUX, measured=False)
    twice = make_plan(replace(FLUX, data=Data(train_batch_size=2)), measured=False)
    less = make_plan(replace(FLUX, gradient_checkpointing=True), measured=False)
    nf4 = make_plan(replace(FLUX, quantize="nf4"), measured=False)
    assert plain.card and plain.seconds is None and plain.parameters == 3_875_544_576
    assert twice.step.forward == 2 * plain.step.forward
    assert less.step.bytes < plain.step.bytes / 2 and less.step.training > plain.step.training
    assert nf4.training["denoiser"] == pytest.approx(plain.training["denoiser"] * 4.5 / 16, rel=0.02)
    assert 30e12 < plain.step.forward < 40e12  # 2 operations a parameter and token: 2 x 3.88e9 x (4096 + 512) = 36e12


@pytest.mark.slow
def test_settings_that_fit_and_those_of_the_presets():
    found = fitting(FLUX, 24e9)
    assert found is not None and found.gradient_checkpointing
    assert make_plan(found, measured=False).peak <= 24e9 < make_plan(FLUX, measured=False).peak
    assert fitting(FLUX, 1e9) is None
    assert set(presets.by_memory()) <= set(full_size()["bases"])
    size, chosen = presets.for_memory(FLUX, 30)
    assert size == 24 and make_plan(chosen, measured=False).peak <= 24e9
    assert presets.for_memory(FLUX, 1) is None and presets.for_memory(SMALL, 24) is None


@pytest.mark.slow
def test_the_command_prints_a_plan_and_the_command_to_run(capsys):
    words = ["plan", "personalize", "--base", "flux2-klein-4b", "--method", "lora", "--mixed-precision", "bf16"]
    assert main([*words, "--train-batch-size", "1", "--memory", "24GB"]) == 0
    said = capsys.readouterr().out
    assert "5 of 5 blocks of transformer_blocks, 20 of 20 blocks of single_transformer_blocks" in said
    assert "It does not fit 24 GB. This would:" in said and "--gradient-checkpointing" in said and "Assumed:" in said
    assert "The preset of FLUX.2 [klein] base 4B for 24 GB:" in said
    assert main([*words, "--train-batch-size", "1", "--json", "--memory", "1GB"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["command"] is None and not known["fits"] and known["blocks"]["transformer_blocks"] == [5, 5]


def test_trained_text_encoders_are_counted(tmp_path):
    folder = tiny.sdxl_folder(tmp_path / "sdxl")
    made = replace(SMALL, base=str(folder))
    live = replace(made, adapter=Adapter("lora", train_text_encoder=True))
    plain, both = make_plan(made, measured=False), make_plan(live, measured=False)
    base = load_base(str(folder))
    engine.adapt(base.model, planning.adapter_setup(live, "lora", list(base.targets)), ())
    for own in planning.text_adapters(live, "lora", base).values():
        engine.adapt(own.model, own.peft_config)
    parts = (base.model, base.pipe.text_encoder, base.pipe.text_encoder_2)
    assert (
        both.trained == sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad) > plain.trained
    )
    assert (
        both.training["text encoders"] == 4 * sum(plain.shapes.texts.values()) and "text encoders" not in plain.training
    )
    assert both.step.training > plain.step.training and both.step.bytes > plain.step.bytes
    with pytest.raises(ConfigError, match="whose text encoders are encoded with once"):
        make_plan(replace(FLUX, adapter=live.adapter), measured=False)


def test_kept_answers_are_rows_too():
    plain, kept = (
        make_plan(replace(SMALL, data=Data(train_batch_size=2, preservation=way)), measured=False)
        for way in (None, "blank")
    )
    assert kept.step.forward == 3 * plain.step.forward and kept.step.training == 2 * plain.step.training
    assert 1.5 < kept.step.bytes / plain.step.bytes <= 2


def test_epochs_are_steps_as_the_run_counts_them(tmp_path):
    folder = tiny.sd_folder(tmp_path / "sd")
    pictures = tiny.pictures(tmp_path / "10_ann person")
    for own, steps in ((None, 3 * planning.PICTURES), (pictures.parent, 3 * 30 * 2)):
        data = Data(own, train_batch_size=1, num_train_epochs=3, resolution=None if own is None else "16,20")
        plan = make_plan(replace(SMALL, base=str(folder), data=data), measured=False)
        assert plan.steps == steps and plan.config.data is data


def test_seconds_are_those_of_an_idle_machine():
    """(clock, processor time): what others take makes a step longer, not costlier; cores of its own make it shorter."""
    alone = [(n, n) for n in range(6)]
    disturbed = [(0, 0), (1, 1), (4, 2), (5, 3), (12, 4), (13, 5)]
    two_cores = [(n, 2 * n) for n in range(4)] + [(9, 8)]
    slow = [(3 * n, n) for n in range(6)]
    for at in (alone, disturbed, two_cores, slow):
        assert planning._undisturbed(at, 2) == 1
    assert planning._undisturbed(alone[:2], 2) == 1


def test_a_command_says_what_differs():
    made = plan_text.command(replace(FLUX, gradient_checkpointing=True, quantize="nf4"))
    assert made == (
        "smidgen personalize --train-batch-size 1 --method lora --mixed-precision bf16 --base flux2-klein-4b --quantize nf4 "
        "--gradient-checkpointing"
    )


@pytest.mark.parametrize("words, said", [
    (["--base", "flux2-dv"], "no base 'flux2-dv' to plan for. Did you mean 'flux2-dev'"),
    (["--base", "no/such-base"], "not a diffusers pipeline|are not on this machine"),
    (["--base", "sd15", "--memory", "lots"], "--memory is an amount such as 12GB"),
    (["--base", "sd15", "--memory", "0GB"], "--memory is an amount such as 12GB"),
    (["--base", "sd15", "--method", "lore"], "lore"),
    (["--base", "sd15", "--quantize", "nf5"], "cannot be quantised as 'nf5'"),
    (["nowhere", "--base", "sd15"], "There is no folder 'nowhere'"),
])  # fmt: skip
def test_refusals(words, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", "personalize", *words]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|")), error
