"""Does the class keep looking as it did? Identity of pictures of the class, and of the subject, with each way to preserve.

    python -m benchmarks.preservation    (3 people x 1 seed x 3 ways; resumable, a file a cell in work/)

The subject is taught as "sks person" by LoRA on the embedded base: without preservation, with class pictures that the base drew
(prior preservation, half a batch more), and held to the base's own answers to the captions of the class.
Then the same scenes are drawn of "a sks person" and of "a person" from the same noise. A class that keeps looking as it did has
the identity that the base's pictures have; drift is what it has more. Intervals: 95 % bootstrap over people (seeds averaged first).
"""

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.personalize import DRAW_STEPS, GUIDANCE, ROOT, interval
from smidgen.adapters.atomic import replace_file

CELLS = ROOT / "work" / "preservation_bench"
PEOPLE, SEEDS, PICTURES, STEPS, BATCH, SCENES, CLASS_IMAGES = 3, 1, 6, 150, 4, 8, 16
WORD, CLASS = "sks", "person"
WAYS = ("none", "class pictures", "class")


class Bench:
    """The embedded base, its judge, and one adapter at a time."""

    def __init__(self) -> None:
        import torch

        from smidgen.bases.embedded.base import EmbeddedJudge
        from smidgen.bases.families import load_base
        from smidgen.tasks.data.images import bind

        torch.set_num_threads(1)
        self.base, self.judge = load_base("embedded"), EmbeddedJudge()
        self.clean = copy.deepcopy(self.base.model)
        self.scenes = self.judge.prompts(SCENES, seed=1)
        self.prompts = {"class": self.scenes, "subject": bind(self.scenes, CLASS, WORD)}

    def cell(self, way: str, person: int, seed: int) -> dict[str, float]:
        """Train one adapter in the ``way`` (the base: none) and score what it draws."""
        import smidgen
        from smidgen.adapters.methods import learning_rates
        from smidgen.bases.families import learning_kind
        from smidgen.training.fitting import fit
        from smidgen.training.loop import LoopConfig

        self.base.pipe.unet = copy.deepcopy(self.clean)
        pictures, task, seconds = self._task(way, person, seed)
        figures: dict[str, float] = {}
        if way != "base":
            setup = smidgen.config("lora", target_modules=list(self.base.targets), seed=seed, r=4)
            loop = LoopConfig(max_train_steps=STEPS, seed=seed, checkpointing_steps=STEPS)
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                rate = learning_rates("lora", learning_kind("embedded"))
                fit("lora", self.base.model, task, setup, rate, loop, Path(folder), progress=False)
            figures["cpu_seconds"] = time.process_time() - started + seconds
        for name, prompts in self.prompts.items():
            scored = self.judge.scores(self._draw(prompts, seed), self.scenes, pictures)
            figures |= {f"{name}_identity": scored["identity"], f"{name}_caption": scored["caption"]}
        return figures

    def _task(self, way: str, person: int, seed: int) -> tuple[list, Any, float]:
        """The pictures of ``person``, the task, and the seconds that its class pictures took."""
        from smidgen.bases.embedded import world
        from smidgen.tasks.data.images import bind, load_picture, read_folder
        from smidgen.tasks.diffusion.scenes import Scenes
        from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples, encode_prior
        from smidgen.training.randomness import derive

        base, size = self.base, self.base.resolution
        identity = world.sample_identity(np.random.default_rng(1000 + person), "test")
        with tempfile.TemporaryDirectory() as folder:
            world.write_subject(folder, identity, PICTURES, seed=person)
            found = read_folder(folder)
            pictures = [load_picture(picture.path, size) for picture in found.pictures]
            subject = encode_examples(base, found.pictures, bind(found.captions, CLASS, WORD), size)
            options: dict[str, Any] = {}
            started = time.process_time()
            if way == "class pictures":
                seeds = tuple(derive(seed, "prior", number) for number in range(CLASS_IMAGES))
                about = tuple(found.captions[number % PICTURES] for number in range(CLASS_IMAGES))
                scenes = Scenes(about, seeds, DRAW_STEPS, GUIDANCE, size)
                prior = encode_prior(base, scenes, Path(folder) / "latents.safetensors", "embedded")
                options = {"prior": prior, "prior_batch_size": BATCH // 2}
            elif way == "class":
                options["preserved"] = base.encode_prompts(found.captions)
            seconds = time.process_time() - started
        return pictures, PersonalizeTask(subject, base, batch_size=BATCH, seed=seed, **options), seconds

    def _draw(self, prompts: list[str], seed: int) -> list:
        from smidgen.training.randomness import derive

        noise = [derive(seed, "bench", number) for number in range(SCENES)]
        options: dict[str, Any] = {
            "negative": self.base.encode_prompts([""]),
            "steps": DRAW_STEPS,
            "guidance": GUIDANCE,
        }
        return self.base.draw(self.base.encode_prompts(prompts), noise, **options)


def main() -> int:
    from benchmarks._harness import write_result

    bench, found = None, {}
    for way in ("base", *WAYS):
        for person in range(PEOPLE):
            for seed in range(SEEDS):
                path = CELLS / f"{way.replace(' ', '_')}-{person}-{seed}.json"
                if not path.exists():
                    bench = bench or Bench()
                    replace_file(path, json.dumps(bench.cell(way, person, seed)))
                for name, value in json.loads(path.read_text()).items():
                    found.setdefault(way, {}).setdefault(name, {}).setdefault(person, []).append(value)
    figures: dict[str, Any] = {"people": PEOPLE, "seeds": SEEDS, "steps": STEPS, "batch": BATCH}
    for way, scores in found.items():
        for name, people in scores.items():
            values, key = (
                np.array([np.mean(people[person]) for person in sorted(people)]),
                f"{way.replace(' ', '_')}_{name}",
            )
            figures[key] = float(values.mean())
            if name != "cpu_seconds":
                figures[f"{key}_interval"] = interval(values)
    write_result("preservation", figures, "python -m benchmarks.preservation")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
