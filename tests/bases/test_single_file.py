"""Bases in one file, in the names that other programs give their tensors: the same base as the folder they were made from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.bases.families import load_base
from smidgen.cli.dispatch import main
from smidgen.errors import ConfigError
from smidgen.tasks.personalize.plan import make_plan
from smidgen.tasks.personalize.settings import Adapter, PersonalizeConfig
from tests.training import tiny, tiny_flow, tiny_single


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    return tiny.sd_folder(folder / "sd"), folder / "sd.safetensors"


@pytest.fixture(scope="module", autouse=True)
def sd_file(sd):
    return tiny_single.sd_file(*sd)


def test_sdxl_and_sd_are_what_their_folders_are(sd, tmp_path):
    sdxl = tiny.sdxl_folder(tmp_path / "sdxl", second=24)
    for folder, file in (sd, (sdxl, tiny_single.sdxl_file(sdxl, tmp_path / "sdxl.safetensors"))):
        made, whole = load_base(file, config=folder), load_base(folder)
        assert made.fingerprint() == whole.fingerprint()
        prompts = [base.encode_prompts(["a red person"]) for base in (made, whole)]
        for a, b in zip(*(found.tensors.values() for found in prompts), strict=True):
            assert torch.equal(a, b)
        drawn = [
            base.draw_latents(own, [0], negative=own, steps=2, guidance=2.0)
            for base, own in zip((made, whole), prompts, strict=True)
        ]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("quantize", [None, "fp8", pytest.param("int8-torchao", marks=pytest.mark.slow)])
def test_a_transformer_alone_beside_the_rest_of_its_pipeline(quantize, tmp_path):
    folder = tiny_flow.flow_folder("z-image", tmp_path / "z")
    file = tiny_single.z_image_file(folder, tmp_path / "z.safetensors")
    made, whole = (load_base(name, config=own, quantize=quantize) for name, own in ((file, folder), (folder, None)))
    times, prompts = made.schedule.timesteps(torch.tensor([0.5])), whole.encode_prompts(["a person"])
    noisy = torch.randn(1, *whole.latent_shape(16))
    with torch.no_grad():
        found, wanted = (base.predict(base.model, noisy, times, prompts) for base in (made, whole))
    ours, theirs = made.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(_whole(ours[name]), _whole(theirs[name])) for name in theirs
    )
    torch.testing.assert_close(found, wanted)  # some processors round by where a mapped file lies in memory


def _whole(tensor):
    return tensor.dequantize() if hasattr(tensor, "qdata") else tensor.float()


def test_it_is_trained_on_drawn_with_verified_and_planned(sd, tmp_path, capsys, monkeypatch):
    folder, file = sd
    monkeypatch.chdir(tmp_path)
    base = ["--base", str(file), "--base-config", str(folder)]
    pictures = tiny.pictures(tmp_path / "pictures")
    words = ["personalize", str(pictures), "--preset", "debug", "--method", "svfit", "--train-batch-size", "2"]
    assert main([*words, *base, "--out", "me"]) == 0
    assert main(["verify", "me", *base]) == 0 and "ON" in capsys.readouterr().out
    assert main(["generate", "me", "--prompt", "a person", "--steps", "2", "--out", "drawn.png", *base]) == 0
    told, card = json.loads(Path("me/report.json").read_text()), Path("me/README.md").read_text()
    assert (told["base"], told["base_config"]) == ("sd.safetensors", "sd") and str(tmp_path) not in card
    assert "pipe = load_base('sd.safetensors', config='sd').pipe" in card
    plan = make_plan(
        PersonalizeConfig(base=str(file), base_config=str(folder), adapter=Adapter("svfit")), measured=False
    )
    assert plan.trained == told["entries"][1]["trained_numbers"]


def test_the_published_pipelines_configs_are_taken_from_the_cache(sd, tmp_path, monkeypatch):
    there = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(sd[0], there / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_base(sd[1]).fingerprint() == load_base(sd[0]).fingerprint()


def tampered(sd, path, change):
    tensors = load_file(sd[1])
    save_file(change(tensors), path)
    return str(path)


LORA = {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("change, message", [
    (lambda t: LORA, r"is an adapter's file"),
    (lambda t: t | {"model.diffusion_model.out.2.scale_weight": torch.ones(())}, "weights of 8 bits with scales"),
    (lambda t: {"some.weight": torch.zeros(2)}, "nothing in it says of which model. Give --base-config"),
    (lambda t: t, r"put together as 'stable-diffusion-v1-5/.*HF_HUB_OFFLINE is set. Give --base-config"),
])  # fmt: skip
def test_files_that_say_too_little_are_refused(change, message, sd, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        load_base(tampered(sd, tmp_path / "x.safetensors", change))


def without(*ends):
    return lambda t: {key: value for key, value in t.items() if not key.endswith(ends)}


@pytest.mark.parametrize("change, message", [
    (without("middle_block.0.in_layers.2.weight"), "lacks tensors of the model. It is not whole"),
    (without("decoder.conv_out.bias"), "lacks tensors of the model. It is not whole"),
    (without("layer_norm1.weight"), "lacks 2 tensors of a CLIPTextModel"),
    (lambda t: t | {"model.diffusion_model.out.2.bias": torch.zeros(7)}, "--base-config is another model's"),
])  # fmt: skip
def test_files_that_do_not_fit_their_config_are_refused(change, message, sd, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_base(tampered(sd, tmp_path / "x.safetensors", change), config=sd[0])


def test_other_files_are_refused_in_words(sd, tmp_path):
    for name, message in (
        ("model.ckpt", r"is a pickle, which runs whatever code.*save_file\(torch.load"),
        ("model.PT", "is a pickle"),
        ("diffusion_pytorch_model.bin", "is a pickle"),
        ("model.gguf", "is a GGUF"),
        ("models/model.safetensors", "There is no file 'models/model.safetensors'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_base(name)
    (tmp_path / "cut.safetensors").write_bytes(sd[1].read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is no whole safetensors file"):
        load_base(tmp_path / "cut.safetensors", config=sd[0])
    with pytest.raises(ConfigError, match="--base-config is another model's"):
        load_base(sd[1], config=tiny.sdxl_folder(tmp_path / "sdxl"))
    with pytest.raises(ConfigError, match=r"--base-config .* is for a base in one \.safetensors file"):
        load_base(sd[0], config=sd[0])
    with pytest.raises(ConfigError, match="There is no --base-config '/nowhere'"):
        load_base(sd[1], config="/nowhere")
