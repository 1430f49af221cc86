"""Flow-matching transformers end to end: what is trained starts as the base, is saved, drawn with in a fresh pipeline, and resumed."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

import smidgen
from smidgen.bases.families import load_base
from smidgen.bases.schedules import EDMSchedule, FlowSchedule, reweighted, schedule_of
from smidgen.bases.stable_diffusion import StableDiffusionXL
from smidgen.errors import ConfigError
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data
from smidgen.training.settings import from_dict
from tests.training import tiny, tiny_flow

FAMILIES = sorted(tiny_flow.BUILDERS)
SIZE = 16


QUICK = ("flux2-klein", "z-image")  # the others' runs are in the slow set


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_flow.flow_folder(request.param, tmp_path_factory.mktemp("flow") / request.param)


def settings(folder, pictures, out, method="lora"):
    chosen = PRESETS["debug"]
    data = Data(pictures, resolution=SIZE, train_batch_size=2)
    return replace(chosen, base=str(folder), out=out, data=data, adapter=Adapter(method, learning_rate=1e-2))


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_personalize_trains_saves_draws_and_resumes_to_the_bit(family, tmp_path):
    folder = tiny_flow.flow_folder(family, tmp_path / family)
    made = settings(folder, tiny.pictures(tmp_path / "pictures", size=SIZE), tmp_path / "whole")
    more = {"caption_dropout": 0.5, "placeholder_token": "sks", "preservation": "class"}
    made = replace(made, data=replace(made.data, **more), train=replace(made.train, ema_decay=0.5))
    report = personalize(made, progress=False)
    assert report.verified and report.entry.trained_numbers > 0
    broken = replace(made, out=tmp_path / "broken")
    personalize(broken, progress=False)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    personalize(replace(broken, resume_from_checkpoint="latest"), progress=False)
    files = [tmp_path / out / "adapter_model.safetensors" for out in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)  # as a user would
    smidgen.load(pipe.transformer, tmp_path / "whole")
    assert smidgen.verify(pipe.transformer, tmp_path / "whole").ok


@pytest.mark.parametrize("method", ["svfit", "tlora", "loldu"])
def test_the_start_is_the_base_and_the_loss_falls(folder, method):
    base = load_base(str(folder))
    prompts, g = base.encode_prompts(["a red person", "a person, smiling"]), torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, *base.latent_shape(SIZE), generator=g) for _ in range(2))
    noisy, target = base.schedule.add_noise(latents, noise, base.schedule.timesteps(torch.tensor([0.3, 0.7])))
    said = lambda: base.predict(base.model, noisy, base.schedule.timesteps(torch.tensor([0.3, 0.7])), prompts)  # noqa: E731
    with torch.no_grad():
        before = said()
    smidgen.adapt(base.model, method, target_modules=list(base.targets))
    with torch.no_grad():
        assert torch.equal(said(), before)
    rate = {"svfit": 0.05, "tlora": 0.02, "loldu": 0.05}[method]
    optimizer, losses = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], rate), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append((said() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_every_block_is_adapted(folder):
    base = load_base(str(folder))
    blocks = {
        f"{name}.{number}" for name, many in base.model.named_children() if "blocks" in name or name == "layers"
        for number in range(len(many))
    }  # fmt: skip
    assert blocks <= {".".join(target.split(".")[:2]) for target in base.targets}
    assert all(isinstance(base.model.get_submodule(name), torch.nn.Linear) for name in base.targets)


def test_a_processor_of_images_and_texts_counts_tokens_by_its_tokenizer(tmp_path, caplog):
    """As FLUX.2 [dev] has it, whose processor takes images first."""
    base = load_base(str(tiny_flow.flow_folder("flux2", tmp_path / "flux2")))
    words, plain = base.pipe.tokenizer, base.encode_prompts(["a person"])

    class Processor:
        tokenizer = words
        apply_chat_template = staticmethod(words.apply_chat_template)

        def __call__(self, images=None, text=None):
            raise AssertionError(f"{images!r} is no image")

    base.pipe.tokenizer = Processor()
    assert torch.equal(base.encode_prompts(["a person"]).tensors["embeds"], plain.tensors["embeds"])
    base.encode_prompts(["a person " * 200])
    assert "are cut, e.g. 'a person a person" in caplog.text


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_is_cut_where_t5_stops_reading(with_t5, tmp_path, caplog):
    base = load_base(str(tiny_flow.flow_folder("sd3", tmp_path / "sd3")))
    if not with_t5:
        base.pipe.text_encoder_3 = base.pipe.tokenizer_3 = None
    base.encode_prompts(["a person " * 10])  # too much for the CLIPs alone
    assert ("are cut" in caplog.text) is not with_t5
    base.encode_prompts(["a person " * 60])
    assert "are cut" in caplog.text


@pytest.mark.parametrize("option, value", [("boundary_ratio", 0.9), ("expand_timesteps", True)])
def test_a_wan_that_is_trained_in_another_way_is_refused(option, value, tmp_path):
    folder = tiny_flow.flow_folder("wan", tmp_path / "wan")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {option: value}))
    with pytest.raises(ConfigError, match=f"is a Wan 2.2 with {option} = {value}.*take a Wan 2.1"):
        load_base(str(folder))


@pytest.mark.parametrize("scheme", ["logit_normal", "none", "mode", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_is_as_dense_and_weighs_as_in_diffusers_training_scripts(shift, scheme):
    """Their ``compute_density_for_timestep_sampling`` and ``compute_loss_weighting_for_sd3``, and the scheduler's own table of
    sigmas, quantile by quantile."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, 40_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    theirs = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    quantiles, schedule = torch.linspace(0.02, 0.98, 25), reweighted(schedule_of(scheduler), scheme, None)
    ours = schedule.levels(quantiles)
    torch.testing.assert_close(ours, theirs.quantile(quantiles), atol=0.015, rtol=0)
    ends = schedule.levels(torch.tensor([0.0, 1.0]))
    assert ends.isfinite().all() and (schedule.weights(ends) is None or schedule.weights(ends).isfinite().all())
    weights = replace(schedule, steps=1000.0).weights(1000 * ours)
    wanted = compute_loss_weighting_for_sd3(scheme, ours)
    torch.testing.assert_close(torch.ones_like(ours) if weights is None else weights, wanted)


def test_a_scheme_and_a_shift_are_for_flow_matching(tmp_path):
    schedule = schedule_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert reweighted(schedule, None, None) is schedule and reweighted(schedule, "mode", None).shift == 3.0
    assert (
        reweighted(schedule, None, 1.0).levels(torch.tensor([0.5])) == 0.5
        and reweighted(schedule, "none", 1.0) != schedule
    )
    chosen = Adapter("lora", weighting_scheme="cosmap", shift=2.0)
    made = settings(tiny.sd_folder(tmp_path / "sd"), tiny.pictures(tmp_path / "pictures"), tmp_path / "out")
    with pytest.raises(ConfigError, match="weighting_scheme and shift are for bases that were taught by flow matching"):
        personalize(replace(made, adapter=chosen), progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"must be one of .*cosmap.* Did you mean 'logit_normal'"):
        from_dict(Adapter, {"weighting_scheme": "lognormal"})


def test_the_loss_is_that_of_diffusers_training_script(folder):
    """sigma from the scheduler's table, (1 - sigma) x + sigma noise, the squared error to noise - x, unweighted."""
    base = load_base(str(folder))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    g, rows = torch.Generator().manual_seed(0), 3
    shape = (rows, *base.latent_shape(SIZE))
    mean, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    prompts = base.encode_prompts(["a red person", "a person", "a person, smiling"])
    timesteps = scheduler.timesteps[torch.tensor([100, 500, 900])]  # as the scripts index it
    sigmas = scheduler.sigmas[torch.tensor([100, 500, 900])].reshape(-1, 1, 1, 1)
    noisy, target = (1 - sigmas) * mean + sigmas * noise, noise - mean
    with torch.no_grad():
        wanted = (base.predict(base.model, noisy, base.schedule.timesteps(timesteps / 1000), prompts) - target).square()
    names = ("a", "b", "c")
    task = PersonalizeTask(Encoded(mean, torch.zeros_like(mean), prompts, names), base, batch_size=rows)
    batch = {
        "latents": mean,
        "noise": noise,
        "prompts": prompts,
        "levels": timesteps / 1000,
        "weights": torch.ones(rows) / rows,
    }
    weighed = replace(task, schedule=reweighted(base.schedule, "cosmap", None))
    weights = compute_loss_weighting_for_sd3("cosmap", sigmas)
    with torch.no_grad():
        torch.testing.assert_close(task.loss(base.model, batch), wanted.mean(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weighed.loss(base.model, batch), (weights * wanted).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_base_in_edms_noise_is_trained_in_it(prediction):
    """Playground v2.5: what its own scheduler makes of the target is the image, at every noise level."""
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    schedule = schedule_of(scheduler)
    assert isinstance(schedule, EDMSchedule)
    scheduler.set_timesteps(9)
    levels = torch.linspace(1, 0, 9)
    torch.testing.assert_close(schedule.timesteps(levels), scheduler.timesteps.float(), atol=1e-4, rtol=1e-4)
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(9, 4, 8, 8, generator=g) for _ in range(2))
    seen, target = schedule.add_noise(latents, noise, schedule.timesteps(levels))
    for row, sigma in enumerate(scheduler.sigmas[:9]):
        noisy = latents[row] + sigma * noise[row]
        torch.testing.assert_close(seen[row], scheduler.precondition_inputs(noisy, sigma), atol=1e-4, rtol=1e-4)
        found = scheduler.precondition_outputs(noisy, target[row], sigma)
        torch.testing.assert_close(found, latents[row], atol=1e-3, rtol=1e-3)
    with pytest.raises(ConfigError, match="taught by EDM"):
        schedule.snr_weights(torch.ones(1), 5.0)


@pytest.mark.parametrize("make", [
    lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    lambda: diffusers.EulerDiscreteScheduler.from_config({"prediction_type": "epsilon"}),
    lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    lambda: diffusers.EDMDPMSolverMultistepScheduler(),
])  # fmt: skip
def test_an_sdxl_is_trained_in_its_own_noise(make, tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.sdxl_folder(tmp_path / "sdxl"), scheduler=make())
    base = StableDiffusionXL("sdxl", pipe)
    levels = torch.tensor([0.2, 0.8])
    prompts, latents = base.encode_prompts(["a person"] * 2), torch.randn(2, *base.latent_shape(16))
    timesteps = base.schedule.timesteps(levels)
    noisy, target = base.schedule.add_noise(latents, torch.randn(latents.shape), timesteps)
    said = base.predict(base.model, noisy, timesteps, prompts)
    assert said.shape == target.shape and said.isfinite().all()
    if isinstance(base.schedule, FlowSchedule):
        assert base.schedule.shift == 2.0 and timesteps.tolist() == [200.0, 800.0]


def test_a_vae_with_moments_of_its_own_is_standardised_by_them(tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.sdxl_folder(tmp_path / "sdxl"))
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    base = StableDiffusionXL("sdxl", pipe)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = base.encode_images(pixels)
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.mean
    moments = (torch.tensor(values).reshape(1, -1, 1, 1) for values in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    shift, std = moments
    torch.testing.assert_close(mean, (raw - shift) * pipe.vae.config.scaling_factor / std)


@pytest.mark.parametrize("quantize", ["int8-torchao", "fp8"])
@pytest.mark.parametrize("family", ["flux2-klein", pytest.param("qwen-image", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["svfit", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_quantised_base_is_trained_on(family, quantize, method, tmp_path):
    folder = tiny_flow.flow_folder(family, tmp_path / family)
    made = settings(folder, tiny.pictures(tmp_path / "pictures", size=SIZE), tmp_path / "out", method)
    assert personalize(replace(made, quantize=quantize), progress=False).verified
    base = load_base(str(folder), quantize=quantize)
    weight = base.model.get_submodule(base.targets[0]).weight
    assert weight.dtype == torch.float8_e4m3fn if quantize == "fp8" else "Int8" in type(weight).__name__
    smidgen.load(base.model, tmp_path / "out")
    assert smidgen.verify(base.model, tmp_path / "out").ok


def test_quantising_says_what_it_lacks(tmp_path):
    folder = str(tiny_flow.flow_folder("z-image", tmp_path / "z"))
    with pytest.raises(ConfigError, match=r"cannot be quantised as 'nf5'\. Did you mean 'nf4'"):
        load_base(folder, quantize="nf5")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"asks for a GPU.*int8-torchao or fp8"):
            load_base(folder, quantize="nf4")


def test_a_transformer_in_one_file_is_put_together_as_its_config_says(folder):
    """In the names of its class; those of other programs are in test_single_file.py."""
    file = next((folder / "transformer").glob("*.safetensors"))
    base = load_base(file, config=folder, text_first=True)
    assert base.pipe.transformer is None and base.fingerprint() == load_base(str(folder)).fingerprint()


def test_an_image_may_be_wider_than_high(folder):
    base = load_base(str(folder))
    prompts = base.encode_prompts(["a red person"])
    width, height = 4 * base.step, 2 * base.step
    options = {"negative": prompts, "steps": 2, "guidance": 0.0}
    latents = base.draw_latents(prompts, [0], size=(width, height), **options)
    assert latents.shape[1:] == base.latent_shape((width, height)) and latents.isfinite().all()
    assert base.decode(latents)[0].size == (width, height)
    if base.largest < 1000:  # the small ones' tables of positions
        side = base.largest
        assert base.draw_latents(prompts, [0], size=(side, base.step), **options).isfinite().all()
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            base.draw_latents(prompts, [0], size=(side + base.step, base.step), **options)


def test_prompts_are_encoded_and_their_encoders_gone_before_the_transformer_is_read(folder):
    base, whole = load_base(str(folder), text_first=True), load_base(str(folder))
    assert base.pipe.transformer is None
    prompts = base.encode_prompts(["a red person"])
    latents = base.encode_images(torch.zeros(1, 3, SIZE, SIZE))[0]
    assert base.pipe.transformer is None
    base.release_encoders(keep_vae=True)
    options = {"negative": prompts, "steps": 2, "guidance": 0.0, "size": SIZE}
    assert torch.equal(base.draw_latents(prompts, [0], **options), whole.draw_latents(prompts, [0], **options))
    assert base.fingerprint() == whole.fingerprint() and latents.shape[1:] == base.latent_shape(SIZE)
