"""Training that goes on from a predicted adapter, as a person does it."""

import pytest
from peft import LoraConfig, get_peft_model

import smidgen
from smidgen.bases.families import load_base
from smidgen.bases.origin import read_origin
from smidgen.cli import main

FEW = ["--max-train-steps", "2", "--lr-warmup-steps", "0", "--num-prompts", "1", "--num-seeds", "1"]
FEW += ["--inference-steps", "1", "--no-compare-lora"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject") / "pictures"
    assert main(["subject", str(folder), "--seed", "7", "--num-pictures", "5"]) == 0
    return folder


def test_from_a_prediction(pictures, tmp_path):
    predicted, out = tmp_path / "predicted", tmp_path / "trained"
    assert main(["predict", str(pictures / "001.png"), "--out", str(predicted), "--no-sheet"]) == 0
    assert read_origin(predicted).method == "lora"
    assert main(["personalize", str(pictures), "--from-adapter", str(predicted), "--out", str(out), *FEW]) == 0
    before, after = (smidgen.load(load_base("embedded").model, folder) for folder in (predicted, out))
    moved = [
        float((a - b).detach().abs().max())
        for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if "smidgen" in name
    ]
    assert 0 < max(moved) < 0.1  # two steps from where it was predicted, and not from nothing
    assert str(predicted) in (out / "config.yaml").read_text()


def test_from_what_peft_made(pictures, tmp_path, capsys):
    unet = load_base("embedded").model
    get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "foreign")
    words = ["personalize", str(pictures), "--from-adapter", str(tmp_path / "foreign"), "--out", str(tmp_path / "out")]
    assert main(words + FEW) == 2
    said = capsys.readouterr().err
    assert "foreign" in said and "peft" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
