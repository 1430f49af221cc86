"""What benches of training on the embedded base share: the base, its judge, one adapter at a time, and figures a person."""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded.base import GUIDANCE

ROOT = Path(__file__).parents[1]
STEPS, BATCH, PICTURES, DRAW_STEPS = 150, 4, 6, 12


class Portraits:
    """The embedded base and one adapter at a time, on one thread."""

    def __init__(self) -> None:
        import torch

        from smidgen.bases.embedded import world
        from smidgen.bases.embedded.base import EmbeddedJudge
        from smidgen.bases.families import load_base

        torch.set_num_threads(1)
        self.base, self.judge, self.world = load_base("embedded"), EmbeddedJudge(), world
        self.clean = copy.deepcopy(self.base.model)

    def learn(self, task: Any, seed: int) -> None:
        """A fresh model, and LoRA (r 4, its own learning rate) trained on ``task`` (None: no adapter)."""
        import smidgen
        from smidgen.adapters.methods import learning_rates
        from smidgen.bases.families import learning_kind
        from smidgen.training.fitting import fit
        from smidgen.training.loop import LoopConfig

        self.base.pipe.unet = copy.deepcopy(self.clean)
        if task is None:
            return
        setup = smidgen.config("lora", target_modules=list(self.base.targets), seed=seed, r=4)
        loop = LoopConfig(max_train_steps=STEPS, seed=seed, checkpointing_steps=STEPS)
        rates = learning_rates("lora", learning_kind("embedded"))
        with tempfile.TemporaryDirectory() as folder:
            fit("lora", self.base.model, task, setup, rates, loop, Path(folder), progress=False)

    def draw(self, captions: Sequence[str], seed: int) -> list[Image.Image]:
        """One picture of each caption; the same noise for the same seed and number of the caption."""
        from smidgen.training.randomness import derive

        noise = [derive(seed, "bench", number) for number in range(len(captions))]
        nothing = self.base.encode_prompts([""])
        prompts = self.base.encode_prompts(captions)
        return self.base.draw(prompts, noise, negative=nothing, steps=DRAW_STEPS, guidance=GUIDANCE)

    def scores(self, images: Sequence[Image.Image], scenes: Sequence[Any], people: Sequence[Image.Image]) -> dict:
        """The judge's, of ``images`` drawn for ``scenes``, against pictures of the person."""
        captions = [self.world.caption(scene) for scene in scenes]
        self.judge._scenes |= dict(zip(captions, scenes, strict=True))
        return self.judge.scores(images, captions, people)


def kept(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures at ``path``; made and written first if they are not there."""
    if not path.exists():
        replace_file(path, json.dumps(make()))
        print(path.stem, {name: round(value, 3) for name, value in json.loads(path.read_text()).items()}, flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def keep_strip(path: Path, images: Sequence[Image.Image]) -> None:
    """Write pictures of one size beside each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1)).save(path)


def unstrip(path: Path) -> list[Image.Image]:
    """The square pictures of a strip."""
    whole = Image.open(path).convert("RGB")
    side = whole.height
    return [whole.crop((left, 0, left + side, side)) for left in range(0, whole.width, side)]


def interval(values: Sequence[float], draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the mean over people."""
    found = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(found), size=(draws, len(found)))
    return [round(float(q), 4) for q in np.quantile(found[picks].mean(axis=1), (0.025, 0.975))]


def figure(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The mean over people and its interval, as results have them."""
    return {name: round(float(np.mean(values)), 4), f"{name}_interval": interval(values)}


def said(figures: Mapping[str, Any], name: str) -> str:
    """A figure and its interval as pages have them."""
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.2f} [{low:.2f}, {high:.2f}]"
