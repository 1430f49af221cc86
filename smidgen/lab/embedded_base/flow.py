"""Stage `flow`: a ``Flux2KleinPipeline`` on the frozen VAE and text encoder of the embedded base, which are its own bit for bit.
In the wide world it starts from that base, on the VAE of stage `autoencoder`, and its text encoder learns the new words.

Flow matching (Lipman et al. 2023) with logit-normal times (Esser et al. 2024), a tenth of them uniform so that no time is left out,
stratified over a batch; the tokens around eyes and mouth count twice. The blocks' matrices are trained by Muon. FLUX.2's blocks share one modulation, which is what a small
transformer can afford. Drawings are those of stage `render`.
"""

import inspect
import logging
import shutil
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from smidgen.adapters.atomic import replace_file, replace_folder
from smidgen.bases.embedded import EMBEDDED_FLOW, FLOW, PIPELINE, WIDE_FLOW, embedded_base, world
from smidgen.bases.embedded.base import EmbeddedFlow, EmbeddedWide
from smidgen.bases.embedded.judge import load_judge
from smidgen.bases.embedded.layers import in_int8, upper
from smidgen.bases.embedded.wide_judge import load_wide_judge
from smidgen.bases.protocol import Prompts
from smidgen.lab.embedded_base import card, draw, text
from smidgen.lab.embedded_base.autoencoder import of_world, shipped
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.export import read_by_all
from smidgen.lab.embedded_base.run import PARTS, Run
from smidgen.training.quick import mixed

log = logging.getLogger(__name__)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FACE_TOKENS = slice(1, 3)
FACE_WEIGHT = 2.0
UNIFORM = 0.1
SHIFT = (
    2.5  # of what ships: adapters learn and pictures are drawn with more of the noisy times, where people are decided
)
SHARES = {"hat": 0.5, "style": 0.1}
SHORTER = 32  # tokens at which most steps of the wide world cut captions (69 % fit): two thirds of the time of 48
SHORT = 0.67  # share of those steps
TEMPLATE = "{{ messages[0]['content'] }}"  # klein's pipeline asks for a chat template


class Denoiser(nn.Module):
    """What is trained here: FLUX.2's denoiser at this width, and in the wide world the text encoder."""

    def __init__(self, config: Config, words: CLIPTokenizer) -> None:
        super().__init__()
        wide, head = config.world == "wide", 32
        self.text_encoder = text.shipped_encoder(words).requires_grad_(wide)
        last = getattr(self.text_encoder, "text_model", self.text_encoder)
        last.final_layer_norm.requires_grad_(False)  # comes after what klein reads
        if wide:
            self.transformer = Flux2Transformer2DModel.from_pretrained(embedded_base(EMBEDDED_FLOW) / "transformer")
            self.transformer.register_to_config(_name_or_path=EMBEDDED_FLOW)  # not a folder of this machine
            return
        self.transformer = Flux2Transformer2DModel(
            in_channels=4 * shipped().config.latent_channels, num_layers=config.flow_blocks[0],
            num_single_layers=config.flow_blocks[1], attention_head_dim=head,
            num_attention_heads=config.flow_width // head, timestep_guidance_channels=64, mlp_ratio=3.0,
            joint_attention_dim=self.text_encoder.config.hidden_size, axes_dims_rope=(head // 4,) * 4,
            guidance_embeds=False,
        )  # fmt: skip
        nn.init.zeros_(self.transformer.proj_out.weight)  # as the last modulation, zero at the start
        nn.init.zeros_(self.transformer.norm_out.linear.weight)


def family(config: Config) -> type[EmbeddedFlow]:
    """The base that is trained."""
    return EmbeddedWide if config.world == "wide" else EmbeddedFlow


def words_of(config: Config, folder: Path) -> CLIPTokenizer:
    """The tokenizer: the shipped one, or that of the wide world's words."""
    words = (
        text.tokenizer(folder / "tokenizer", config.drawn())
        if config.world == "wide"
        else CLIPTokenizer.from_pretrained(embedded_base() / "tokenizer")
    )
    words.chat_template = TEMPLATE
    return words


def base_of(
    config: Config, folder: Path, model: Denoiser, words: CLIPTokenizer, mean: Tensor, var: Tensor, shift: float = 1.0
) -> EmbeddedFlow:
    """``model`` in a pipeline, as a base of its family: it is trained through the code that adapters are trained through.
    ``mean`` and ``var`` [4 c] of the VAE's latents, 2 x 2 in one, are what FLUX.2 standardises by."""
    plain = of_world(config, folder)
    taken = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    vae = AutoencoderKLFlux2(
        **{name: value for name, value in plain.config.items() if name in taken}, patch_size=(2, 2)
    )
    vae.load_state_dict(plain.state_dict() | {n: t for n, t in vae.state_dict().items() if n.startswith("bn.")})
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(var - vae.config.batch_norm_eps)
    schedule = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = Flux2KleinPipeline(schedule, vae.eval(), model.text_encoder, words, model.transformer)
    pipe.default_sample_size = world.SIZE // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    return family(config)("flow", pipe)


def latents(config: Config, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Standardised latents [n, 4 c, 4, 4] of the training drawings in fp16, and the moments they were standardised by: their own, in the
    wide world those of the base that is trained on; made once."""
    path = folder / "flow_latents.safetensors"
    pictures = draw.load(folder, "train")[0]
    if path.exists():
        kept = load_file(path)
        if len(kept["latents"]) == len(pictures):
            return kept.pop("latents"), kept
    words = words_of(config, folder)
    model = Denoiser(config, words)
    channels = model.transformer.config.in_channels
    base = base_of(config, folder, model, words, torch.zeros(channels), torch.ones(channels))
    parts = []
    with torch.no_grad():
        for at in range(0, len(pictures), 512):
            pixels = torch.from_numpy(np.array(pictures[at : at + 512])).permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append(base.encode_images(pixels, batch=64)[0].float())
    found = torch.cat(parts)
    moments = {"mean": found.mean((0, 2, 3)), "var": found.var((0, 2, 3))}
    if config.world == "wide":
        of = AutoencoderKLFlux2.from_pretrained(embedded_base(EMBEDDED_FLOW) / "vae")
        moments = {"mean": of.bn.running_mean, "var": of.bn.running_var + of.config.batch_norm_eps}
    shape = (1, -1, 1, 1)
    found = (found - moments["mean"].reshape(shape)) / moments["var"].reshape(shape).sqrt()
    kept = {"latents": found.half().contiguous(), **moments}
    replace_file(path, save(kept))
    return kept.pop("latents"), kept


def shares(config: Config, codes: np.ndarray) -> Tensor:
    """How often each drawing is taken, as weights: what few drawings have and is hard to learn (a second style, hats) makes up its
    share of `SHARES` all the same."""
    weights = torch.ones(len(codes))
    if config.world == "wide":
        for name, share in SHARES.items():
            rare = torch.from_numpy(codes[:, list(config.drawn().ATTRIBUTES).index(name)]) > 0
            weights[rare] *= share / (1 - share) * weights[~rare].sum() / weights[rare].sum().clamp_min(1)
    return weights


def embeds(model: Denoiser, words: CLIPTokenizer, captions: list[str], length: int, lock: Lock) -> Tensor:
    """[captions, length, width] as klein's pipeline makes them of the last hidden state, with gradients."""
    with lock:  # a tokenizer keeps its padding in itself
        ids = words(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    encoded = model.text_encoder(ids.input_ids, attention_mask=ids.attention_mask, output_hidden_states=True)
    return encoded.hidden_states[-1]


def train(config: Config, folder: Path) -> Run:
    """Train on the drawings of `folder`; resumes from ``flow.safetensors``."""
    torch.manual_seed(config.seed + 30)
    clean, moments = latents(config, folder)
    codes = draw.load(folder, "train")[1]
    words, drawn = words_of(config, folder), config.drawn()
    budget, length = config.flow_budget, family(config).prompt_options["max_sequence_length"]
    model = Denoiser(config, words)
    run = Run(
        folder / "flow.safetensors",
        model,
        budget,
        muon=lambda name: name.startswith("transformer.") and "blocks" in name,
    )
    base = base_of(config, folder, model, words, moments["mean"], moments["var"])
    cells = torch.ones(clean.shape[-2:])
    cells[FACE_TOKENS, FACE_TOKENS] = FACE_WEIGHT
    weights = shares(config, codes)
    cells, batch, lock = cells / cells.mean(), budget.batch // PARTS, Lock()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.multinomial(weights, batch, replacement=True, generator=generator)
        cut = config.world == "wide" and torch.rand((), generator=generator).item() < SHORT
        rng = np.random.default_rng(generator.initial_seed())
        captions = [text.training_caption(codes[i], rng, drawn=drawn) for i in index.tolist()]
        prompts = Prompts({"embeds": embeds(model, words, captions, SHORTER if cut else length, lock)})
        x = clean[index].float()
        noise = torch.randn(x.shape, generator=generator)
        strata = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        uniform = torch.rand(batch, generator=generator)
        times = torch.where(uniform < UNIFORM, uniform / UNIFORM, base.schedule.levels(strata))
        noisy, target = base.schedule.add_noise(x, noise, times)
        with mixed():
            found = base.predict(model.transformer, noisy, times, prompts)
        return ((found.float() - target).square() * cells).mean()

    average = base_of(config, folder, cast(Denoiser, run.average), words, moments["mean"], moments["var"], SHIFT)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention goes back slowly over so few tokens on a CPU
        run.train(loss, config.seed + 31, report=lambda: read_back(average, drawn, 64), report_every=600)
    return run


def make(config: Config, folder: Path, out: Path) -> None:
    """The whole stage: the pipeline in the folder ``flow`` of `folder`, and in a folder of `out` what it has besides what ships already:
    the UNet base, in the wide world the flow base too, and there the transformer is in int8 and the VAE is that of stage `autoencoder`."""
    train(config, folder)
    export(config, folder, folder / "flow")
    wide = config.world == "wide"
    ships = out / (WIDE_FLOW if wide else FLOW).name
    with replace_folder(ships) as scratch:
        upper(embedded_base(EMBEDDED_FLOW) if wide else PIPELINE, folder / "flow", scratch)
        if wide:
            transformer, vae = (Path(part) / WEIGHTS for part in ("transformer", "vae"))
            replace_file(scratch / transformer, save(in_int8(load_file(scratch / transformer)), {"format": "pt"}))
            shutil.copyfile(next(path / vae for path in (ships, WIDE_FLOW) if (path / vae).exists()), scratch / vae)
        card.write_flow(config, folder, scratch)


def read_back(base: EmbeddedFlow, drawn: ModuleType, pictures: int) -> str:
    """What the judge of the world reads of pictures drawn for new captions, as a line for the log."""
    rng = np.random.default_rng([7, 8])
    scenes = [drawn.sample_scene(rng) for _ in range(pictures)]
    prompts = base.encode_prompts([drawn.caption(scene, rng, omit=0) for scene in scenes])
    options = {"negative": base.encode_prompts([""]), "steps": base.sampling.steps, "guidance": base.sampling.guidance}
    images = base.draw(prompts, list(range(pictures)), batch=32, **options)
    scores = (load_judge() if drawn is world else load_wide_judge()).caption_score(images, scenes)
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def export(config: Config, folder: Path, out: Path) -> None:
    """Write the pipeline of the averaged weights to `out` in fp16."""
    words = words_of(config, folder)
    model = Denoiser(config, words)
    tensors = load_file(folder / "flow.safetensors")
    model.load_state_dict({n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")})
    moments = latents(config, folder)[1]
    pipe = base_of(config, folder, model, words, moments["mean"], moments["var"], SHIFT).pipe
    with replace_folder(out) as scratch:
        pipe.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
        if config.world == "wide":
            read_by_all(scratch, folder / "tokenizer")
        else:
            shutil.copytree(PIPELINE / "text_encoder", scratch / "text_encoder", dirs_exist_ok=True)  # loads as fp32
        for path in scratch.rglob("*.safetensors"):
            path.chmod(0o644)
