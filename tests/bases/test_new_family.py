"""A family that nothing here was written for: flow matching, packed latents [tokens, channels], a mask among its prompts.

It is one class and one row, as docs/new_base.md has it, and every task that draws takes it: nothing outside ``bases`` knows
UNets, numbered timesteps or what is in a bundle of prompts.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import smidgen
from smidgen.bases import families
from smidgen.bases.families import FAMILIES, Family, load_base
from smidgen.bases.pipelines import PipelineBase
from smidgen.bases.protocol import Prompts, Sampling
from smidgen.bases.schedules import FlowSchedule
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.use.refine import Refine, refine_rows
from smidgen.errors import ConfigError
from smidgen.tasks.control import hint
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data
from tests.training import tiny

SIZE, PATCH, TOKENS, WIDTH = 16, 4, 6, 24


def transformer():
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=3 * PATCH**2, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip


class Flow(PipelineBase):
    family = "flow"
    component = "transformer"
    targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
    sampling = Sampling(3, 2.0)
    schedule = FlowSchedule()

    @classmethod
    def load(cls, name, folder, pipeline, precision, device, **options):
        return cls(name, SimpleNamespace(transformer=transformer().requires_grad_(False).eval()))

    resolution, factor = SIZE, PATCH

    def latent_shape(self, size):
        return ((size // PATCH) ** 2, 3 * PATCH**2)

    def encode_images(self, pixels, batch=4):
        mean = torch.nn.functional.pixel_unshuffle(pixels, PATCH).flatten(2).mT.contiguous()
        return mean, torch.zeros_like(mean)

    def encode_prompts(self, prompts, batch=16):
        embeds, mask = torch.zeros(len(prompts), TOKENS, WIDTH), torch.zeros(len(prompts), TOKENS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = prompt.split()[:TOKENS]
            for place, word in enumerate(words):
                embeds[row, place] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, word))))
            mask[row, : len(words)] = True
        return Prompts({"embeds": embeds, "mask": mask})

    def prompt_shapes(self, model, tokens):
        return {"embeds": (tokens, WIDTH), "mask": (tokens,)}

    def predict(self, model, noisy, timesteps, prompts):
        side = int(noisy.shape[1] ** 0.5)
        zero, words = torch.arange(1), torch.arange(prompts.tensors["embeds"].shape[1])
        embeds = prompts.tensors["embeds"] * prompts.tensors["mask"][..., None]
        ids = {"img_ids": torch.cartesian_prod(zero, torch.arange(side), torch.arange(side), zero)}
        ids["txt_ids"] = torch.cartesian_prod(zero, zero, zero, words)
        given = {
            "hidden_states": noisy,
            "encoder_hidden_states": embeds,
            "timestep": timesteps,
            "guidance": None,
            **ids,
        }
        return model(**given, return_dict=False)[0].float()

    def draw_latents(self, prompts, seeds, *, negative, steps, guidance, size=None, batch=8):
        shape, found = self.latent_shape(size or SIZE), []
        for at in range(0, len(prompts), batch):
            own = prompts[at : at + batch]
            x = torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds[at : at + batch]]
            )
            for step in range(steps, 0, -1):
                s = torch.full((len(own),), step / steps)
                asked, free = (self.predict(self.model, x, s, p) for p in (own, negative[[0] * len(own)]))
                x = x - (free + guidance * (asked - free)) / steps
            found.append(x)
        return torch.cat(found).detach()

    def decode(self, latents, batch=4):
        side = int(latents.shape[1] ** 0.5)
        pixels = torch.nn.functional.pixel_shuffle(latents.mT.unflatten(-1, (side, side)), PATCH)
        found = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(own) for own in found]


@pytest.fixture
def flow(monkeypatch, tmp_path) -> str:
    monkeypatch.setitem(FAMILIES, "flow", Family(lambda name, cls: cls == "FlowPipeline", Flow))
    folder = tmp_path / "flow"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FlowPipeline"}))
    return str(folder)


def test_one_row_is_all_that_loading_needs(flow):
    assert type(load_base(flow)) is Flow
    assert families.learning_kind(flow) == "picture"


def test_personalize_takes_it(flow, tmp_path):
    chosen = PRESETS["debug"]
    config = replace(
        chosen, base=flow, out=tmp_path / "out", data=Data(tiny.pictures(tmp_path / "pictures", size=SIZE)),
        adapter=Adapter("lora", rank=2, learning_rate=1e-2), train=replace(chosen.train, preview_steps=2),
    )  # fmt: skip
    report = personalize(config, progress=False)
    assert report.entry.trained_numbers > 0 and (tmp_path / "out" / "preview-2.png").is_file()
    again = load_base(flow)
    smidgen.load(again.model, tmp_path / "out")
    assert smidgen.verify(again.model, tmp_path / "out").ok


def test_control_says_what_it_lacks(flow):
    with pytest.raises(ConfigError, match="is of the family 'flow', whose Flux2Transformer2DModel has none"):
        hint.config_for(load_base(flow), "canny")


def test_its_adapters_are_held_drawn_and_refined(flow, tmp_path):
    pipeline = AdaptedPipeline.load(flow, smidgen.config("lora", r=2))
    assert set(pipeline.config.target_modules) == set(Flow.targets)
    rows = 0.3 * torch.randn(2, pipeline.layout.size, generator=torch.Generator().manual_seed(0))
    scenes = Scenes(("a red person", "a person"), (1, 2), *Flow.sampling)
    base, first, second = pipeline.draw(rows, scenes, with_base=True, batch=3)
    assert base[0].size == (SIZE, SIZE) and len({image.tobytes() for image in (base[0], first[0], second[0])}) == 3
    refined, layout = refine_rows(pipeline, rows, [[base[0]], [first[0]]], Refine(steps=2, keep_rank=True))
    assert refined.shape == rows.shape and layout is pipeline.layout and not torch.equal(refined, rows)
