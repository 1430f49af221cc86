"""Whether the flow base of the wide world draws every word of its captions, read back by the wide judge.

Draws a dozen captions for each value of each attribute, by the base that ships or that of ``--base work/wide_base/flow``, writes the
share read as asked by attribute and by value to results/embedded_wide.json (95 % bootstrap intervals as [low, high]), and drawings
above what the base drew for the same captions to docs/results/embedded_wide.png.
"""

import argparse
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, Flux2KleinPipeline

from benchmarks._harness import write_result
from benchmarks.embedded_base import interval, sheet
from smidgen.bases.embedded import EMBEDDED_WIDE, embedded_base, wide
from smidgen.bases.embedded.base import EmbeddedWide
from smidgen.bases.embedded.judge import as_tensor
from smidgen.bases.embedded.wide_judge import load_wide_judge

PAGE = Path(__file__).parents[1] / "docs" / "results" / "embedded_wide.png"
Picture = tuple[wide.Identity, wide.Scene]


def asked(each: int, rng: np.random.Generator) -> list[Picture]:
    """People and scenes, at least `each` for every value of every attribute of a scene."""
    found: list[Picture] = []
    for name, values in wide.SCENE_ATTRIBUTES.items():
        for value in values:
            missing = each - sum(getattr(scene, name) == value for _, scene in found)
            while missing > 0:
                person = wide.sample_identity(rng, "test")
                scene = wide.sample_scene(rng, person)
                if getattr(scene, name) == value:
                    found.append((person, scene))
                    missing -= 1
    return found


def shares(pictures: list[Picture], images: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Share read as asked where a picture tells it, by attribute with its interval, and by value."""
    read = load_wide_judge().read(images)
    figures: dict[str, Any] = {}
    for name, values in wide.SCENE_ATTRIBUTES.items():
        right: dict[str, list[bool]] = defaultdict(list)
        for (person, scene), word in zip(pictures, read[name], strict=True):
            if wide.seen(person, scene)[name]:
                right[getattr(scene, name)].append(word == getattr(scene, name))
        together = np.array([hit for hits in right.values() for hit in hits], float)
        figures[name] = float(together.mean())
        figures[f"{name}_interval"] = interval(together, rng)
        for value in values:
            figures[f"{name}_{value}"] = (
                float(np.mean(right[value])) if right[value] else 1.0
            )  # hidden eyes are not read
    figures["mean"] = float(np.mean([figures[name] for name in wide.SCENE_ATTRIBUTES]))
    return figures


@torch.no_grad()
def psnr(folder: Path, images: list) -> float:
    """Mean PSNR (dB) of drawings given back by the autoencoder in a pipeline's folder."""
    vae, pixels = AutoencoderKL.from_pretrained(folder / "vae"), as_tensor(images)
    again = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(64)])
    return float((-10 * ((again.clamp(-1, 1) - pixels) / 2).square().mean((1, 2, 3)).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=embedded_base(EMBEDDED_WIDE))
    parser.add_argument("--each", type=int, default=12, help="captions for each value")
    parser.add_argument("--seed", type=int, default=0)
    choice = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng([choice.seed, 12])
    pictures = asked(choice.each, rng)
    captions = [wide.caption(scene, rng, omit=0) for _, scene in pictures]
    drawings = [wide.render(*picture) for picture in pictures]
    pipe = Flux2KleinPipeline.from_pretrained(choice.base)
    pipe.set_progress_bar_config(disable=True)
    base = EmbeddedWide("wide", pipe)
    prompts, options = base.encode_prompts(captions), base.sampling.chosen(None, None)
    negative, images, began = base.encode_prompts([""]), [], time.process_time()
    for at in range(0, len(captions), 32):
        seeds = [choice.seed * 100_003 + at + i for i in range(len(captions[at : at + 32]))]
        images += base.draw(prompts[at : at + 32], seeds, negative=negative, **options)
    judge = load_wide_judge()
    likeness = [judge.identity_score([a], [b]).item() for a, b in pairwise(images)]
    figures: dict[str, Any] = {"pictures": len(pictures), "seed": choice.seed, **options}
    figures["cpu_seconds_a_picture"] = (time.process_time() - began) / len(pictures)
    figures |= {f"read_back_{name}": value for name, value in shares(pictures, images, rng).items()}
    figures |= {f"drawings_{name}": value for name, value in shares(pictures, drawings, rng).items()}
    figures["identity_score_between_pictures"] = float(np.mean(likeness))
    figures["autoencoder_psnr_db"] = psnr(choice.base, drawings[:500])
    figures["autoencoder_before_psnr_db"] = psnr(embedded_base(), drawings[:500])
    shown = rng.permutation(len(pictures))[:32]
    sheet([drawings[i] for i in shown[:16]] + [images[i] for i in shown[:16]] + [drawings[i] for i in shown[16:]] + [images[i] for i in shown[16:]], 16, PAGE)  # fmt: skip
    write_result("embedded_wide", figures, "python -m benchmarks.embedded_wide")


if __name__ == "__main__":
    main()
