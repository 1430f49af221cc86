"""What a mask is for: people photographed on one odd background, learnt with and without masks, drawn in new scenes.

    python -m benchmarks.masks            (4 people x 2 seeds x 3 ways to learn; about 15 processor minutes)

Every person's pictures are drawn on magenta and green stripes, which no caption names. An adapter learns them whole, with the
person's mask, or (the best there can be) without the stripes at all. Then new scenes are drawn, whose captions ask for
other backgrounds: identity and captions are scored by the embedded base's judge, and ``stripes`` is the share of the drawing's
background that is nearer to the stripes' two colours than to what was asked for. Intervals: 95 % bootstrap over people.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from benchmarks._harness import write_result

PEOPLE, SEEDS, PICTURES, STEPS, BATCH = 4, 2, 6, 150, 4
SCENES, DRAW_STEPS, GUIDANCE = 8, 12, 3.0
METHOD, RATE = "lora", 1e-2
WAYS = ("base", "whole", "masked", "without stripes")
STRIPES = ((200, 30, 200), (60, 220, 60))


def cut_out(image: Image.Image) -> np.ndarray:
    """Where the person is [64, 64], true or false: what is not joined to the upper corners by the colour of the background."""
    filled = image.convert("RGB").copy()
    for corner in ((0, 0), (filled.width - 1, 0)):
        ImageDraw.floodfill(filled, corner, (1, 2, 3), thresh=40)
    return (np.asarray(filled) != np.array((1, 2, 3))).any(-1)


def striped(image: Image.Image, person: np.ndarray) -> Image.Image:
    """``image`` with stripes, 8 pixels wide, where the person is not."""
    rows = np.indices(person.shape)[0] // 8 % 2
    return Image.fromarray(np.where(person[..., None], np.asarray(image), np.array(STRIPES, np.uint8)[rows]))


def stripes(image: Image.Image, person: np.ndarray, asked: tuple[int, ...]) -> float:
    """Share of the pixels around the ``person`` of a true drawing that are nearer to a colour of the stripes than to ``asked``."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)[~person]
    away = [np.linalg.norm(pixels - np.array(color, float), axis=-1) for color in (asked, *STRIPES)]
    return float((np.minimum(away[1], away[2]) < away[0]).mean())


class Bench:
    """The base, its judge, and scenes that nobody was taught."""

    def __init__(self) -> None:
        import torch

        from smidgen.bases.embedded import world
        from smidgen.bases.embedded.base import EmbeddedJudge
        from smidgen.bases.families import load_base

        torch.set_num_threads(1)
        self.base, self.judge = load_base("embedded"), EmbeddedJudge()
        self.asked = self.judge.prompts(SCENES, seed=1)
        self.scenes = [self.judge._scenes[prompt] for prompt in self.asked]
        self.prompts, self.nothing = self.base.encode_prompts(self.asked), self.base.encode_prompts([""])
        self.clean = copy.deepcopy(self.base.model)
        self.world = world

    def cells(self, person: int, seed: int) -> dict[str, dict[str, float]]:
        """Way to learn -> its scores."""
        identity = self.world.sample_identity(np.random.default_rng(5000 + person), "test")
        true = [self.world.render(identity, scene) for scene in self.scenes]
        with tempfile.TemporaryDirectory() as folder:
            plain, odd = Path(folder, "plain"), Path(folder, "odd")
            for where in (plain, odd):
                self.world.write_subject(where, identity, PICTURES, seed=person)
            (odd / "masks").mkdir()
            for path in sorted(odd.glob("*.png")):
                image = Image.open(path).convert("RGB")
                person_at = cut_out(image)
                striped(image, person_at).save(path)
                Image.fromarray(person_at).convert("L").save(odd / "masks" / path.name)
            found = {
                way: self._score(self._drawn(way, plain if way == "without stripes" else odd, seed), true)
                for way in WAYS
            }
        return found

    def _drawn(self, way: str, folder: Path, seed: int) -> list[Image.Image]:
        import smidgen
        from smidgen.tasks.data.images import read_folder
        from smidgen.tasks.data.masks import Masks
        from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples
        from smidgen.training.fitting import Rates, fit
        from smidgen.training.loop import LoopConfig
        from smidgen.training.randomness import derive

        self.base.pipe.unet = copy.deepcopy(self.clean)
        if way != "base":
            found = read_folder(folder, masks=Masks(way == "masked"))
            captions = [self._unplaced(caption) for caption in found.captions]
            encoded = encode_examples(self.base, found.pictures, captions, self.base.resolution)
            task = PersonalizeTask(encoded, self.base, batch_size=BATCH, seed=seed)
            setup = smidgen.config(METHOD, target_modules=["to_q", "to_k", "to_v", "to_out.0"], r=4, seed=seed)
            loop = LoopConfig(max_train_steps=STEPS, seed=seed, checkpointing_steps=STEPS)
            with tempfile.TemporaryDirectory() as out:
                fit(METHOD, self.base.model, task, setup, Rates(RATE, RATE), loop, Path(out), progress=False)
        noise = [derive(seed, "masks", number) for number in range(SCENES)]
        options: dict[str, Any] = {"negative": self.nothing, "steps": DRAW_STEPS, "guidance": GUIDANCE}
        return self.base.draw(self.prompts, noise, **options)

    def _unplaced(self, caption: str) -> str:
        """A caption that says nothing of the background."""
        return ", ".join(part for part in caption.split(", ") if "background" not in part)

    def _score(self, images: list[Image.Image], true: list[Image.Image]) -> dict[str, float]:
        scores = self.judge.scores(images, self.asked, true)
        asked = [ImageColor.getrgb(self.world.BACKGROUND[scene.background]) for scene in self.scenes]
        shares = [stripes(*three) for three in zip(images, map(cut_out, true), asked, strict=True)]
        return {name: scores[name] for name in ("identity", "caption", "background")} | {
            "stripes": float(np.mean(shares))
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    bench = Bench()
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for person in range(options.people):
        own: dict[tuple[str, str], list[float]] = {}
        for seed in range(options.seeds):
            for way, scores in bench.cells(person, seed).items():
                print(person, seed, way, {name: round(score, 3) for name, score in scores.items()}, flush=True)
                for name, score in scores.items():
                    own.setdefault((way, name), []).append(score)
        for key, values in own.items():
            rows.setdefault(key, []).append(values)
    figures: dict[str, Any] = {"people": options.people, "seeds": options.seeds}
    rng = np.random.default_rng(0)
    for (way, name), values in rows.items():
        means = np.array(values).mean(1)
        drawn = means[rng.integers(0, len(means), (2000, len(means)))].mean(1)
        key = f"{way.replace(' ', '_')}_{name}"
        figures[key] = round(float(means.mean()), 4)
        figures[f"{key}_interval"] = [round(float(q), 4) for q in np.quantile(drawn, (0.025, 0.975))]
    print(
        write_result("masks", figures, f"python -m benchmarks.masks --people {options.people} --seeds {options.seeds}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
