"""Stage `flow`: a ``Flux2KleinPipeline`` on the frozen VAE and text encoder of the embedded base, which are its own bit for bit.

Flow matching (Lipman et al. 2023) with logit-normal times (Esser et al. 2024), a tenth of them uniform so that no time is left out,
stratified over a batch; the tokens around eyes and mouth count twice. FLUX.2's blocks share one modulation, which is what a small
transformer can afford. Drawings are those of stage `render`.
"""

import inspect
import json
import logging
import shutil
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from smidgen.adapters.atomic import replace_file, replace_folder
from smidgen.bases.embedded import PIPELINE, embedded_base, world
from smidgen.bases.embedded.base import EmbeddedFlow
from smidgen.bases.embedded.judge import load_judge
from smidgen.bases.embedded.layers import upper
from smidgen.lab.embedded_base import card, draw, text
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.run import PARTS, Run

log = logging.getLogger(__name__)
FACE_TOKENS = slice(1, 3)
FACE_WEIGHT = 2.0
UNIFORM = 0.1
TEMPLATE = "{{ messages[0]['content'] }}"  # klein's pipeline asks for a chat template


def transformer(config: Config) -> Flux2Transformer2DModel:
    """FLUX.2's denoiser at this width, for the shipped VAE and text encoder; its output and last modulation zero at the start."""
    head, channels, text_width = 32, *_shipped()
    model = Flux2Transformer2DModel(
        in_channels=channels, num_layers=config.flow_blocks[0], num_single_layers=config.flow_blocks[1],
        attention_head_dim=head, num_attention_heads=config.flow_width // head, joint_attention_dim=text_width,
        timestep_guidance_channels=64, mlp_ratio=3.0, axes_dims_rope=(head // 4,) * 4, guidance_embeds=False,
    )  # fmt: skip
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.norm_out.linear.weight)
    return model


def _shipped() -> tuple[int, int]:
    """Channels of the VAE's latents, 2 x 2 in one, and the width of the text encoder."""
    configs = [json.loads((embedded_base() / part / "config.json").read_text()) for part in ("vae", "text_encoder")]
    return 4 * configs[0]["latent_channels"], configs[1]["hidden_size"]


def base_of(model: Flux2Transformer2DModel, mean: Tensor, var: Tensor) -> EmbeddedFlow:
    """``model`` in a pipeline, as a base of its family: it is trained through the code that adapters are trained through.
    ``mean`` and ``var`` [4 c] of the VAE's latents, 2 x 2 in one, are what FLUX.2 standardises by."""
    plain = AutoencoderKL.from_pretrained(embedded_base() / "vae")
    taken = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    vae = AutoencoderKLFlux2(
        **{name: value for name, value in plain.config.items() if name in taken}, patch_size=(2, 2)
    )
    vae.load_state_dict(plain.state_dict() | {n: t for n, t in vae.state_dict().items() if n.startswith("bn.")})
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(var - vae.config.batch_norm_eps)
    words = CLIPTokenizer.from_pretrained(embedded_base() / "tokenizer")
    words.chat_template = TEMPLATE
    encoder = CLIPTextModel.from_pretrained(embedded_base() / "text_encoder")
    pipe = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), encoder, words, model.eval())
    pipe.default_sample_size = world.SIZE // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    return EmbeddedFlow("flow", pipe)


def latents(config: Config, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Standardised latents [n, 4 c, 4, 4] of the training drawings in fp16, and their moments; made once."""
    path, channels = folder / "flow_latents.safetensors", _shipped()[0]
    pictures = draw.load(folder, "train")[0]
    if path.exists():
        kept = load_file(path)
        if len(kept["latents"]) == len(pictures):
            return kept.pop("latents"), kept
    unit = {"mean": torch.zeros(channels), "var": torch.ones(channels)}
    base = base_of(transformer(config), **unit)
    parts = []
    with torch.no_grad():
        for at in range(0, len(pictures), 512):
            pixels = torch.from_numpy(np.array(pictures[at : at + 512])).permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append(base.encode_images(pixels, batch=64)[0].float())
    found = torch.cat(parts)
    moments = {"mean": found.mean((0, 2, 3)), "var": found.var((0, 2, 3))}
    shape = (1, -1, 1, 1)
    found = (found - moments["mean"].reshape(shape)) / moments["var"].reshape(shape).sqrt()
    kept = {"latents": found.half().contiguous(), **moments}
    replace_file(path, save(kept))
    return kept.pop("latents"), kept


def train(config: Config, folder: Path) -> Run:
    """Train on the drawings of `folder`; resumes from ``flow.safetensors``."""
    torch.manual_seed(config.seed + 30)
    clean, moments = latents(config, folder)
    codes = draw.load(folder, "train")[1]
    model, drawn = transformer(config), config.drawn()
    run = Run(folder / "flow.safetensors", model, config.flow)
    base = base_of(model, **moments)
    cells = torch.ones(clean.shape[-2:])
    cells[FACE_TOKENS, FACE_TOKENS] = FACE_WEIGHT
    cells, batch = cells / cells.mean(), config.flow.batch // PARTS
    one_at_a_time = Lock()  # a tokenizer keeps its padding in itself

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(codes), (batch,), generator=generator)
        rng = np.random.default_rng(generator.initial_seed())
        captions = [text.training_caption(codes[i], rng, drawn=drawn) for i in index.tolist()]
        with one_at_a_time:
            prompts = base.encode_prompts(captions, batch)
        x = clean[index].float()
        noise = torch.randn(x.shape, generator=generator)
        strata = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        uniform = torch.rand(batch, generator=generator)
        times = torch.where(uniform < UNIFORM, uniform / UNIFORM, base.schedule.levels(strata))
        noisy, target = base.schedule.add_noise(x, noise, times)
        return ((base.predict(model, noisy, times, prompts) - target).square() * cells).mean()

    averaged = base_of(run.average, **moments)
    run.train(loss, config.seed + 31, report=lambda: read_back(averaged, 64), report_every=600)
    return run


def make(config: Config, folder: Path, out: Path) -> None:
    """The whole stage: the pipeline in the folder ``flow`` of `folder`, and in `out` what it has besides the shipped one."""
    train(config, folder)
    export(config, folder, folder / "flow")
    with replace_folder(out) as scratch:
        upper(PIPELINE, folder / "flow", scratch)
        card.write_flow(config, folder, scratch)


def read_back(base: EmbeddedFlow, pictures: int) -> str:
    """What the judge reads of pictures drawn for new captions, as a line for the log."""
    rng = np.random.default_rng([7, 8])
    scenes = [world.sample_scene(rng) for _ in range(pictures)]
    prompts = base.encode_prompts([world.caption(scene, rng, omit=0) for scene in scenes])
    options = {"negative": base.encode_prompts([""]), "steps": base.sampling.steps, "guidance": base.sampling.guidance}
    scores = load_judge().caption_score(base.draw(prompts, list(range(pictures)), batch=32, **options), scenes)
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def export(config: Config, folder: Path, out: Path) -> None:
    """Write the pipeline of the averaged transformer to `out` in fp16."""
    model = transformer(config)
    tensors = load_file(folder / "flow.safetensors")
    model.load_state_dict({n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")})
    pipe = base_of(model, **latents(config, folder)[1]).pipe
    with replace_folder(out) as scratch:
        pipe.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
        shutil.copytree(PIPELINE / "text_encoder", scratch / "text_encoder", dirs_exist_ok=True)  # loads as fp32
        for path in scratch.rglob("*.safetensors"):
            path.chmod(0o644)
