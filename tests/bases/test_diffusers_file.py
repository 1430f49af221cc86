"""A plain LoRA of ours as the file that the genuine pipelines load, for every family that diffusers draws with."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.diffusers_file import NAME, write_lora
from smidgen.bases.families import load_base
from smidgen.errors import SmidgenError
from tests.training import tiny, tiny_flow

BUILT = {"sd": tiny.sd_folder, "sdxl": tiny.sdxl_folder}
FAMILIES = [*BUILT, *sorted(tiny_flow.BUILDERS)]


def made(family: str, folder):
    return BUILT[family](folder) if family in BUILT else tiny_flow.flow_folder(family, folder)


def trained(model, targets, method="lora") -> int:
    """Puts on an adapter whose numbers are as after a training; returns on how many layers."""
    smidgen.adapt(model, method, r=2, alpha=3.0, target_modules=list(targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("residual_b"):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sum(name.endswith("residual_b") for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_genuine_pipeline_reads_every_layer_and_draws_the_same(family, tmp_path):
    folder = made(family, tmp_path / "base")
    base = load_base(str(folder))
    layers = {base.component: trained(base.model, base.targets)}
    if family in BUILT:
        layers |= {name: trained(base.encoders[name], own) for name, own in base.train_text_encoders().items()}
    smidgen.set_strength(base.pipe, 0.5)
    tensors = load_file(write_lora(base.pipe, tmp_path / "lora"))
    assert len(tensors) == 2 * sum(layers.values())
    assert all(key.startswith((f"{base.component}.", "text_encoder")) for key in tensors)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)

    fresh = load_base(str(folder))
    fresh.pipe.load_lora_weights(tmp_path / "lora", weight_name=NAME)
    for name, count in layers.items():
        found = [layer for layer in getattr(fresh.pipe, name).modules() if len(getattr(layer, "lora_A", ()))]
        assert len(found) == count, name
    latents = torch.randn(1, *base.latent_shape(16), generator=torch.Generator().manual_seed(1))
    timesteps = base.schedule.timesteps(torch.tensor([0.5]))
    with torch.no_grad():
        ours, theirs = (
            b.predict(b.model, latents, timesteps, b.encode_prompts(["a red person"])) for b in (base, fresh)
        )
        with smidgen.disabled(base.pipe):
            plain = base.predict(base.model, latents, timesteps, base.encode_prompts(["a red person"]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_only_a_plain_lora_is_one(tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.sd_folder(tmp_path / "base"), safety_checker=None)
    with pytest.raises(SmidgenError, match="carries no adapter 'default'"):
        write_lora(pipe, tmp_path / "lora")
    smidgen.adapt(pipe, "svfit")
    with pytest.raises(SmidgenError, match=r"at unet\.\S+ is no plain LoRA"):
        write_lora(pipe, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_convolution_keeps_its_kernel(tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.sd_folder(tmp_path / "base"), safety_checker=None)
    trained(pipe.unet, ["conv1", "conv_in"])
    shapes = {value.shape[2:] for value in load_file(write_lora(pipe, tmp_path)).values()}
    assert shapes == {(3, 3), (1, 1)}
    fresh = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    fresh.load_lora_weights(tmp_path, weight_name=NAME)
    given = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*given)[0], fresh.unet(*given)[0], atol=1e-4, rtol=1e-4)
