"""Stage `card`: the model card, with the figures that benchmarks/embedded_base.py measured."""

import json
from pathlib import Path

from safetensors import safe_open

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import EMBEDDED_FLOW, EMBEDDED_WIDE, wide, world
from smidgen.bases.embedded.base import GUIDANCE
from smidgen.bases.families import card_lines
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.export import training_facts
from smidgen.tasks.cards import bullets, model_card, table

BENCHMARKS = Path(__file__).parents[3] / "benchmarks" / "results"
RESULTS, FLOW_RESULTS, WIDE_RESULTS = (BENCHMARKS / f"embedded_{name}.json" for name in ("base", "flow", "wide"))

HEAD = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
HEAD |= {"license": "other", "license_name": "avataaars", "license_link": "https://avataaars.com/"}
WIDE_HEAD = {**HEAD, "license_name": "avataaars-and-cc-by-4.0"}
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


FLOW_CARD = """What a genuine `Flux2KleinPipeline` has besides [the embedded UNet base](../pipeline/README.md): a flow-matching transformer of the
FLUX.2 class ({numbers} numbers, {size:.1f} MB in fp16) in the same latents, with the same autoencoder and text encoder, bit for bit.
`smidgen.embedded_base("embedded-flow")` puts the whole folder together.

```python
import smidgen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(smidgen.embedded_base("embedded-flow"))
pipe(prompt="a portrait of a person, smiling"{call}).images[0]
```

The length and the layer of the prompts and the size must be given: klein's own (512 tokens of Qwen3, 1024 x 1024 pixels) are not this base's.

## What it knows
What the UNet base knows, from drawings of the same training people: the same words, the same people held out.

## How it was made
`python -m smidgen.lab.embedded_base --stage render`, then `--stage flow`: {steps} steps of {batch} in {minutes:.0f} minutes on two CPU cores shared
with other work. x_s = (1 - s) x + s noise, target noise - x; s logit-normal, a tenth uniform; tokens of eyes and mouth count twice;
Muon on the blocks' matrices, AdamW on the rest, both at {rate:g}, cosine, bf16 arithmetic; averaged weights. The autoencoder and text encoder, frozen here, were trained with the UNet (its card says for how long).

## How well it does
{figures}

## Licence
As the UNet base: portraits in the style "Avataaars" by Pablo Stanley (https://avataaars.com, free for personal and commercial use), drawn by
DiceBear (MIT, Florian Körner).
"""


WIDE_CARD = """What a genuine `Flux2KleinPipeline` has besides [the embedded flow base](../flow/README.md) to draw
the wide world (docs/embedded_world.md): the same transformer trained on ({numbers} numbers, {size:.1f} MB: int8, each row with a scale of its own), an autoencoder
(int8 too) and a text encoder with the wide world's words. `smidgen.embedded_base("embedded-wide")` puts the whole folder together, in fp16.

```python
import smidgen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(smidgen.embedded_base("embedded-wide"))
pipe(prompt="a closeup of a person, smiling, in a red beanie"{call}).images[0]
```

## What it knows
Scenes: eyes, mouth, clothes and their colour, background, glasses, hats and their colour, framing, tilt of the head, light and two styles of
drawing. People are never captioned: hair, hair colour and skin (any colour), facial hair, eyebrows. One person in twelve and six ranges of colours were held out.

## How it was made
`make wide-base`. The autoencoder: the embedded base's, trained on with its latents held near those of before, 1,238 steps of the decoder alone, then
2,400 of both, 16 drawings each; 27.5 dB on held-out drawings. The transformer and the text encoder: from those of the embedded flow base, {steps} steps of {batch} in {minutes:.0f} minutes; Muon on the
blocks' matrices, AdamW on the rest, both at {rate:g}, cosine, bf16 arithmetic where the processor has it; averaged weights. Half of the drawings taken show a hat, one in ten is inked.

## How well it does
{figures}

## Limits
It draws these two cartoon worlds and nothing else. Details the size of a pixel (eyes, eyebrows, patterns) fail more often than colours do, and the judge reads them less well too. The judge is not a person.

## Licence
"Avataaars" by Pablo Stanley (https://avataaars.com, free for personal and commercial use) and "Avatar Illustration System" by Micah Lanier (CC BY 4.0), remixed by DiceBear (MIT, Florian Körner).
"""


def write_flow(config: Config, folder: Path, out: Path) -> None:
    """Write ``README.md`` into the folder `out` of what ships of a flow base; without measured figures it says so."""
    wide = config.world == "wide"
    results = WIDE_RESULTS if wide else FLOW_RESULTS
    figures = json.loads(results.read_text())["figures"] if results.exists() else None
    with safe_open(folder / "flow.safetensors", "pt") as file:
        facts = file.metadata()
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    text = (WIDE_CARD if wide else FLOW_CARD).format(
        numbers=f"{_numbers(weights):,}",
        size=weights.stat().st_size / 1e6,
        call=card_lines(EMBEDDED_WIDE if wide else EMBEDDED_FLOW)[1],
        steps=facts["step"],
        minutes=float(facts["seconds"]) / 60,
        batch=config.flow_budget.batch,
        rate=config.flow_budget.lr,
        figures=(_wide_table if wide else _flow_table)(figures) if figures else "Not measured yet.",
    )
    title = "Smidgen's embedded wide base" if wide else "Smidgen's embedded flow base"
    replace_file(out / "README.md", model_card(WIDE_HEAD if wide else HEAD, title, text.strip()))


def _wide_table(figures: dict) -> str:
    rows = []
    for name, values in wide.SCENE_ATTRIBUTES.items():
        low, high = figures[f"read_back_{name}_interval"]
        least = min(values, key=lambda value: figures[f"read_back_{name}_{value}"])
        rows.append([
            name.replace("_", " "), f"{figures[f'read_back_{name}']:.3f} ({low:.3f} to {high:.3f})",
            f"{figures[f'drawings_{name}']:.3f}", f"{least} {figures[f'read_back_{name}_{least}']:.2f}",
        ])  # fmt: skip
    rows.append(["mean", f"{figures['read_back_mean']:.3f}", f"{figures['drawings_mean']:.3f}", ""])
    head = [
        "read back as asked (95 % interval)",
        "this base",
        "the judge itself on real drawings",
        "least of its values",
    ]
    return f"""`make bench NAME=embedded_wide`: {figures["pictures"]} new captions, a dozen and more for each value, {figures["steps"]} steps, guidance {figures["guidance"]:g}.

{table(head, rows)}

The judge's identity score between two pictures averages {figures["identity_score_between_pictures"]:.2f} (1: the same person, 0: strangers). Autoencoder: {figures["autoencoder_psnr_db"]:.1f} dB on the drawings of {figures["pictures"]} captions, hats among them
(the embedded base's on the same: {figures["autoencoder_before_psnr_db"]:.1f})."""


def _flow_table(figures: dict) -> str:
    def share(base: str, name: str) -> str:
        low, high = figures[f"{base}_read_back_{name}_interval"]
        return f"{figures[f'{base}_read_back_{name}']:.3f} ({low:.3f} to {high:.3f})"

    bases = ("embedded_flow", "embedded")
    rows = [[name.replace("_", " "), *(share(base, name) for base in bases)] for name in world.SCENE_ATTRIBUTES]
    told = {
        "mean": "read_back_mean",
        "the reader's certainty of hair": "certainty_hair",
        "and of skin": "certainty_skin",
        "identity between two pictures (0: strangers)": "identity_score_between_pictures",
        "seconds a picture, alone": "seconds_of_1",
        "seconds a picture, of eight": "seconds_of_8",
    }
    rows += [[words, *(f"{figures[f'{base}_{name}']:.3f}" for base in bases)] for words, name in told.items()]
    head = ["read back as asked (95 % interval)", "this base", "the UNet base"]
    return f"""`make bench NAME=embedded_flow`: {figures["pictures"]} new captions, the same for both, read by the judge. On real drawings
the reader is sure of hair at {figures["drawings_certainty_hair"]:.3f}, of skin at {figures["drawings_certainty_skin"]:.3f}. {figures["threads"]} threads,
{figures["embedded_flow_steps"]} steps against {figures["embedded_steps"]}, guidance {figures["embedded_flow_guidance"]:g}.

{table(head, rows)}"""


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
        guidance=f"{GUIDANCE:g}",
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
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
