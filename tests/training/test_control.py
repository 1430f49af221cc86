"""Training control end to end on tiny random pipelines of exactly the classes of SD 1.5 and SDXL."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from smidgen.cli import main
from smidgen.errors import AdapterFileError, CheckpointError, ConfigError, DataError
from smidgen.tasks.control import settings as control_settings
from smidgen.tasks.control.recipe import control
from smidgen.tasks.control.settings import PRESETS, Adapter, ControlConfig, Data, Show
from smidgen.tasks.data import images
from smidgen.tasks.drawing import generate, verify
from smidgen.training.loop import LoopConfig
from tests.training import tiny

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-1", "checkpoint-2"]
FILES += ["config.yaml", "contact_sheet.png", "hint_config.json", "loss.png", "report.json"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pairs") / "pairs", count=4, size=20)


def config(base, pairs, out, method="tlora*(1,1)", **adapter) -> ControlConfig:
    return ControlConfig(
        data=Data(pairs, num_held_out=2, train_batch_size=2),
        adapter=Adapter(method, hint_width=8, learning_rate=0.02, **adapter),
        train=LoopConfig(max_train_steps=2, lr_warmup_steps=1, checkpointing_steps=1),
        show=Show(inference_steps=2),
        base=str(base),
        out=out,
    )


@pytest.mark.parametrize("method", ["seeded", "rotation+low_rank"])
def test_the_debug_preset_takes_any_method_at_its_own_rate(sd, pairs, tmp_path, method):
    out, preset = tmp_path / "out", PRESETS["debug"]
    data = replace(preset.data, folder=pairs)
    report = control(replace(preset, data=data, adapter=Adapter(method), base=str(sd), out=out), progress=False)
    assert report.lines[-1].name == method and report.lines[-1].numbers > 0
    assert verify(out, str(sd))[0]


def test_what_is_left_behind_and_how_it_draws(sd, pairs, tmp_path):
    out = tmp_path / "out"
    report = control(config(sd, pairs, out), progress=False)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [line.name for line in report.lines] == ["real pictures", "base without control", "tlora*(1,1)"]
    ours = report.lines[-1]
    stored = load_file(out / "adapter_model.safetensors")
    hint_numbers = sum(tensor.numel() for name, tensor in stored.items() if "hint" in name)
    assert ours.hint_numbers == hint_numbers > 0 and ours.numbers > 0
    assert report.lines[0].scores == {"iou": 1.0, "f1": 1.0, "f1_1px": 1.0} and 0 <= ours.scores["iou"] < 1
    assert report.notes[0].startswith("Trained on 2 pictures with 2 captions, each with its control picture; 2 more")
    assert "verified" in report.notes[1] and float(report.notes[2].rsplit(" ", 1)[1].rstrip(".")) == 0
    saved = json.loads((out / "report.json").read_text())
    assert saved["control"] == "canny" and str(tmp_path) not in (out / "report.json").read_text()
    card = (out / "README.md").read_text()
    assert saved["coverage"]["entries"] and "## What it covers" in card
    assert "edge F1 within 1 px" in card and "--control PICTURE" in card and str(tmp_path) not in card
    assert verify(out, str(sd))[0]

    picture = pairs / "0.png"
    first = generate(out, ["a person"], base=str(sd), out=tmp_path / "a.png", steps=2, edges_of=picture)
    images.load_picture(picture, 16).save(tmp_path / "other.png")
    other = generate(out, ["a person"], base=str(sd), out=tmp_path / "b.png", steps=2, control=tmp_path / "other.png")
    left_out = [
        generate(out, ["a person"], base=str(sd), out=tmp_path / f"{n}.png", steps=2, control=path, control_scale=0.0)
        for n, path in enumerate((picture, tmp_path / "other.png"))
    ]
    assert first[0].read_bytes() != other[0].read_bytes()
    assert left_out[0][0].read_bytes() == left_out[1][0].read_bytes()
    with pytest.raises(ConfigError, match="follows canny pictures: give one with --control, or --edges-of"):
        generate(out, ["a person"], base=str(sd))
    shutil.rmtree(out / "checkpoint-1")
    (out / "hint_config.json").unlink()
    with pytest.raises(ConfigError, match="trained without control pictures"):
        generate(out, ["a person"], base=str(sd), control=picture)


@pytest.mark.parametrize("method", ["svfit", "oft", "peft:lora", "linear_probe"])
def test_sdxl_takes_the_same_recipe_with_any_method(sdxl, pairs, tmp_path, method):
    made = config(sdxl, pairs, tmp_path / "out", method)
    report = control(replace(made, gradient_checkpointing=True), progress=False)
    ours = report.lines[-1]
    assert ours.hint_numbers > 0 and (ours.numbers == 0) == (method == "linear_probe")


def test_resume_gives_the_same_file_and_refuses_other_pairs(sd, pairs, tmp_path):
    made = config(sd, pairs, tmp_path / "whole")
    control(made, progress=False)
    broken = replace(made, out=tmp_path / "broken")
    control(broken, progress=False)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-2")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"already holds checkpoint-1.*--overwrite"):
        control(broken, progress=False)
    again = replace(broken, resume_from_checkpoint="latest")
    others = tiny.pictures(tmp_path / "others", count=5, size=20)
    with pytest.raises(CheckpointError, match="pairs"):
        control(replace(again, data=replace(again.data, folder=others)), progress=False)
    with pytest.raises(CheckpointError, match=r"adapter\.hint_width"):
        control(replace(again, adapter=replace(again.adapter, hint_width=12)), progress=False)
    control(again, progress=False)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_going_on_begins_where_adapter_and_hint_encoder_ended(sd, pairs, tmp_path, capsys):
    start, out = tmp_path / "start", tmp_path / "out"
    made = config(sd, pairs, start, "lora", target_modules=("to_q", "to_v"))
    control(replace(made, data=replace(made.data, control="other", folder=controlled(pairs, tmp_path))), progress=False)
    words = ["train", "control", str(tmp_path / "controlled"), "--preset", "debug", "--from-adapter", str(start)]
    still = ["--learning-rate", "1e-12", "--transform-learning-rate", "1e-12", "--head-learning-rate", "1e-12"]
    assert main([*words, *still, "--out", str(out)]) == 0  # method, base, control, layers and width are the adapter's
    assert "| lora " in capsys.readouterr().out
    assert (out / "hint_config.json").read_bytes() == (start / "hint_config.json").read_bytes()
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, out))
    assert before.keys() == after.keys() and any("hint" in name for name in before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert main([*words, "--out", str(tmp_path / "moved")]) == 0
    moved = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert all(not torch.equal(moved[name], before[name]) for name in before if name.endswith("weight"))
    capsys.readouterr()
    for more, message in (
        (["--hint-width", "12"], "has width 8, and the settings ask for 12: leave --hint-width out"),
        (["--control", "canny"], "has control other, and the settings ask for canny"),
        (["--method", "svfit"], "is a lora adapter, and the settings ask for svfit"),
        (["--method", "linear_probe"], "leave out --method linear_probe"),
        (["--target-modules", "to_k"], "say otherwise: leave them out"),
    ):
        assert main([*words, *more, "--out", str(tmp_path / "refused")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "refused").exists(), more
    (start / "hint_config.json").unlink()
    with pytest.raises(ConfigError, match="was trained without control pictures"):
        control(replace(made, from_adapter=start, out=tmp_path / "refused"), progress=False)
    assert not (tmp_path / "refused").exists()


def controlled(pairs, tmp_path):
    """The pairs with a control picture each."""
    folder = tmp_path / "controlled"
    shutil.copytree(pairs, folder)
    (folder / "control").mkdir()
    for path in pairs.glob("*.png"):
        Image.open(path).convert("L").convert("RGB").save(folder / "control" / path.name)
    return folder


def test_a_file_without_its_hint_is_refused(sd, pairs, tmp_path):
    out = tmp_path / "out"
    control(config(sd, pairs, out), progress=False)
    path = out / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "hint" not in name}
    save_file(kept, path)
    with pytest.raises(AdapterFileError, match="hint"):
        generate(out, ["a person"], base=str(sd), edges_of=pairs / "0.png")


def test_bf16_base_trains_fp32_numbers_and_previews(sd, pairs, tmp_path):
    made = config(sd, pairs, tmp_path / "out")
    control(replace(made, train=replace(made.train, mixed_precision="bf16", preview_steps=2)), progress=False)
    assert Image.open(tmp_path / "out" / "preview-2.png").size[0] > 2 * 128
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "trained.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32} and any("hint" in name for name in saved)


def test_the_command_line_end_to_end(sd, pairs, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["train", "control", str(pairs), "--preset", "debug", "--base", str(sd), "--out", out]
    assert main([*words, "--method", "tlora(1,2)"]) == 0
    assert "| tlora(1,2)" in capsys.readouterr().out
    drawn = ["--base", str(sd), "--steps", "2", "--prompt", "a person", "--out", str(tmp_path / "drawn.png")]
    drawn.append("--overwrite")
    assert main(["generate", out, *drawn, "--edges-of", str(pairs / "1.png")]) == 0
    assert Image.open(tmp_path / "drawn.png").size == (16, 16)
    assert main(["generate", out, *drawn, "--control", str(tmp_path / "none.png")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["train", "control", str(pairs), "--control", "segmentation", "--base", str(sd), "--out", out]) == 2
    assert "no control picture" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_base_learns_to_follow_parts(tmp_path):
    from smidgen.tasks.control.pairs import write_pairs

    write_pairs(tmp_path / "pairs", "segmentation", 420, seed=0)
    made = ControlConfig(
        data=Data(tmp_path / "pairs", "segmentation", num_held_out=20, train_batch_size=16),
        train=LoopConfig(max_train_steps=250, lr_warmup_steps=20),
        show=Show(inference_steps=10),
        out=tmp_path / "out",
    )
    lines = {line.name: line.scores["miou"] for line in control(made, progress=False).lines}
    assert lines["real pictures"] > lines["tlora*(2,4)"] > lines["base without control"] + 0.03


def test_published_presets_are_the_papers_names():
    assert {"tlora(1,2)", "tlora*(1,1)", "tlora*(2,4)", "tlora(2,6)", "default", "debug"} == set(PRESETS)
    for name in control_settings.PUBLISHED:
        assert PRESETS[name].adapter.method == name and control_settings.rates(PRESETS[name]).residual > 0
    doubled = replace(PRESETS["tlora(2,6)"], adapter=Adapter("tlora(2,6)", learning_rate=4e-2))
    usual = control_settings.rates(PRESETS["tlora(2,6)"])
    assert control_settings.rates(doubled).transform == pytest.approx(usual.transform * 4e-2 / usual.residual)


@pytest.mark.parametrize("change, error, message", [
    ({"data": Data(None)}, DataError, "Which pictures"),
    ({"base": "embeded"}, ConfigError, "Did you mean 'embedded'"),
    ({"adapter": Adapter("tlorra")}, ConfigError, "Did you mean 'tlora'"),
])  # fmt: skip
def test_refusals_come_before_any_training(sd, pairs, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        control(replace(config(sd, pairs, tmp_path / "out"), **change), progress=False)
    assert not (tmp_path / "out").exists()
