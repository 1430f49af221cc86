"""The command line: help, one clear line for user errors, and whole commands on a tiny pipeline."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import smidgen
from smidgen import cli, testing
from smidgen.cli.table import COMMANDS, GROUPS, summaries
from smidgen.tasks.personalize import recipe
from smidgen.tasks.png import read_facts
from smidgen.training.interrupts import TrainingInterrupted


def call(capsys, *words):
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def trained(sd, tmp_path_factory):
    from tests.training import tiny

    folder = tmp_path_factory.mktemp("cli")
    out = folder / "out"
    words = [
        tiny.pictures(folder / "pictures"),
        "--method",
        "svfit",
        "--base",
        sd,
        "--out",
        out,
        "--max_train_steps",
        2,
    ]
    words += ["--rank", 4, "--num-prompts", 1, "--num-seeds", 1, "--inference_steps", 1, "--lr-warmup-steps", 0]
    assert cli.main(["personalize", *map(str, words)]) == 0
    return out


def test_overview_and_help(capsys):
    for words in ([], ["--help"]):
        status, out, _ = call(capsys, *words)
        assert status == 0 and all(name in out for name in summaries())
    for name in (*COMMANDS, *GROUPS):
        status, out, _ = call(capsys, *name.split(), "--help")
        assert status == 0 and f"smidgen {name}" in out
    assert "--max-train-steps" in call(capsys, "personalize", "--help")[1]


@pytest.mark.parametrize("words, message", [
    (["persnalize"], "smidgen: There is no command 'persnalize'. Did you mean 'personalize'"),
    (["personalize", "/nowhere"], "smidgen: /nowhere is not a folder of pictures."),
    (["personalize", "x", "--preset", "debugg"], "Did you mean 'debug'?"),
    (["personalize", "x", "--config", "/nowhere.yaml"], "cannot be read"),
    (["inspect", "/nowhere"], "/nowhere"),
    (["verify", "/nowhere"], "/nowhere"),
    (["count", "svift", "--architecture", "sd15"], "Did you mean 'svfit'"),
    (["config", "validate", "/nowhere.yaml"], "cannot be read"),
])  # fmt: skip
def test_user_errors_are_one_line_and_status_2(capsys, sd, words, message):
    words = [*words, "--base", sd] if words[0] == "personalize" and len(words) == 2 else words
    status, out, err = call(capsys, *words)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1 and out == ""


def test_unknown_flags_are_errors_with_a_suggestion(capsys):
    status, _, err = call(capsys, "personalize", "x", "--learning-rat", "1")
    assert status == 2 and "--learning-rate" in err


def test_personalize_writes_and_reports(trained, capsys):
    assert (trained / "adapter_model.safetensors").exists()
    assert json.loads((trained / "report.json").read_text())["method"] == "svfit"


def test_generate_is_seeded_and_strength_nought_is_the_base(trained, sd, tmp_path, capsys):
    words = ["generate", trained, "--base", sd, "--steps", 2, "--prompt", "a person", "--seed", 3]
    status, out, _ = call(capsys, *words, "--out", tmp_path / "a", "--num-images", 2)
    files = sorted((tmp_path / "a").iterdir())
    assert status == 0 and [str(file) for file in files] == out.split()
    assert pixels(files[0]) != pixels(files[1])
    call(capsys, *words, "--out", tmp_path / "again.png")
    assert pixels(tmp_path / "again.png") == pixels(files[0])
    call(capsys, *words, "--out", tmp_path / "off.png", "--strength", 0)
    assert pixels(tmp_path / "off.png") != pixels(files[0])
    status, _, err = call(capsys, *words, "--out", tmp_path / "two.png", "--num-images", 2)
    assert status == 2 and "one picture" in err


def test_pictures_carry_how_they_were_drawn_and_inspect_shows_it(trained, sd, tmp_path, capsys):
    words = ["--base", sd, "--steps", 2, "--prompt", "a person", "a café", "--seed", 3, "--strength", 0.5]
    status, out, _ = call(capsys, "generate", trained, *words, "--out", tmp_path)
    facts = [read_facts(Path(line)) for line in out.splitlines()]
    assert status == 0 and [(one["prompt"], one["seed"]) for one in facts] == [("a person", 3), ("a café", 3)]
    weights = hashlib.sha256((trained / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert facts[0]["adapter"] == {"name": "out", "method": "svfit", "fingerprint": weights[:12]}
    assert (facts[0]["base"], facts[0]["steps"], facts[0]["strength"]) == ("sd", 2, 0.5)
    status, out, _ = call(capsys, "inspect", tmp_path / out.splitlines()[0])
    assert status == 0 and '"a person"' in out and weights[:12] in out
    sheet = read_facts(trained / "contact_sheet.png")
    assert sheet["adapters"][0]["fingerprint"] == weights[:12] and sheet["prompts"] and sheet["seeds"]
    assert read_facts(trained / "loss.png")["runs"]


def test_verify_and_inspect(trained, sd, sdxl, capsys):
    status, out, _ = call(capsys, "verify", trained, "--base", sd)
    assert status == 0 and "adapter is ON" in out
    status, out, err = call(capsys, "verify", trained, "--base", sdxl)
    assert status == 2 and "adapter is OFF" in out and "does not verify on" in err
    status, out, _ = call(capsys, "inspect", trained)
    assert (
        status == 0
        and "svfit" in out
        and "adapter_model.safetensors:" in out
        and "base lock:" in out
        and "weights adapted" in out
    )


def test_a_pipeline_s_text_encoder_comes_back_too(sd, capsys, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd)
    smidgen.adapt(pipe.text_encoder, "lora", r=2, target_modules=["q_proj", "v_proj"])
    testing.perturb(pipe.text_encoder, 1, 1.0)
    smidgen.adapt(pipe, "svfit", r=2, target_modules=["to_q"])
    testing.perturb(pipe.unet, 1, 1.0)
    both = smidgen.save(pipe, tmp_path / "both")
    alone = smidgen.save(pipe.unet, tmp_path / "alone")
    words = ("--base", sd, "--prompt", "a red house", "--steps", 2)
    for folder in (both, alone):
        assert call(capsys, "generate", folder, *words, "--out", tmp_path / f"{folder.name}.png")[0] == 0
    assert pixels(tmp_path / "both.png") != pixels(tmp_path / "alone.png")
    status, out, _ = call(capsys, "verify", both, "--base", sd)
    assert status == 0 and "denoiser: adapter is ON" in out and "text_encoder: adapter is ON" in out


def test_peft_s_own_adapter_is_verified_and_has_a_strength(sd, capsys, tmp_path):
    import peft
    from diffusers import StableDiffusionPipeline

    unet = StableDiffusionPipeline.from_pretrained(sd).unet
    smidgen.adapt(unet, peft.LoraConfig(r=2, target_modules=["to_q"]))
    words = ("--base", sd, "--prompt", "a red house", "--steps", 2)
    status, out, _ = call(capsys, "verify", smidgen.save(unet, tmp_path / "start"), "--base", sd)
    assert status == 2 and "adapter is OFF" in out  # B is still zero
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    folder = smidgen.save(unet, tmp_path / "trained")
    assert call(capsys, "verify", folder, "--base", sd)[0] == 0
    for strength in (1, 0):
        assert (
            call(capsys, "generate", folder, *words, "--strength", strength, "--out", tmp_path / f"{strength}.png")[0]
            == 0
        )
    assert pixels(tmp_path / "1.png") != pixels(tmp_path / "0.png")


def test_methods_and_config(capsys, tmp_path):
    status, out, _ = call(capsys, "methods")
    assert status == 0 and all(name in out for name in ("tlora", "svfit", "loldu", "oft"))
    _, shown, _ = call(capsys, "config", "show", "--preset", "debug")
    path = tmp_path / "config.yaml"
    path.write_text(shown)
    assert call(capsys, "config", "validate", path)[0] == 0
    assert call(capsys, "config", "show", path)[1] == shown
    path.write_text(shown.replace("seed:", "sead:"))
    status, _, err = call(capsys, "config", "validate", path)
    assert status == 2 and "Unknown key 'train.sead'" in err


def test_flags_override_the_config_file(capsys, tmp_path, monkeypatch, pictures):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"data: {{folder: {pictures}}}\nadapter: {{method: svfit}}\ntrain: {{seed: 5, max_train_steps: 9}}\n"
    )
    seen = []
    monkeypatch.setattr(recipe, "personalize", lambda config: seen.append(config) or _stop())
    call(capsys, "personalize", "--config", path, "--max_train_steps", 7, "--no-compare-lora", "--output_dir", "there")
    (config,) = seen
    assert config.data.folder == pictures and config.adapter.method == "svfit"
    assert (config.train.seed, config.train.max_train_steps) == (5, 7)
    assert config.show.compare_lora is False and str(config.out) == "there"
    call(capsys, "personalize", "elsewhere", "--config", path, "--compare-lora")
    assert str(seen[1].data.folder) == "elsewhere" and seen[1].show.compare_lora is True


def _stop():
    raise KeyboardInterrupt


def test_ctrl_c_and_sigterm_have_their_statuses(capsys, monkeypatch):
    monkeypatch.setattr(recipe, "personalize", lambda config: _stop())
    assert call(capsys, "personalize", "x")[0] == 130

    def interrupted(config):
        raise TrainingInterrupted("Stopped by SIGTERM", 15)

    monkeypatch.setattr(recipe, "personalize", interrupted)
    status, _, err = call(capsys, "personalize", "x")
    assert status == 143 and err == "smidgen: Stopped by SIGTERM\n"
