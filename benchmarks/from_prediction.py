"""Does a predicted adapter give `personalize` a head start? Trained from nothing and from the prediction, on the same pictures.

    python -m benchmarks.from_prediction    (8 people x 2 seeds; about 12 processor minutes; resumable, a file a cell in work/)

The generator sees six pictures of a held-out person and predicts LoRA of rank 4. LoRA of rank 4 is then trained on the same six
pictures at ``personalize``'s own rate: from nothing for all steps, from the prediction for a fifth of them and for all. A seed decides
the order of pictures, noise, times, and the fresh adapter's start. Scenes that nobody trained on are drawn from the same noise; the base's own
judge scores them. Intervals: 95 % bootstrap over people of each person's mean over seeds, differences taken person by person.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import between, write_result
from benchmarks._portraits import BATCH, PICTURES, ROOT, STEPS, Portraits, figure, kept, said

PEOPLE, SEEDS, SCENES = 8, 2, 6
FIFTH = STEPS // 5
ARMS = {  # start, steps
    "nothing": ("nothing", STEPS),
    "prediction": ("prediction", 0),
    "prediction_fifth": ("prediction", FIFTH),
    "prediction_all": ("prediction", STEPS),
}
NAMES = {
    "nothing": f"from nothing, {STEPS} steps",
    "prediction": "the prediction, 0 steps",
    "prediction_fifth": f"from the prediction, {FIFTH} steps",
    "prediction_all": f"from the prediction, {STEPS} steps",
}
CELLS, PAGE = ROOT / "work" / "from_prediction_bench", ROOT / "docs" / "difflora_generator.md"
PLOT = ROOT / "docs" / "results" / "from_prediction.png"


class Bench(Portraits):
    def __init__(self) -> None:
        super().__init__()
        from smidgen.difflora.generator.generator import load_generator

        rng = np.random.default_rng(29)
        self.scenes = [self.world.sample_scene(rng) for _ in range(SCENES)]
        self.generator = load_generator()

    def cell(self, arm: str, person: int, seed: int) -> dict[str, float]:
        import copy

        from smidgen.difflora.weightspace.layout import write_adapter
        from smidgen.tasks.data.images import to_tensor
        from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
        from smidgen.training.loop import LoopConfig

        start, steps = ARMS[arm]
        rng = np.random.default_rng([31, person])
        who = self.world.sample_identity(rng, "test")
        own = [self.world.sample_scene(rng) for _ in range(PICTURES)]
        pictures = [self.world.render(who, scene) for scene in own]
        captions = [self.world.caption(scene) for scene in own]
        with tempfile.TemporaryDirectory() as folder:
            predicted = Path(folder) / "predicted"
            if start == "prediction":
                plain = copy.deepcopy(self.clean)
                write_adapter(self.generator.layout, self.generator.predict(pictures)[0], plain, predicted)
            mean, std = self.base.encode_images(to_tensor(pictures), batch=16)
            encoded = Encoded(mean, std, self.base.encode_prompts(captions), tuple(captions))
            task = PersonalizeTask(encoded, self.base, BATCH, seed)
            loop = LoopConfig(max_train_steps=max(1, steps), seed=seed, checkpointing_steps=max(1, steps))
            self._train(task, loop, predicted if start == "prediction" else None, steps, Path(folder) / "out")
        images = self.draw([self.world.caption(scene) for scene in self.scenes], seed)
        return self.scores(images, self.scenes, pictures)

    def _train(self, task: Any, loop: Any, start: Path | None, steps: int, out: Path) -> None:
        import copy

        import smidgen
        from smidgen.adapters.methods import learning_rates
        from smidgen.bases.families import learning_kind
        from smidgen.training.fitting import fit

        self.base.pipe.unet = copy.deepcopy(self.clean)
        if not steps:
            smidgen.load(self.base.model, start)
            return
        setup = smidgen.config("lora", target_modules=list(self.base.targets), seed=loop.seed, r=4)
        rates = learning_rates("lora", learning_kind("embedded"))
        fit("lora", self.base.model, task, setup, rates, loop, out, progress=False, start=start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    asked = parser.parse_args()
    bench, found = Bench(), {}
    for seed in range(asked.seeds):
        for person in range(asked.people):
            for arm in ARMS:
                path = CELLS / f"{arm}-{person}-{seed}.json"
                found[arm, person, seed] = kept(path, lambda a=arm, p=person, s=seed: bench.cell(a, p, s))  # type: ignore[misc]
    figures: dict[str, Any] = {"people": asked.people, "seeds": asked.seeds, "steps": STEPS, "fifth": FIFTH}

    def people(arm: str, name: str) -> np.ndarray:
        return np.array([np.mean([found[arm, p, s][name] for s in range(asked.seeds)]) for p in range(asked.people)])

    for arm in ARMS:
        for name in ("identity", "caption"):
            figures |= figure(f"{arm}_{name}", people(arm, name).tolist())
            if arm != "nothing":
                figures |= figure(f"{arm}_less_nothing_{name}", (people(arm, name) - people("nothing", name)).tolist())
    command = f"python -m benchmarks.from_prediction --people {asked.people} --seeds {asked.seeds}"
    write_result("from_prediction", figures, command)
    lines = ["| | identity | more than from nothing | captions |", "|---|---|---|---|"]
    for arm, name in NAMES.items():
        more = said(figures, f"{arm}_less_nothing_identity") if arm != "nothing" else ""
        lines.append(f"| {name} | {said(figures, f'{arm}_identity')} | {more} | {said(figures, f'{arm}_caption')} |")
    between(PAGE, "from_prediction", "\n".join(lines))
    _plot(figures)


def _plot(figures: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    for arm, (start, steps) in ARMS.items():
        value, (low, high) = figures[f"{arm}_identity"], figures[f"{arm}_identity_interval"]
        color = "C0" if start == "prediction" else "C1"
        axes.errorbar(steps, value, [[value - low], [high - value]], fmt="o", color=color, capsize=4)
    ends = [figures[f"{arm}_identity"] for arm in ARMS if arm != "nothing"]
    axes.plot([0, FIFTH, STEPS], ends, color="C0", label="from the prediction")
    axes.axhline(figures["nothing_identity"], color="C1", ls=":", label=f"from nothing, after {STEPS} steps")
    axes.set(xlabel="steps", ylabel="identity")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    drawn.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    main()
