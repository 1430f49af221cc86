"""Distilled bases are recognised, refused, or trained beside a helper that is in no file of ours."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import smidgen
from smidgen.bases.distilled import Helper, distilled
from smidgen.bases.families import load_base
from smidgen.errors import CheckpointError, ConfigError
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data
from tests.training import tiny, tiny_flow

SIZE = 16


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    """Called as its users call it, and nothing else says what it is."""
    return tiny_flow.flow_folder("z-image", tmp_path_factory.mktemp("z") / "Z-Image-Turbo")


@pytest.fixture(scope="module")
def helper(z_image, tmp_path_factory):
    """A LoRA of random numbers in the spelling of ai-toolkit's training adapter."""
    base, g = load_base(str(z_image)), torch.Generator().manual_seed(5)
    tensors = {}
    for name in base.targets:
        layer = base.model.get_submodule(name)
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=g) * 0.2
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=g) * 0.2
    path = tmp_path_factory.mktemp("helper") / "helper.safetensors"
    save_file(tensors, path)
    return path


def settings(folder, pictures, out, **options):
    made = replace(
        PRESETS["debug"], base=str(folder), out=out, data=Data(pictures, resolution=SIZE, train_batch_size=2)
    )
    return replace(made, adapter=Adapter("lora", learning_rate=1e-2), **options)


def answer(base, seed=0):
    g = torch.Generator().manual_seed(seed)
    noisy = torch.randn(1, *base.latent_shape(SIZE), generator=g)
    with torch.no_grad():
        return base.predict(base.model, noisy, torch.tensor([0.5]), base.encode_prompts(["a person"]))


@pytest.mark.parametrize("name, found", [
    ("Z-Image-Turbo", True), ("stabilityai/sdxl-turbo", True), ("ByteDance/SDXL-Lightning", True), ("LCM_Dreamshaper_v7", True),
    ("Z-Image", False), ("ostris/Z-Image-De-Turbo", False), ("Turbo/stable-diffusion", False), ("flashlight", False),
    ("FLUX.2-klein-base-4B", False), ("undistilled-flux", False),
])  # fmt: skip
def test_names_that_say_it(name, found, z_image):
    base = load_base(str(z_image))
    base.name = name
    assert bool(distilled(base)) is found


@pytest.mark.parametrize("family", ["flux2-klein", "krea2"])
def test_pipelines_that_say_it(family, tmp_path):
    folder = tiny_flow.flow_folder(family, tmp_path / "mine")
    assert distilled(load_base(str(folder))) is None
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    made = settings(folder, tiny.pictures(tmp_path / "pictures", size=SIZE), tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"is distilled.*says is_distilled.*--helper-adapter FILE.*--helper-adapter none"
    ):
        personalize(made, progress=False)
    assert not (tmp_path / "out").exists()


def test_schedulers_that_say_it(tmp_path):
    folder = tiny.sd_folder(tmp_path / "sd")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    diffusers.LCMScheduler.from_config(pipe.scheduler.config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    assert distilled(load_base(str(folder))) == "its scheduler is a LCMScheduler"


def test_a_helper_is_its_lora_while_on_and_nothing_otherwise(z_image, helper):
    base, whole = load_base(str(z_image)), load_base(str(z_image))
    plain, tensors = answer(base), load_file(helper)
    made = Helper(base, helper)
    assert torch.equal(answer(base), plain)
    for name in whole.targets:
        a, b = (tensors[f"diffusion_model.{name}.lora_{part}.weight"] for part in "AB")
        whole.model.get_submodule(name).weight.data += b @ a
    with made.on():
        torch.testing.assert_close(answer(base), answer(whole), atol=1e-5, rtol=1e-4)
        smidgen.adapt(base.model, "tlora", target_modules=list(base.targets))  # over it, and at its start nothing
        torch.testing.assert_close(answer(base), answer(whole), atol=1e-5, rtol=1e-4)
        with made.on(False):
            assert torch.equal(answer(base), plain)
    assert torch.equal(answer(base), plain)


def test_it_trains_beside_a_helper_and_saves_itself_alone(z_image, helper, tmp_path):
    pictures = tiny.pictures(tmp_path / "pictures", size=SIZE)
    made = settings(z_image, pictures, tmp_path / "helped", helper_adapter=str(helper))
    made = replace(made, train=replace(made.train, preview_steps=2))
    assert personalize(made, progress=False).verified
    personalize(replace(made, out=tmp_path / "bare", helper_adapter="none"), progress=False)
    files = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("helped", "bare")]
    assert files[0].keys() == files[1].keys()  # no tensor of the helper's, but trained beside it
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])
    base = load_base(str(z_image))
    smidgen.load(base.model, tmp_path / "helped")
    assert smidgen.verify(base.model, tmp_path / "helped").ok

    shutil.rmtree(tmp_path / "helped" / "checkpoint-4")
    first = (tmp_path / "helped" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="helper"):
        personalize(replace(made, helper_adapter="none", resume_from_checkpoint="latest"), progress=False)
    personalize(replace(made, resume_from_checkpoint="latest"), progress=False)
    assert (tmp_path / "helped" / "adapter_model.safetensors").read_bytes() == first


def test_helpers_that_do_not_fit_are_refused(z_image, helper, tmp_path):
    base, tensors = load_base(str(z_image)), load_file(helper)
    with pytest.raises(ConfigError, match="there is none"):
        Helper(base, tmp_path / "nowhere.safetensors")
    name = next(key for key in tensors if ".lora_A." in key)
    for wrong, message in [
        (tensors | {name: torch.zeros(2, 7)}, "is another base's"),
        (tensors | {name: torch.full_like(tensors[name], float("nan"))}, "not finite"),
        ({"something": torch.zeros(2)}, "no LoRA"),
    ]:
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ConfigError, match=message):
            Helper(base, tmp_path / "wrong.safetensors")
    (tmp_path / "wrong.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match="no LoRA that diffusers reads"):
        Helper(base, tmp_path / "wrong.safetensors")
