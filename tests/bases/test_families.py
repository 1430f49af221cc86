"""Every family of bases by the same tests: a new one is a row in ``BUILT``, and what it draws or reads is held to its own library."""

import inspect
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

import smidgen
from smidgen.adapters.methods import KINDS
from smidgen.bases.embedded.encoders import load_encoder
from smidgen.bases.embedded.judge import load_judge
from smidgen.bases.embedded.parts_reader import load_parts_reader
from smidgen.bases.families import FAMILIES, card_lines, learning_kind, load_base
from smidgen.bases.flow_transformers import FlowTransformer
from smidgen.bases.protocol import ImageBase, Prompts, ReadingBase
from smidgen.bases.schedules import PREDICTIONS, DiscreteSchedule, FlowSchedule
from smidgen.bases.stable_diffusion import StableDiffusion
from smidgen.bases.transformers import Head, load_classifier, load_language_model
from smidgen.errors import ConfigError, SmidgenError
from tests.training import tiny, tiny_flow, tiny_models

BUILT: dict[str, Callable[[Path], str]] = {  # family -> the name of a small base of it, made in a folder
    "embedded": lambda folder: "embedded",
    "embedded-flow": lambda folder: "embedded-flow",
    "embedded-wide": lambda folder: "embedded-wide",
    "sd": lambda folder: str(tiny.sd_folder(folder / "sd", "v_prediction", zero_snr=True)),
    "sdxl": lambda folder: str(tiny.sdxl_folder(folder / "sdxl")),
    "transformers": lambda folder: str(tiny_models.folder("bert", folder)),
    **{
        family: partial(lambda name, folder: str(tiny_flow.flow_folder(name, folder / name)), family)
        for family in tiny_flow.BUILDERS
    },
}
DRAW = [name for name, family in FAMILIES.items() if family.draws]
TEXTS = ["a red person", "a person", "a blue person"]


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda family: BUILT[family](root))


@pytest.fixture(scope="module")
def load(named) -> Callable[..., ImageBase]:
    def load(family: str, *options) -> ImageBase:
        base = load_base(named(family), *options)
        if family in tiny_flow.BUILDERS:
            base.pipe.default_sample_size = 8  # the pipelines' own is 60 or 128 latents
        return base

    return load


@pytest.fixture(scope="module", params=DRAW)
def base(request, load) -> ImageBase:
    return load(request.param)


def options(base: ImageBase) -> dict:
    return {"negative": base.encode_prompts([""]), "steps": 2, "guidance": 2.0}


def pixels(images) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(image, int) for image in images])


def missing(protocol: type, thing: object) -> list[str]:
    wanted = {name for name in vars(protocol) if not name.startswith("_")} | set(protocol.__annotations__)
    return sorted(name for name in wanted if not hasattr(thing, name))


def test_every_family_has_a_row_here():
    assert BUILT.keys() == FAMILIES.keys()


# ---- families that draw ----------------------------------------------------------------------------------------------


def test_it_is_recognised_and_offers_what_every_base_does(base, load, named):
    (family,) = [name for name, row in FAMILIES.items() if type(base) is row.cls]
    assert (base.family, base.name) == (family, named(family))
    assert missing(ImageBase, base) == []
    assert getattr(base.pipe, base.component) is base.model
    assert not any(p.requires_grad for part in (base.model, *base.encoders.values()) for p in part.parameters())
    assert base.encoders["vae"].dtype == torch.float32 and set(base.encoders) > {"vae"}


def test_images_become_latents_and_latents_images(base):
    size = base.resolution
    noise = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.encode_images(noise, batch=2)
    assert mean.shape == std.shape == (3, *base.latent_shape(size)) and (std >= 0).all()
    torch.testing.assert_close(base.encode_images(noise[1:2])[0], mean[1:2], atol=1e-4, rtol=1e-4)
    images = base.decode(mean, batch=2)
    assert [image.size for image in images] == [(size, size)] * 3
    assert abs(pixels(base.decode(mean[2:]))[0] - pixels(images)[2]).max() <= 1
    own, frames = base.pipe.vae, noise.unsqueeze(2) if base.family in ("qwen-image", "krea2", "wan") else noise
    again = own.decode(own.encode(frames).latent_dist.mean, return_dict=False)[0].detach().reshape(noise.shape)
    assert abs(pixels(VaeImageProcessor().postprocess(again)) - pixels(images)).max() <= 1


def test_prompts_are_a_bundle_of_rows(base):
    found = base.encode_prompts(TEXTS, batch=2)
    assert len(found) == 3 and {k: tuple(v.shape[1:]) for k, v in found.tensors.items()} == {
        name: shape
        for name, shape in base.prompt_shapes(base.model, found.tensors["embeds"].shape[1]).items()
        if name in found.tensors
    }
    alone = base.encode_prompts(TEXTS[1:2])
    rows = Prompts.join([found[[2, 1]], alone])
    for name, value in alone.tensors.items():
        tokens = value.shape[1] if name in ("embeds", "mask") else None  # others may be longer, with a mask
        torch.testing.assert_close(rows.tensors[name][1, :tokens], value[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rows.tensors[name][2, :tokens], value[0])
    moved = base.sized(found, [(20, 30)] * 3, 16).to(base.device, torch.bfloat16)
    assert {value.dtype for value in moved.tensors.values()} - {torch.bool} == {torch.bfloat16} and len(moved) == 3
    assert {k: tuple(v.shape[1:]) for k, v in moved.tensors.items()} == base.prompt_shapes(
        base.model, found.tensors["embeds"].shape[1]
    )


def test_prompts_of_any_length_are_read_in_chunks_or_the_tokens_that_are_cut_are_told(base, caplog):
    if isinstance(base, StableDiffusion):
        return in_chunks(base, caplog)
    base.encode_prompts(["a person in the rain with everything that comes to mind " * 20])
    assert "are cut, e.g. 'a person in the rain" in caplog.text and " tokens are not read" in caplog.text


def in_chunks(base: ImageBase, caplog) -> None:
    """Each chunk is what the pipeline makes of its words alone; shorter prompts are filled up with the empty one's."""
    tokenizer = base.pipe.tokenizer
    size, word = tokenizer.model_max_length, "in "
    each = (size - 2) // len(tokenizer(word, add_special_tokens=False).input_ids)
    inner = len(tokenizer(word * each, add_special_tokens=False).input_ids)
    assert inner == size - 2, "the words fill a chunk"
    first, rest = word * each, "a person"
    theirs = {"device": base.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    alone = [base.pipe.encode_prompt(prompt=text, **theirs) for text in (first, rest, "")]
    long, short = base.encode_prompts([first + rest]), base.encode_prompts([rest])
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close(long.tensors["embeds"], torch.cat([alone[0][0], alone[1][0]], dim=1))
    if "pooled" in long.tensors:
        close(long.tensors["pooled"], alone[0][2])
    together = base.encode_prompts([rest, first + rest])
    joined = Prompts.join([short, long])
    latents = torch.randn(2, *base.latent_shape(base.resolution))
    timesteps = base.schedule.timesteps(torch.tensor([0.5, 0.5]))
    with torch.no_grad():
        said = [base.predict(base.model, latents, timesteps, prompts) for prompts in (together, joined)]
    close(*said)
    close(together.tensors["embeds"][:1], torch.cat([alone[1][0], alone[2][0]], dim=1))
    images = pixels(base.draw(joined, [1, 1], **options(base)))
    assert abs(images - pixels(base.draw(together, [1, 1], **options(base)))).max() <= 1
    assert (images[0] != images[1]).any()
    assert " are cut" not in caplog.text


def test_it_predicts_what_its_pipeline_does(base):
    """At the pipeline's first step the denoiser is given the same, argument by argument, and says the same."""
    seen, prompts = [], base.encode_prompts(TEXTS[:1])
    bound = inspect.signature(base.model.forward).bind
    hook = base.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((bound(*args, **kwargs).arguments, out[0])), with_kwargs=True
    )
    try:
        told = {"flux2": 3.5}.get(base.family, 0.0)  # what it is trained at; elsewhere, no guidance
        base.draw_latents(prompts, [5], **options(base) | {"guidance": told})
        (by_pipeline, wanted), first = seen[0], base.pipe.scheduler.timesteps[:1]
        noisy = unpacked(base, by_pipeline)
        flow = isinstance(base.schedule, FlowSchedule)
        timesteps = base.schedule.timesteps(first / 1000) if flow else first
        with torch.no_grad():
            found = base.predict(base.model, noisy, timesteps, prompts)
        own, said = seen[-1]
        other = base.predict(base.model, noisy, timesteps, base.encode_prompts(TEXTS[2:])).detach()
    finally:
        hook.remove()
    for name, value in by_pipeline.items():
        if isinstance(value, list) and not isinstance(value[0], Tensor):
            assert own[name] == value
        elif isinstance(value, Tensor | list) and name in own:
            torch.testing.assert_close(same_kind(own[name]), same_kind(value), atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(same_kind(said), same_kind(wanted), atol=1e-4, rtol=1e-4)
    assert found.shape == noisy.shape and not torch.allclose(found, other, atol=1e-5), "it listens to the prompt"


def unpacked(base: ImageBase, given: dict) -> Tensor:
    """The latents among what a pipeline gives its denoiser."""
    packed = next(given[name] for name in ("sample", "hidden_states", "x") if name in given)
    if not isinstance(base, FlowTransformer):
        return packed
    return base._outputs(packed, (1, *base.latent_shape(base.resolution))) * (-1 if base.family == "z-image" else 1)


def same_kind(value: Tensor | list[Tensor]) -> Tensor:
    """A tensor, or a list of them, in floating point and without axes of one."""
    return (torch.stack(value) if isinstance(value, list) else value).float().squeeze()


def test_noise_and_target_are_its_schedulers(base):
    """Whoever predicts the target without error gives the image back, at every noise level."""
    generator, shape = torch.Generator().manual_seed(0), (5, *base.latent_shape(base.resolution))
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    timesteps = base.schedule.timesteps(torch.tensor([0.0, 0.3, 0.6, 0.9, 0.98]))
    assert timesteps.tolist() == sorted(set(timesteps.tolist())), "more noise is another step"
    noisy, target = base.schedule.add_noise(latents, noise, timesteps)
    if isinstance(base.schedule, FlowSchedule):
        return by_flow(base, latents, noise)
    scheduler = DDPMScheduler.from_config(base.pipe.scheduler.config, clip_sample=False)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps), atol=1e-5, rtol=1e-5)
    for row, step in enumerate(timesteps.tolist()):
        found = scheduler.step(target[row], step, noisy[row]).pred_original_sample
        torch.testing.assert_close(found, latents[row], atol=2e-3, rtol=2e-3)
    weights = base.schedule.snr_weights(timesteps, 5.0)
    assert weights.shape == (5,) and (weights > 0).all() and weights.isfinite().all()


def by_flow(base: ImageBase, latents: Tensor, noise: Tensor) -> None:
    """Its own scheduler, told the target at every step, ends in the latents; and trains where diffusers' script does."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.pipe.scheduler.config)
    options = {"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(4, **options)
    x = noise.clone()
    for step in scheduler.timesteps:
        told = base.schedule.timesteps(step.reshape(1) / 1000).expand(len(x))
        noisy, target = base.schedule.add_noise(latents, noise, told)
        torch.testing.assert_close(noisy, x, atol=1e-3, rtol=1e-3)
        x = scheduler.step(target, step, x).prev_sample
    torch.testing.assert_close(x, latents, atol=1e-3, rtol=1e-3)
    with pytest.raises(ConfigError, match="snr_gamma is for bases"):
        base.schedule.snr_weights(told, 5.0)


def test_a_seed_decides_what_is_drawn_and_nothing_else_does(base):
    prompts, given = base.encode_prompts(TEXTS), options(base)
    together = pixels(base.draw(prompts, [1, 2, 1], **given))
    assert together.shape == (3, base.resolution, base.resolution, 3)
    assert abs(pixels(base.draw(prompts[[1]], [2], **given))[0] - together[1]).max() <= 1
    assert abs(pixels(base.draw(prompts, [1, 2, 1], batch=1, **given)) - together).max() <= 1
    assert abs(pixels(base.draw(prompts[[1]], [3], **given))[0] - together[1]).max() > 1
    assert base.sampling.chosen(None, None) == {"steps": base.sampling.steps, "guidance": base.sampling.guidance}
    assert base.sampling.chosen(3, 0.0) == {"steps": 3, "guidance": 0.0}
    assert 0 < len(set(base.scenes(3, 0))) <= 3


def test_its_targets_take_an_adapter_that_trains(base, load, named):
    fresh = load(base.family)
    smidgen.adapt(fresh.model, "lora", r=2, target_modules=list(fresh.targets))
    if not isinstance(base, FlowTransformer):
        assert smidgen.default_targets(load(base.family).model) == set(fresh.targets)
    prompts, size = fresh.encode_prompts(TEXTS[:1]), fresh.resolution
    latents = torch.randn(1, *fresh.latent_shape(size), generator=torch.Generator().manual_seed(0))
    timesteps = fresh.schedule.timesteps(torch.tensor([0.5]))
    noisy, target = fresh.schedule.add_noise(latents, torch.randn(latents.shape), timesteps)
    (fresh.predict(fresh.model, noisy, timesteps, prompts) - target).square().mean().backward()
    trained = {name: p for name, p in fresh.model.named_parameters() if p.requires_grad}
    assert len(trained) >= 2 * len(fresh.targets)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad.any() for name, p in trained.items() if name.endswith("residual_b"))


def test_it_draws_on_without_its_encoders(load, base):
    fresh = load(base.family)
    prompts, given = fresh.encode_prompts(TEXTS[:1]), options(fresh)
    before = pixels(fresh.draw(prompts, [1], **given))
    fresh.release_encoders(keep_vae=True)
    assert set(fresh.encoders) == {"vae"} and (pixels(fresh.draw(prompts, [1], **given)) == before).all()
    fresh.release_encoders()
    assert not fresh.encoders


def test_a_fingerprint_is_of_the_weights(base, load, named):
    fresh = load(base.family)
    assert fresh.fingerprint() == base.fingerprint()
    with torch.no_grad():
        list(fresh.model.parameters())[7].add_(0.1)  # neither the first nor the last
    assert fresh.fingerprint() != base.fingerprint()


def test_a_fingerprint_is_of_all_that_draws_and_of_nothing_else(base, named, tmp_path):
    import shutil

    name = named(base.family)
    if Path(name).is_dir():  # another path is the same base
        assert load_base(str(shutil.copytree(name, tmp_path / "elsewhere"))).fingerprint() == base.fingerprint()
    fresh = load_base(name)
    smidgen.adapt(fresh.model, "lora", r=2, target_modules=list(fresh.targets))
    fresh.release_encoders()
    assert fresh.fingerprint() == base.fingerprint()  # adapters and released encoders do not count
    fresh = load_base(name)
    with torch.no_grad():
        list(fresh.encoders["text_encoder"].parameters())[3].add_(0.1)
    assert fresh.fingerprint() != base.fingerprint()


def test_rates_and_cards_need_no_weights(base):
    assert learning_kind(base.name) in KINDS and learning_kind(base.name, "control") in KINDS
    assert base.learning["image"] == learning_kind(base.name)
    loaded, sampling = card_lines(base.name)
    flow = "8, guidance_scale=2, height=64"
    steps = {"embedded": "20, guidance_scale=2", "embedded-flow": flow, "embedded-wide": flow}.get(base.name)
    if steps is None:
        assert loaded.endswith(f"from_pretrained({base.name!r})") and sampling == ""
    else:
        named = loaded.partition("from_pretrained(")[2].removesuffix(")")
        assert eval(named, {"smidgen": smidgen}).is_dir()
        assert sampling.startswith(f", num_inference_steps={steps}")


@pytest.mark.parametrize("texts", [["a person"], ["a person", "a person in the rain, " * 9]])
def test_a_step_asks_nothing_of_the_device(texts, tmp_path, monkeypatch):
    """Whether prompts of fewer chunks were joined to longer ones follows from shapes: a look at numbers would wait for a GPU."""
    base = load_base(str(tiny.sd_folder(tmp_path / "sd")))
    prompts = base.encode_prompts(texts)
    noisy, times = torch.randn(len(texts), *base.latent_shape(16)), torch.tensor([500] * len(texts))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a number was asked for"))
    base.predict(base.model, noisy, times, prompts)


def test_a_judge_scores_what_its_base_draws(base):
    judge = base.judge()
    if judge is None:
        return
    texts = judge.prompts(1, 0)
    found = judge.scores([Image.new("RGB", (base.resolution,) * 2)], texts, [Image.new("RGB", (base.resolution,) * 2)])
    assert {"identity", "caption"} <= found.keys()


def test_16_bits_are_the_denoisers_and_fp16_needs_a_gpu(base, load, named):
    half = load(base.family, "bf16")
    assert half.model.dtype == torch.bfloat16 and half.encoders["vae"].dtype == torch.float32
    assert half.draw(half.encode_prompts(TEXTS[:1]), [1], **options(half))[0].size == (base.resolution,) * 2
    with pytest.raises(ConfigError, match="fp16 has no arithmetic on a CPU"):
        load_base(named(base.family), "fp16")


def test_sdxl_is_told_what_an_image_was_cut_from(named):
    base = load_base(named("sdxl"))
    sized = base.sized(base.encode_prompts(TEXTS[:2]), [(20, 30), (50, 40)], 16)
    assert sized.tensors["time_ids"].tolist() == [[30, 20, 0, 0, 16, 16], [40, 50, 0, 0, 16, 16]]  # height first


# ---- families that read ----------------------------------------------------------------------------------------------


HEAD = Head(("no", "yes"))
READ: dict[str, tuple[str, Callable[[str], ReadingBase]]] = {  # kind -> a small model of it, and how it is loaded
    "encoder": ("bert", lambda name: load_classifier("AutoModelForSequenceClassification", name, HEAD, 0, "no", None)),
    "vision": ("vit", lambda name: load_classifier("AutoModelForImageClassification", name, HEAD, 0, "no", None)),
    "decoder": ("gpt2", lambda name: load_language_model(name, "no", None)),
}


@pytest.mark.parametrize("kind", READ)
def test_a_base_that_reads(kind, tmp_path):
    model, load = READ[kind]
    name = str(tiny_models.folder(model, tmp_path, causal=kind == "decoder"))
    base = load(name)
    assert missing(ReadingBase, base) == [] and type(base) is FAMILIES["transformers"].cls
    assert (base.kind, base.name, bool(base.heads)) == (kind, name, kind != "decoder")
    smidgen.adapt(base.model, "lora", r=2, target_modules=sorted(base.targets()))
    assert base.fingerprint() == load(name).fingerprint()  # of the base, not of what was put into it
    with torch.no_grad():
        list(base.model.parameters())[3].add_(0.1)
    assert base.fingerprint() != load(name).fingerprint()
    if kind != "vision":
        assert base.tokenizer().pad_token is not None


def test_who_reads_does_not_draw(named):
    with pytest.raises(ConfigError, match="is a transformers model, which reads and does not draw"):
        load_base(named("transformers"))


# ---- nonsense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [("embeded", "Did you mean 'embedded'"), ("./nowhere", "There is no base"), ("a/b/c", "neither a folder")],
)
def test_what_is_no_base_is_told(name, said):
    with pytest.raises(ConfigError, match=said):
        load_base(name)


def test_a_folder_of_no_family_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no readable model_index\.json"):
        load_base(tmp_path)
    for pipeline in ("FluxPipeline", "PixArtSigmaPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        with pytest.raises(ConfigError, match=f"is a {pipeline}, and no family here knows that class.*sd, sdxl"):
            load_base(tmp_path)


def test_a_pipeline_without_weights_is_told(named, tmp_path):
    (tmp_path / "model_index.json").write_text((Path(named("sd")) / "model_index.json").read_text())
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    "load, said",
    [
        (load_judge, "--stage judge"),
        (partial(load_encoder, "face"), "--stage encoders"),
        (load_parts_reader, r"\.parts"),
    ],
)
def test_networks_that_are_not_there_are_told_with_what_makes_them(load, said, tmp_path):
    with pytest.raises(SmidgenError, match=rf"is missing: reinstall smidgen, or .*embedded_base ?{said}`"):
        load(tmp_path / "none")


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_discrete_targets_agree_with_diffusers(kind):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    latents, noise, times = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 500, 998, 999])
    noisy, target = DiscreteSchedule.of(scheduler).add_noise(latents, noise, times)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times))
    velocity = scheduler.get_velocity(latents, noise, times)
    torch.testing.assert_close(target, {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind])
    assert torch.equal(noisy[3], noise[3])  # no signal is left at the end


def test_min_snr_weights_are_the_papers_and_finite_at_both_ends():
    alphas, steps = torch.tensor([0.0, 0.1, 0.5, 0.99, 1.0]), torch.arange(5)
    weights = {kind: DiscreteSchedule(alphas, kind).snr_weights(steps, 5.0) for kind in PREDICTIONS}
    assert all(found.isfinite().all() for found in weights.values())
    snr = 0.99 / 0.01
    assert weights["epsilon"][3] == pytest.approx(5 / snr, rel=1e-4)
    assert weights["v_prediction"][3] == pytest.approx(5 / (snr + 1), rel=1e-4)
    assert weights["sample"][3] == pytest.approx(5.0, rel=1e-4)
    assert weights["epsilon"][1] == pytest.approx(1.0)


def test_a_prediction_nobody_knows_is_told():
    with pytest.raises(ConfigError, match=r"predicts 'flow_prediction'; known are epsilon, v_prediction and sample"):
        DiscreteSchedule(torch.ones(1), "flow_prediction")
