"""One set of calls for modules and pipelines, text encoders included, and for every method of peft's."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from damage import rewrite
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters import api
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError
from tests.training import tiny

from .helpers import Net, inputs

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UNET, TEXT = ["to_q", "to_v"], ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.sd_folder(tmp_path_factory.mktemp("pipe") / "sd")


@pytest.fixture
def pipe(folder: Path) -> Any:
    return opened(folder)


def opened(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.unet.eval(), pipe.text_encoder.eval()
    return pipe


def adapted(pipe: Any, name: str = "default", seed: int = 1, unet: bool = True, text: bool = True) -> Any:
    if unet:
        smidgen.adapt(pipe, "svfit", name, r=4, target_modules=UNET)
        testing.perturb(pipe.unet, seed, 3.0, name)
    if text:
        smidgen.adapt(pipe.text_encoder, "lora", name, r=2, target_modules=TEXT)
        testing.perturb(pipe.text_encoder, seed, 1.0, name)
    return pipe


@torch.no_grad()
def answers(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(the text encoder's, the UNet's)."""
    text = pipe.text_encoder(torch.arange(8)[None]).last_hidden_state
    noise = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return text, pipe.unet(noise, 7, torch.ones_like(text)).sample


def same(a: Any, b: Any) -> list[bool]:
    return [bool(torch.allclose(x, y, atol=1e-6)) for x, y in zip(a, b, strict=True)]


# ---- pipelines ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_s_file_holds_all_and_load_puts_all_back(folder, tmp_path):
    pipe = adapted(opened(folder))
    out = smidgen.save(pipe, tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        CONFIG, WEIGHTS, f"text_encoder/{CONFIG}", f"text_encoder/{WEIGHTS}",
    ]  # fmt: skip
    fresh = opened(folder)
    assert same(answers(fresh), answers(pipe)) == [False, False]
    assert smidgen.load(fresh, out, "other") is fresh
    assert same(answers(fresh), answers(pipe)) == [True, True] and smidgen.names(fresh) == ["other"]
    report = smidgen.verify(fresh, out)
    assert report.verdict == "ON" and set(report.parts) == {"denoiser", "text_encoder"}
    assert report.layers == sum(part.layers for part in report.parts.values()) == report.called
    assert "text_encoder: adapter is ON" in str(report)
    assert smidgen.verify(opened(folder), out).ok  # a plain base, loaded for the check
    again = smidgen.save(fresh, tmp_path / "again", "other")
    for file in (WEIGHTS, f"text_encoder/{WEIGHTS}"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_an_adapter_of_the_denoiser_alone_is_the_folder_it_always_was(folder, tmp_path):
    pipe = adapted(opened(folder), text=False)
    smidgen.save(pipe, tmp_path / "pipe"), smidgen.save(pipe.unet, tmp_path / "unet")
    for part in (tmp_path / "pipe", tmp_path / "unet"):
        assert sorted(p.name for p in part.iterdir()) == [CONFIG, WEIGHTS]
        fresh = smidgen.load(opened(folder), part)
        assert same(answers(fresh), answers(pipe)) == [True, True] and not smidgen.names(fresh.text_encoder)
        assert smidgen.verify(fresh, part).ok and not smidgen.verify(fresh, part).parts
    smidgen.load(opened(folder).unet, tmp_path / "pipe")


def test_an_adapter_of_a_text_encoder_alone(folder, tmp_path):
    pipe = adapted(opened(folder), unet=False)
    out = smidgen.save(pipe, tmp_path / "out")
    assert [p.name for p in out.iterdir()] == ["text_encoder"]
    fresh = smidgen.load(opened(folder), out)
    assert same(answers(fresh), answers(pipe)) == [True, True] and smidgen.names(fresh.unet) == []
    assert smidgen.verify(fresh, out).ok
    with pytest.raises(AdapterFileError, match="text_encoder"):
        smidgen.load(opened(folder).unet, out)


def test_saving_again_leaves_no_part_of_the_last_save(folder, tmp_path):
    smidgen.save(adapted(opened(folder)), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    smidgen.save(adapted(opened(folder), text=False), tmp_path)
    fresh = smidgen.load(opened(folder), tmp_path)
    assert smidgen.names(fresh.text_encoder) == [] and (tmp_path / "notes.txt").exists()


def test_a_part_that_does_not_fit_leaves_the_whole_pipeline_as_it_was(pipe, folder, tmp_path):
    out = smidgen.save(adapted(opened(folder)), tmp_path)
    before = testing.snapshot(pipe.unet), testing.snapshot(pipe.text_encoder)
    file = out / "text_encoder" / WEIGHTS
    good = load_file(file)
    rewrite(file, b"short")
    with pytest.raises(AdapterFileError, match=r"text_encoder.*truncated"):
        smidgen.load(pipe, out)
    file.unlink()
    save_file({k: v * float("nan") for k, v in good.items()}, file)
    with pytest.raises(AdapterFileError, match=r"text_encoder.*SHA-256"):
        smidgen.load(pipe, out)
    report = smidgen.verify(pipe, out)
    assert report.verdict == "OFF" and report.reasons[0].startswith("text_encoder: ")
    (out / "text_encoder").rename(out / "text_encoder_2")
    with pytest.raises(AdapterFileError, match=r"text_encoder_2.*a StableDiffusionPipeline has not"):
        smidgen.load(pipe, out)
    testing.unchanged(before[0], pipe.unet, "unet")
    testing.unchanged(before[1], pipe.text_encoder, "text encoder")


def test_folders_of_other_names_are_not_read(folder, tmp_path):
    out = smidgen.save(adapted(opened(folder), text=False), tmp_path)
    smidgen.save(adapted(opened(folder), text=False, seed=2), out / "checkpoint-5")
    assert smidgen.names(smidgen.load(opened(folder), out)) == ["default"]


def test_loading_into_the_denoiser_alone_says_what_is_left_out(folder, tmp_path, caplog):
    out = smidgen.save(adapted(opened(folder)), tmp_path)
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.load(opened(folder).unet, out)
    assert "text_encoder: load it into the pipeline" in caplog.text


def test_a_text_encoder_that_lost_its_adapter_is_off(pipe, folder, tmp_path):
    out = smidgen.save(adapted(opened(folder)), tmp_path)
    smidgen.load(pipe, out)
    smidgen.set_active(pipe.text_encoder, [])
    report = smidgen.verify(pipe, out)
    assert report.verdict == "OFF" and "text_encoder: Adapter 'default' is loaded but not active" in report.reasons[0]
    assert report.parts["denoiser"].ok


def test_all_calls_reach_all_components(pipe):
    plain = answers(pipe)
    adapted(pipe, "a"), adapted(pipe, "b", seed=2, text=False)
    assert smidgen.names(pipe) == ["a", "b"] and api.parts(pipe).keys() >= {"", "text_encoder", "vae"}
    assert smidgen.trained_numbers(pipe, "a") == smidgen.trained_numbers(pipe.unet, "a") + smidgen.trained_numbers(
        pipe.text_encoder
    )
    smidgen.set_active(pipe, "a")
    on = answers(pipe)
    assert same(on, plain) == [False, False]
    smidgen.set_active(pipe, "b")  # which the text encoder has not: there it is the base
    assert same(answers(pipe), plain) == [True, False]
    smidgen.set_active(pipe, ["a", "b"])
    assert same(answers(pipe), on) == [True, False]
    smidgen.set_active(pipe, "a")
    with smidgen.disabled(pipe):
        assert all(torch.equal(x, y) for x, y in zip(answers(pipe), plain, strict=True))
    assert same(answers(pipe), on) == [True, True]
    smidgen.set_strength(pipe, {"a": 0.0})
    assert same(answers(pipe), plain) == [True, True]
    smidgen.set_strength(pipe, 1.0)
    groups = smidgen.parameter_groups(pipe, lr=0.1)
    assert sum(p.numel() for g in groups for p in g["params"]) == smidgen.trained_numbers(pipe, "a")
    for call in (smidgen.set_active, lambda p, n: smidgen.merge(p, [n]), lambda p, n: smidgen.save(p, "no", n)):
        with pytest.raises(SmidgenError, match="carries no adapter 'c'"):
            call(pipe, "c")
    assert smidgen.merge(pipe) is pipe and smidgen.names(pipe) == []
    assert same(answers(pipe), on) == [True, True]


# ---- peft's own methods -------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "head": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=TARGETS),
}


def perturbed(model: nn.Module) -> nn.Module:
    for number, (name, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            with torch.no_grad():
                p += (0.3 if "logits" not in name else 3.0) * noise
    return model


def of_peft(kind: str, name: str = "default") -> nn.Module:
    return perturbed(smidgen.adapt(Net(), CONFIGS[kind](), name).eval())


@pytest.fixture(autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_s_methods_go_through_every_call(kind, tmp_path):
    model, x = of_peft(kind), inputs()
    on, off = model(x).detach(), Net()(x).detach()
    assert not torch.allclose(on, off) and smidgen.names(model) == ["default"]
    heads = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad) - heads
    assert smidgen.trained_numbers(model) == wanted
    assert sum(p.numel() for g in smidgen.parameter_groups(model, 0.1) for p in g["params"]) == wanted + heads
    with smidgen.disabled(model):
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), on) and any(p.requires_grad for p in model.parameters())
    folder = smidgen.save(model, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    fresh = smidgen.load(Net().eval(), folder, "other")
    torch.testing.assert_close(fresh(x), on)
    for one in (fresh, Net()):
        report = smidgen.verify(one, folder, (x,))
        assert report.ok, report.reasons
    theirs = peft.PeftModel.from_pretrained(Net(), folder)  # peft reads what we wrote
    torch.testing.assert_close(theirs.eval()(x), on)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()  # as peft writes it
    torch.testing.assert_close(smidgen.load(Net().eval(), tmp_path / "theirs")(x), on)
    merged = smidgen.merge(fresh)
    torch.testing.assert_close(merged(x), on, atol=1e-4, rtol=1e-4)
    assert [type(m) for m in merged.modules()] == [type(m) for m in Net().modules()] and smidgen.names(merged) == []


@pytest.mark.parametrize("kind", ["lora", "head", "vera"])
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(kind, tmp_path):
    folder = smidgen.save(of_peft(kind), tmp_path)
    good = load_file(folder / WEIGHTS)
    name = next(iter(good))
    model = Net()
    before = testing.snapshot(model)
    for damaged, message in [
        ({k: v for k, v in good.items() if k != name}, "missing"),
        (good | {"base_model.model.more": torch.ones(2)}, "unexpected"),
        (good | {name: good[name] * float("nan")}, "NaN"),
        (good | {name: torch.cat([good[name], good[name]])}, "does not fit"),
    ]:
        (folder / WEIGHTS).unlink()
        save_file(damaged, folder / WEIGHTS)
        with pytest.raises(AdapterFileError, match=message):
            smidgen.load(model, folder)
        testing.unchanged(before, model, message)
        assert smidgen.verify(model, folder, (inputs(),)).verdict == "OFF"
    testing.unchanged(before, model, "verifying")


def test_a_strength_is_a_factor_or_an_error():
    model, x = of_peft("lora"), inputs()
    on, off = model(x).detach(), Net()(x).detach()
    smidgen.set_strength(model, 0.0)
    torch.testing.assert_close(model(x), off)
    smidgen.set_strength(model, {"default": 1.0})
    assert torch.equal(model(x), on)
    for kind in ("oft", "vera"):
        model = of_peft(kind)
        on = model(x).detach()
        with pytest.raises(SmidgenError, match="'default' has no strength"):
            smidgen.set_strength(model, 0.5)
        assert torch.equal(model(x), on)


def test_several_adapters_of_peft_s_and_a_refusal():
    model, x = of_peft("lora"), inputs()
    one = model(x).detach()
    smidgen.adapt(model, peft.LoraConfig(r=3, target_modules=TARGETS), "second")
    perturbed(model)
    smidgen.set_active(model, "default")
    assert not torch.equal(model(x), Net()(x)) and smidgen.names(model) == ["default", "second"]
    smidgen.set_active(model, ["default", "second"])
    both = model(x).detach()
    assert not torch.allclose(both, one)
    before = testing.snapshot(model)
    with pytest.raises(smidgen.TargetError, match="no module is named 'nothing'"):
        smidgen.adapt(model, peft.LoraConfig(target_modules=["nothing"]), "third")
    testing.unchanged(before, model, "a refused config")
    with pytest.raises(ConfigError, match="peft refuses its own PromptTuningConfig"):
        smidgen.adapt(Net(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("first, second", [
    ("svfit", CONFIGS["lora"]), (CONFIGS["lora"], "svfit"), (CONFIGS["lora"], CONFIGS["loha"]),
])  # fmt: skip
def test_two_kinds_share_a_model_but_no_layer(first, second, tmp_path):
    def put(model: nn.Module, method: Any, name: str, *targets: str) -> nn.Module:
        own = smidgen.config(method) if isinstance(method, str) else method()
        own.target_modules = set(targets)
        return perturbed(smidgen.adapt(model, own, name)).eval()

    model, x = put(Net(), first, "a", "q_proj"), inputs()
    one, before = model(x).detach(), testing.snapshot(model)
    with pytest.raises(smidgen.TargetError, match=r"'layers\.0\.q_proj' carries an adapter of another kind"):
        put(model, second, "b", "q_proj", "v_proj")
    testing.unchanged(before, model, "a refused adapter")
    with pytest.raises(smidgen.TargetError, match="another kind"):
        smidgen.load(model, smidgen.save(put(Net(), second, "b", "q_proj"), tmp_path / "b", "b"), "b")
    testing.unchanged(before, model, "a refused file")
    put(model, second, "b", "v_proj")
    smidgen.set_active(model, ["a", "b"])
    both = model(x).detach()
    smidgen.set_active(model, "a")
    torch.testing.assert_close(model(x), one)
    for name in ("a", "b"):
        smidgen.load(fresh := Net().eval(), smidgen.save(model, tmp_path / name, name), name)
        smidgen.set_active(model, name)
        torch.testing.assert_close(fresh(x), model(x))
        assert smidgen.verify(model, tmp_path / name, (x,)).ok
    smidgen.set_active(model, ["a", "b"])
    torch.testing.assert_close(smidgen.merge(model)(x), both, atol=1e-5, rtol=1e-4)
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]


def test_another_adapter_of_the_same_kind_is_not_it(tmp_path):
    folder = smidgen.save(of_peft("lora"), tmp_path)
    model = smidgen.adapt(Net(), CONFIGS["lora"]())
    report = smidgen.verify(model, folder, (inputs(),))
    assert report.verdict == "OFF" and "holds the numbers of this file" in report.reasons[0]
