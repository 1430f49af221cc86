"""Stage `card`: the model card, with the figures that benchmarks/embedded_base.py measured."""

import json
from pathlib import Path

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import world
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.export import training_facts
from smidgen.tasks.cards import bullets, model_card, table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "embedded_base.json"

HEAD = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
HEAD |= {"license": "other", "license_name": "avataaars", "license_link": "https://avataaars.com/"}
CARD = """A genuine `StableDiffusionPipeline` ({size:.1f} MB, fp16 safetensors) that draws 64x64 portraits on a CPU, so that
adapters can be trained and tried without a GPU or a model hub. Same classes and module names as Stable Diffusion 1.5,
tiny parts: UNet {unet}, text encoder {text}, autoencoder {vae} numbers; latents 8x8x{latent}.

## What it knows
Portraits in the style "Avataaars" by Pablo Stanley (https://avataaars.com, free for personal and commercial use), drawn
by DiceBear (MIT, Florian Körner) with resvg. Captions name the scene (eyes, mouth, clothes and their colour, glasses,
background) and never the person (hair, hair colour, skin, facial hair), so **a subject can only come from an adapter**.
One identity in twelve ({held} of {known}) was held out of all training. The names {names} were seen at random and mean
nothing.

Words of the scene:
{words}

## How it was made
`python -m smidgen.lab.embedded_base --stage all` on two CPU cores shared with other work: {facts}.
v-prediction, zero terminal SNR, 10 % of captions dropped, averaged weights. Sample with the shipped scheduler (DDIM,
trailing), 20 steps, guidance {guidance}.

## How well it does
Measured by `benchmarks/embedded_base.py`; the judge is a classifier trained on real drawings, its own accuracy on
held-out drawings stands beside.

{figures}

## Limits
It draws this one cartoon world and nothing else; words outside the list above do nothing. Small details (mouth, eyes
behind glasses) fail more often than colours do, as the table says. The judge is not a person: it can be wrong in both
directions.
"""


def _table(figures: dict) -> str:
    head = ["attribute", "read back as asked (95 % interval)", "the judge itself on real drawings"]
    rows = []
    for name in world.SCENE_ATTRIBUTES:
        low, high = figures[f"read_back_{name}_interval"]
        share = f"{figures[f'read_back_{name}']:.3f} ({low:.3f} to {high:.3f})"
        rows.append([name.replace("_", " "), share, f"{figures[f'judge_{name}']:.3f}"])
    return f"""{table(head, rows)}

Different pictures show different people: the judge's identity score between two of them (1 the same person, 0 unrelated
people) averages {figures["identity_score_between_pictures"]:.2f}.

Autoencoder: {figures["autoencoder_psnr_db"]:.2f} dB on held-out drawings. One picture takes {figures["seconds_per_picture"]:.2f} s
on one thread, {figures["seconds_per_picture_all_threads"]:.2f} s on {figures["threads"]} ({figures["steps"]} steps, guidance
{figures["guidance"]}, on a machine under a load of {figures["load_average"]})."""


def write(config: Config, folder: Path, out: Path) -> None:
    """Write ``README.md`` into the pipeline folder `out`; without measured figures it says so."""
    figures = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else None
    facts = training_facts(config, folder)
    text = CARD.format(
        size=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
        latent=config.latent_channels,
        held=sum(1 for _ in world.identities("test")),
        known=sum(1 for _ in world.identities()),
        names=", ".join(world.PLACEHOLDERS),
        words=bullets(f"{n.replace('_', ' ')}: {', '.join(w)}" for n, w in world.SCENE_ATTRIBUTES.items()),
        facts=", ".join(f"{n.replace('_', ' ')} {v}" for n, v in facts.items()),
        guidance=figures["guidance"] if figures else 3,
        figures=_table(figures) if figures else "Not measured yet.",
        **{part: f"{_numbers(out / where):,}" for part, where in _WEIGHTS.items()},
    )
    replace_file(out / "README.md", model_card(HEAD, "Smidgen's embedded base", text.strip()))


_WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
