"""How well the embedded base draws what a caption asks.

``python benchmarks/embedded_base.py --seed 0`` draws captions anew, generates, reads the pictures back with the
judge, and writes benchmarks/results/embedded_base.json (flat figures, 95 % bootstrap intervals as [low, high]) and,
with --sheet, pictures.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import embedded_base, world
from smidgen.bases.embedded.judge import load_judge
from smidgen.tasks.png import write_png

RESULTS = Path(__file__).parent / "results" / "embedded_base.json"
TARGETS = {"background": 0.95, "clothes_color": 0.9, "glasses": 0.9, "mouth": 0.75, "eyes": 0.75}


def load() -> StableDiffusionPipeline:
    """The shipped pipeline in fp32 on the CPU."""
    pipe = StableDiffusionPipeline.from_pretrained(embedded_base())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionPipeline, captions: list[str], seed: int, steps: int, guidance: float, batch: int = 25
) -> list:
    """One picture a caption, picture i from the generator of seed + i."""
    images = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        images += pipe(part, generator=generators, num_inference_steps=steps, guidance_scale=guidance).images
    return images


def interval(values: np.ndarray, rng: np.random.Generator, draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean."""
    means = rng.choice(values, (draws, len(values))).mean(1)
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def shares(scenes: list[world.Scene], images: list | torch.Tensor, prefix: str, rng: np.random.Generator) -> dict:
    """Per attribute, the share of pictures read as asked, its interval and the count; hidden eyes are not counted."""
    words = load_judge().read(images)
    figures: dict = {}
    for name in world.SCENE_ATTRIBUTES:
        asked = [
            (getattr(s, name), w) for s, w in zip(scenes, words[name], strict=True) if getattr(s, name) != "hidden"
        ]
        right = np.array([a == w for a, w in asked], float)
        figures[f"{prefix}_{name}"] = round(float(right.mean()), 4)
        figures[f"{prefix}_{name}_interval"] = interval(right, rng)
    return figures


@torch.no_grad()
def autoencoder_figures(
    pipe: StableDiffusionPipeline, drawings: list, scenes: list[world.Scene], rng: np.random.Generator
) -> dict:
    """Mean PSNR per picture of encode-decode, peak 255, its interval, and how well the judge reads what was decoded."""
    pictures = torch.from_numpy(np.stack([np.asarray(d) for d in drawings])).permute(0, 3, 1, 2).float() / 127.5 - 1
    values, decodings = [], []
    for target in pictures.split(50):
        decoded = pipe.vae.decode(pipe.vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        decodings.append((decoded + 1) / 2)
        values.append(-10 * torch.log10(((decoded - target) / 2).square().mean((1, 2, 3))))
    decibels = torch.cat(values).numpy()
    return {
        "autoencoder_psnr_db": round(float(decibels.mean()), 3),
        "autoencoder_psnr_db_interval": interval(decibels, rng),
        "autoencoder_psnr_db_worst_percent": round(float(np.quantile(decibels, 0.01)), 3),
        **shares(scenes, torch.cat(decodings), "decoded", rng),
    }


def seconds_per_picture(
    pipe: StableDiffusionPipeline, caption: str, steps: int, guidance: float, repeats: int = 7
) -> float:
    """Median wall-clock seconds of one picture alone, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        pipe(caption, num_inference_steps=steps, guidance_scale=guidance)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def sheet(images: list, columns: int, path: Path, zoom: int = 2) -> None:
    """Paste the pictures into one, enlarged without smoothing."""
    side = world.SIZE * zoom
    page = Image.new("RGB", (columns * side, -(-len(images) // columns) * side))
    for i, image in enumerate(images):
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    write_png(page, path)


def measure(pictures: int, seed: int, steps: int, guidance: float, sheet_path: Path | None = None) -> dict:
    """All figures; captions and people are drawn from `seed`."""
    rng = np.random.default_rng([seed, 8])
    pipe = load()
    scenes = [world.sample_scene(rng) for _ in range(pictures)]
    captions = [world.caption(s, rng, omit=0) for s in scenes]
    drawn = [world.render(world.sample_identity(rng, "test"), s) for s in scenes]
    figures = {"pictures": pictures, "seed": seed, "steps": steps, "guidance": guidance}
    figures |= autoencoder_figures(pipe, drawn, scenes, rng)
    figures |= shares(scenes, drawn, "judge", rng)
    images = generate(pipe, captions, seed, steps, guidance)
    figures |= shares(scenes, images, "read_back", rng)
    judge = load_judge()
    likeness = [judge.identity_score([a], [b]).item() for a, b in pairwise(images)]
    figures["identity_score_between_pictures"] = round(float(np.mean(likeness)), 4)
    if sheet_path:
        sheet(images[:60], 10, sheet_path)
    figures["threads"] = torch.get_num_threads()
    figures["seconds_per_picture_all_threads"] = round(seconds_per_picture(pipe, captions[0], steps, guidance), 4)
    torch.set_num_threads(1)  # operations this small gain nothing from a second thread, and lose on a busy machine
    figures["seconds_per_picture"] = round(seconds_per_picture(pipe, captions[0], steps, guidance), 4)
    torch.set_num_threads(figures["threads"])
    figures["load_average"] = round(os.getloadavg()[0], 2)
    figures["folder_bytes"] = sum(f.stat().st_size for f in embedded_base().rglob("*") if f.is_file())
    for name, target in TARGETS.items():
        figures[f"target_{name}"] = target
    return figures


def record(figures: dict) -> dict:
    """The figures with what is needed to redo them."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            n: version(n)
            for n in ("torch", "diffusers", "transformers", "dicebear-core", "dicebear-styles", "resvg_py")
        },
        "figures": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    choice = parser.parse_args()
    result = record(measure(choice.pictures, choice.seed, choice.steps, choice.guidance, choice.sheet))
    replace_file(choice.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
