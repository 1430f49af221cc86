"""The loss of each family is that of diffusers' own training script (examples/dreambooth) on the same latents, noise, times and prompts.

The denoiser is called here as the script calls it, by diffusers' own packing and ids, and not through our families.
"""

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from smidgen.bases.families import load_base
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from tests.training import tiny, tiny_flow

SIZE, STEPS = 16, torch.tensor([50, 500, 900])


def _flux2(pipe, guidance):
    def said(noisy, timesteps, prompts):
        cls = type(pipe)
        ids, packed = cls._prepare_latent_ids(noisy), cls._pack_latents(noisy)
        found = pipe.transformer(
            hidden_states=packed, timestep=timesteps / 1000, guidance=guidance, encoder_hidden_states=prompts["embeds"],
            txt_ids=cls._prepare_text_ids(prompts["embeds"]), img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        return cls._unpack_latents_with_ids(found[:, : packed.size(1)], ids)

    return said


def _z_image(pipe):
    def said(noisy, timesteps, prompts):
        words = [row[mask] for row, mask in zip(prompts["embeds"], prompts["mask"].bool(), strict=True)]
        images = list(noisy.unsqueeze(2).unbind(dim=0))
        found = pipe.transformer(images, (1000 - timesteps) / 1000, words, return_dict=False)[0]
        return -torch.stack(found, dim=0).squeeze(2)

    return said


def _packed(noisy):
    n, c, h, w = noisy.shape
    return noisy.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def _unpacked(found, h, w):
    n, _, c = found.shape
    return found.view(n, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, h, w)


def _qwen_image(pipe):
    def said(noisy, timesteps, prompts):
        h, w = noisy.shape[-2:]
        found = pipe.transformer(
            hidden_states=_packed(noisy), encoder_hidden_states=prompts["embeds"], timestep=timesteps / 1000,
            encoder_hidden_states_mask=prompts["mask"], img_shapes=[(1, h // 2, w // 2)] * len(noisy), return_dict=False,
        )[0]  # fmt: skip
        return _unpacked(found, h, w)

    return said


def _krea2(pipe):
    def said(noisy, timesteps, prompts):
        h, w = noisy.shape[-2:]
        found = pipe.transformer(
            hidden_states=_packed(noisy), encoder_hidden_states=prompts["embeds"], timestep=timesteps / 1000,
            position_ids=type(pipe).prepare_position_ids(prompts["embeds"].shape[1], h // 2, w // 2, "cpu"),
            encoder_attention_mask=prompts["mask"], return_dict=False,
        )[0]  # fmt: skip
        return _unpacked(found, h, w)

    return said


def _sd3(pipe):
    return lambda noisy, timesteps, prompts: pipe.transformer(
        hidden_states=noisy, timestep=timesteps, encoder_hidden_states=prompts["embeds"],
        pooled_projections=prompts["pooled"], return_dict=False,
    )[0]  # fmt: skip


CALLS = {
    "flux2": lambda pipe: _flux2(pipe, torch.full([1], 3.5).expand(len(STEPS))),  # the script's --guidance_scale
    "flux2-klein": lambda pipe: _flux2(pipe, None),
    "z-image": _z_image, "qwen-image": _qwen_image, "krea2": _krea2, "sd3": _sd3,
}  # fmt: skip


def _drawn(base):
    g, shape = torch.Generator().manual_seed(0), (len(STEPS), *base.latent_shape(SIZE))
    prompts = base.encode_prompts(["a red person", "a person", "a person, smiling"])
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), prompts


def _ours(base, latents, noise, prompts, levels):
    rows = len(latents)
    task = PersonalizeTask(Encoded(latents, torch.zeros_like(latents), prompts, ("a", "b", "c")), base, batch_size=rows)
    batch = {
        "latents": latents,
        "noise": noise,
        "prompts": prompts,
        "levels": levels,
        "weights": torch.ones(rows) / rows,
    }
    with torch.no_grad():
        return task.loss(base.model, batch)


@pytest.mark.parametrize("family", CALLS)
def test_of_a_flow_transformer(family, tmp_path):
    base = load_base(str(tiny_flow.flow_folder(family, tmp_path / family)))
    latents, noise, prompts = _drawn(base)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    timesteps, sigmas = scheduler.timesteps[STEPS], scheduler.sigmas[STEPS].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        said = CALLS[family](base.pipe)((1.0 - sigmas) * latents + sigmas * noise, timesteps, prompts.tensors)
    weighting = compute_loss_weighting_for_sd3("none", sigmas=sigmas)
    theirs = (weighting * (said.float() - (noise - latents)) ** 2).reshape(len(STEPS), -1).mean(1).mean()
    ours = _ours(base, latents, noise, prompts, timesteps / 1000)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_of_a_unet(family, prediction, tmp_path):
    base = load_base(str(getattr(tiny, f"{family}_folder")(tmp_path / family)))
    base.pipe.scheduler = diffusers.DDPMScheduler.from_config(base.pipe.scheduler.config, prediction_type=prediction)
    latents, noise, prompts = _drawn(base)
    scheduler, extra = base.pipe.scheduler, {}
    if family == "sdxl":
        ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(STEPS)).float()
        extra = {"added_cond_kwargs": {"time_ids": ids, "text_embeds": prompts.tensors["pooled"]}}
    with torch.no_grad():
        noisy = scheduler.add_noise(latents, noise, STEPS)
        said = base.model(noisy, STEPS, prompts.tensors["embeds"], return_dict=False, **extra)[0]
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, STEPS)
    levels = (STEPS + 0.5) / scheduler.config.num_train_timesteps
    theirs = torch.nn.functional.mse_loss(said.float(), target.float(), reduction="mean")
    torch.testing.assert_close(_ours(base, latents, noise, prompts, levels), theirs, atol=1e-5, rtol=1e-5)
