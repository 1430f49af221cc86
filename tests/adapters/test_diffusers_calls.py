"""diffusers' own LoRA calls on adapters of ours end in a sentence; on a LoRA they are diffusers'."""

import subprocess
import sys

import pytest

import smidgen
from smidgen.errors import SmidgenError

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.training.tiny import sd_folder

    return sd_folder(tmp_path_factory.mktemp("pipe"))


def pipe_of(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_our_adapter_is_not_written_as_a_lora_nor_our_folder_read_as_one(folder, tmp_path):
    pipe = smidgen.adapt(pipe_of(folder), "svfit", r=2)
    with pytest.raises(
        SmidgenError, match=r"'default' is one of smidgen's: smidgen\.save.*`smidgen export ADAPTER --to diffusers"
    ):
        pipe.unet.save_lora_adapter(tmp_path / "lora")
    state = peft.get_peft_model_state_dict(pipe.unet)
    with pytest.raises(SmidgenError, match=r"the unet numbers given are of an adapter of smidgen's.*`smidgen export"):
        pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=state)
    assert not (tmp_path / "lora").exists()
    smidgen.save(pipe, tmp_path / "own")
    for given in ({}, {"weight_name": "adapter_model.safetensors"}):
        with pytest.raises(
            SmidgenError, match=r"smidgen\.load\(pipe, .*`smidgen export .*own --to diffusers --out DIR`"
        ):
            pipe_of(folder).load_lora_weights(str(tmp_path / "own"), **given)
    with pytest.raises(SmidgenError, match="`smidgen export"):
        pipe_of(folder).unet.load_lora_adapter(str(tmp_path / "own"), prefix=None)
    assert smidgen.names(smidgen.load(pipe_of(folder), tmp_path / "own")) == ["default"]


def test_a_lora_is_written_and_read_as_ever(folder, tmp_path):
    pipe = pipe_of(folder)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    pipe.unet.save_lora_adapter(tmp_path / "one")
    pipe.save_lora_weights(tmp_path / "two", unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    pipe_of(folder).load_lora_weights(str(tmp_path / "two"))
    pipe_of(folder).unet.load_lora_adapter(
        str(tmp_path / "one"), prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )


@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize(
    "first", ["import smidgen; import diffusers", "import diffusers.loaders.lora_pipeline; import smidgen"]
)
def test_whichever_is_imported_first(first):
    code = f"{first}; from diffusers import StableDiffusionPipeline as P, UNet2DConditionModel as U; from diffusers.loaders import lora_base, peft;"
    code += "from diffusers.loaders.lora_pipeline import _fetch_state_dict as f; g = lora_base._fetch_state_dict; h = peft._fetch_state_dict;"
    code += (
        "assert all(hasattr(x, '__wrapped__') for x in (f, g, h, P.pack_weights, U.save_lora_adapter)) and f is g is h"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
