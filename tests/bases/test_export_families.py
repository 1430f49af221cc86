"""Adapters as files that the genuine pipelines load, for every family that diffusers draws with."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.checkpoint.files import LORA_NAME
from smidgen.adapters.export import export, layers
from smidgen.bases.families import load_base
from smidgen.errors import SmidgenError
from tests.adapters.exported import TOLERANCE, moved, same_changes
from tests.training import tiny, tiny_flow

BUILT = {"sd": tiny.sd_folder, "sdxl": tiny.sdxl_folder}
FAMILIES = [*BUILT, *sorted(tiny_flow.BUILDERS)]
CASES = [("diffusers", family) for family in FAMILIES] + [("kohya", family) for family in BUILT]


def made(family: str, folder):
    return BUILT[family](folder) if family in BUILT else tiny_flow.flow_folder(family, folder)


def trained(model, targets, method="lora") -> int:
    """Puts on an adapter whose numbers are as after a training; returns on how many layers."""
    smidgen.adapt(model, method, r=2, alpha=3.0, target_modules=list(targets))
    return moved(model)


def same_answer(base, fresh):
    """Holds that another reader's base answers as ours does; ours, and without the adapter."""
    latents = torch.randn(1, *base.latent_shape(16), generator=torch.Generator().manual_seed(1))
    timesteps = base.schedule.timesteps(torch.tensor([0.5]))
    with torch.no_grad():
        ours, theirs = (
            b.predict(b.model, latents, timesteps, b.encode_prompts(["a red person"])) for b in (base, fresh)
        )
        with smidgen.disabled(base.pipe):
            plain = base.predict(base.model, latents, timesteps, base.encode_prompts(["a red person"]))
    assert (ours - theirs).norm() <= TOLERANCE * (ours - plain).norm()
    return ours, plain


@pytest.mark.parametrize(("to", "family"), CASES)
def test_the_genuine_pipeline_reads_every_layer_and_draws_the_same(to, family, tmp_path):
    folder = made(family, tmp_path / "base")
    base = load_base(str(folder))
    counts = {base.component: trained(base.model, base.targets)}
    if family in BUILT:
        counts |= {name: trained(base.encoders[name], own, "svfit") for name, own in base.train_text_encoders().items()}
    smidgen.set_strength(base.pipe, 0.5)
    found = export(base.pipe, tmp_path / "lora.safetensors", to)
    assert found.layers == sum(counts.values()) == len(layers(base.pipe))

    fresh = load_base(str(folder))
    fresh.pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    for name, count in counts.items():
        theirs = {n: m for n, m in getattr(fresh.pipe, name).named_modules() if len(getattr(m, "lora_A", ()))}
        assert len(theirs) == count, name
        same_changes(getattr(base.pipe, name), theirs)
    ours, plain = same_answer(base, fresh)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_diffusers_reads_dora(family, tmp_path):
    folder = made(family, tmp_path / "base")
    base, fresh = load_base(str(folder)), load_base(str(folder))
    trained(base.model, base.targets, "dora")
    export(base.pipe, tmp_path / "lora.safetensors", "diffusers")
    fresh.pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    same_answer(base, fresh)
    smidgen.set_strength(base.pipe, 0.5)
    with pytest.raises(SmidgenError, match=r"has a magnitude, and peft's DoRA has no strength.*--to full-diff"):
        export(base.pipe, tmp_path / "half.safetensors", "diffusers")


def test_only_what_is_a_lora_is_one(tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.sd_folder(tmp_path / "base"), safety_checker=None)
    with pytest.raises(SmidgenError, match="carries no adapter 'default'"):
        export(pipe, tmp_path / "lora", "diffusers")
    smidgen.adapt(pipe, "tlora")
    with pytest.raises(SmidgenError, match=r"tlora.* at unet\.\S+ multiplies the weight by a transform of full rank"):
        export(pipe, tmp_path / "lora", "diffusers")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_convolution_keeps_its_kernel(to, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.sd_folder(tmp_path / "base"), safety_checker=None)
    trained(pipe.unet, ["conv1", "conv_in"], "svfit")
    export(pipe, tmp_path / LORA_NAME, to)
    shapes = {value.shape[2:] for value in load_file(tmp_path / LORA_NAME).values() if value.ndim > 1}
    assert shapes == {(3, 3), (1, 1)}
    fresh = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    fresh.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    theirs = {n: m for n, m in fresh.unet.named_modules() if len(getattr(m, "lora_A", ()))}
    assert len(theirs) == len(layers(pipe))
    same_changes(pipe.unet, theirs)
