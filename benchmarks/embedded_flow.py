"""How well the embedded flow base draws what a caption asks, beside the UNet one on the same captions.

``python -m benchmarks.embedded_flow`` draws 500 captions anew with both, reads the pictures back with the judge, and writes
benchmarks/results/embedded_flow.json (flat figures, 95 % bootstrap intervals as [low, high]) and docs/results/embedded_flow.png.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._harness import write_result
from benchmarks.embedded_base import interval, shares, sheet
from smidgen.bases.embedded import EMBEDDED, EMBEDDED_FLOW, FOLDERS, embedded_base, world
from smidgen.bases.embedded.judge import as_tensor, load_judge
from smidgen.bases.families import load_base

BASES = (EMBEDDED, EMBEDDED_FLOW)
PAGE = Path(__file__).parents[1] / "docs" / "results" / "embedded_flow.png"


def certainty(images: list) -> dict[str, float]:
    """How sure the judge's reader is of the hair and the skin that it sees: the mean of its largest probability."""
    with torch.no_grad():
        logits = load_judge().reader(as_tensor(images))
    return {name: float(logits[name].softmax(-1).amax(-1).mean()) for name in ("hair", "skin")}


def measure(name: str, scenes: list[world.Scene], captions: list[str], seed: int) -> tuple[dict[str, Any], list]:
    """Figures of one base, by their names without it, and its pictures."""
    base, rng = load_base(name), np.random.default_rng([seed, 9])
    prompts = base.encode_prompts(captions)
    options: dict[str, Any] = {"negative": base.encode_prompts([""])} | base.sampling.chosen(None, None)
    images = []
    for at in range(0, len(captions), 25):
        seeds = [seed * 100_003 + at + i for i in range(len(captions[at : at + 25]))]
        images += base.draw(prompts[at : at + 25], seeds, **options)
    figures = shares(scenes, images, "read_back", rng)
    words = world.SCENE_ATTRIBUTES
    figures["read_back_mean"] = float(np.mean([figures[f"read_back_{word}"] for word in words]))
    figures |= {f"certainty_{what}": value for what, value in certainty(images).items()}
    judge = load_judge()
    likeness = [judge.identity_score([a], [b]).item() for a, b in pairwise(images)]
    figures["identity_score_between_pictures"] = float(np.mean(likeness))
    figures["identity_score_between_pictures_interval"] = interval(np.array(likeness), rng)
    return figures | {"steps": options["steps"], "guidance": options["guidance"]}, images


def seconds(captions: list[str], repeats: int) -> dict[str, float]:
    """Median wall-clock seconds of one picture alone, and of one of a batch of eight, the bases taking turns."""
    found: dict[str, list[float]] = {}
    bases = {name: load_base(name) for name in BASES}
    given = {n: (b.encode_prompts(captions[:8]), b.encode_prompts([""])) for n, b in bases.items()}
    for number in range(repeats + 1):
        for name, base in bases.items():
            for batch in (1, 8):
                prompts, negative = given[name]
                began = time.perf_counter()
                base.draw(prompts[:batch], range(batch), negative=negative, **base.sampling.chosen(None, None))
                if number:
                    took = (time.perf_counter() - began) / batch
                    found.setdefault(f"{_key(name)}_seconds_of_{batch}", []).append(took)
    return {name: statistics.median(times) for name, times in found.items()}


def _key(name: str) -> str:
    return name.replace("-", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    choice = parser.parse_args()
    rng = np.random.default_rng([choice.seed, 8])
    scenes = [world.sample_scene(rng) for _ in range(choice.pictures)]
    captions = [world.caption(scene, rng, omit=0) for scene in scenes]
    drawings = [world.render(world.sample_identity(rng, "test"), scene) for scene in scenes]
    figures: dict[str, Any] = {"pictures": choice.pictures, "seed": choice.seed, "threads": torch.get_num_threads()}
    figures |= {f"drawings_certainty_{what}": value for what, value in certainty(drawings).items()}
    shown = drawings[:16]
    for name in BASES:
        found, images = measure(name, scenes, captions, choice.seed)
        figures |= {f"{_key(name)}_{what}": value for what, value in found.items()}
        shown += images[:16]
    figures |= seconds(captions, choice.repeats)
    own = FOLDERS[EMBEDDED_FLOW][-1]
    figures["embedded_flow_own_bytes"] = sum(f.stat().st_size for f in own.rglob("*") if f.is_file())
    figures["embedded_flow_folder_bytes"] = sum(
        f.stat().st_size for f in embedded_base(EMBEDDED_FLOW).rglob("*") if f.is_file()
    )
    sheet(shown, 16, PAGE)
    write_result("embedded_flow", figures, "python -m benchmarks.embedded_flow")


if __name__ == "__main__":
    main()
