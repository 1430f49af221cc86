"""How far each method's adapter makes the embedded base follow edges, parts and landmarks, and at what size.

    python -m benchmarks.control --stage tune   (learning rates: the same small grid for every method, another seed)
    python -m benchmarks.control                (controls x seeds x methods; resumable, a file a cell in work/)

Every method trains with the same hint encoder, pictures, noise, timesteps and steps, and draws the same held-out
controls from the same noise. Ranks keep the paper's ratios of trained numbers to LoRA r=4 (SD 1.5: OFT 1.88, TLoRA*
1.18, TLoRA .50). Intervals: 95 % bootstrap over seeds and pictures.
"""

import argparse
import base64
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.adapters.atomic import new_file, replace_file

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "work" / "control_bench"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONTROLS = ("segmentation", "canny", "landmarks")
SEEDS, TUNING_SEED = 3, 100
PICTURES, HELD_OUT, BATCH = 1500, 64, 8
STEPS = {"segmentation": 250, "canny": 250, "landmarks": 250}
TUNING_STEPS, HINT_RATE = 100, 5e-3
DRAW_STEPS, GUIDANCE = 10, 2.0
COLUMNS = 8  # pictures on the contact sheet

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r4": ("lora", {"r": 4}),
    "OFT b32": ("oft", {"block_size": 32}),
    "TLoRA*(2,3)": ("tlora*(2,3)", {}),
    "TLoRA(2,2)": ("tlora(2,2)", {}),
    "SVFit full": ("svfit", {"r": "full"}),
    "LoLDU full": ("loldu", {"r": "full"}),
    "hint alone": ("linear_probe", {}),
}
PUBLISHED = {"LoRA r4": 1.0, "OFT b32": 1.88, "TLoRA*(2,3)": 1.18, "TLoRA(2,2)": 0.5}  # numbers relative to LoRA r=4
GRIDS: dict[str, tuple[float, ...]] = {  # two rates a method, a factor of 3 apart, around where each one learns
    "LoRA r4": (1e-2, 3e-3),
    "OFT b32": (1e-2, 3e-3),
    "TLoRA*(2,3)": (1e-2, 3e-3),
    "TLoRA(2,2)": (3e-2, 1e-2),
    "SVFit full": (2e-1, 6e-2),
    "LoLDU full": (2e-1, 6e-2),
}
SCORES = {"segmentation": ("miou", "aacc"), "canny": ("iou", "f1", "f1_1px"), "landmarks": ("landmarks",)}
MAIN = {"segmentation": "miou", "canny": "f1", "landmarks": "landmarks"}  # what rates are chosen by, and what is read
Cell = tuple[str, str, float, int]  # control, method, rate, seed


class Bench:
    """One process's base and pictures; everything encoded once and kept in work/."""

    def __init__(self) -> None:
        import torch

        from smidgen.bases.families import load_base

        torch.set_num_threads(1)
        self.base = load_base("embedded")
        self.clean = copy.deepcopy(self.base.model)
        self.nothing = self.base.encode_prompts([""])
        self.stored = _encoded(self.base)

    def cell(self, control: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train one adapter and draw the held-out controls with it; ``base`` draws without control. For the search of
        rates nothing is drawn: ``validation`` is the loss on other people's pictures."""
        started = time.process_time()
        figures: dict[str, Any] = {}
        self.base.pipe.unet = copy.deepcopy(self.clean)
        if method not in ("real", "base"):
            figures = self._train(control, method, rate, seed, steps)
        if seed == TUNING_SEED:
            return figures | {"validation": self._validate(control), "cpu_seconds": time.process_time() - started}
        if method == "real":
            images = self._real()
        else:
            images = self._draw(seed, None if method == "base" else self.stored["test"][control])
        return figures | {"cpu_seconds": time.process_time() - started, "pictures": packed(images)}

    def _train(self, control: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        from smidgen.tasks.control import hint
        from smidgen.training.fitting import Rates, fit
        from smidgen.training.loop import LoopConfig

        task = self._task("train", control, BATCH, seed)
        hint.attach(self.base.model, hint.config_for(self.base, control), seed)
        loop = LoopConfig(max_train_steps=steps, lr_warmup_steps=20, seed=seed, checkpointing_steps=steps)
        rates = Rates(rate, rate if method.startswith("OFT") else 0.3 * rate, HINT_RATE)
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"heads": (hint.NAME,), "progress": False}
            run = fit(method, self.base.model, task, setup(method, seed), rates, loop, Path(folder), **options)
        numbers = 0 if method == "hint alone" else run.trained_numbers
        figures = {"numbers": numbers, "hint_numbers": run.head_numbers, "bytes": run.bytes, "seconds": run.seconds}
        return figures | {"loss": float(np.mean(run.losses[-50:]))}

    def _task(self, part: str, control: str, batch: int, seed: int) -> Any:
        from smidgen.bases.protocol import Prompts
        from smidgen.tasks.control.task import ControlTask
        from smidgen.tasks.diffusion.task import Encoded

        kept = self.stored[part]
        names = tuple(str(number) for number in range(len(kept["mean"])))
        encoded = Encoded(kept["mean"], kept["std"], Prompts({"embeds": kept["embeds"]}), names)
        return ControlTask(encoded, self.base, controls=kept[control], batch_size=batch, seed=seed)

    def _validate(self, control: str) -> float:
        """The loss on the tuning pictures, with the same noise and timesteps for every method."""
        import torch

        task = self._task("tune", control, HELD_OUT, TUNING_SEED + 1)
        self.base.model.eval()
        with torch.no_grad():
            return float(np.mean([float(task.loss(self.base.model, task.batch(index))) for index in range(6)]))

    def _draw(self, seed: int, controls: Any) -> list:
        from smidgen.bases.protocol import Prompts
        from smidgen.tasks.control.sampling import draw_controlled
        from smidgen.training.randomness import derive

        self.base.model.eval()
        prompts = Prompts({"embeds": self.stored["test"]["embeds"]})
        seeds = [derive(seed, "bench", number) for number in range(HELD_OUT)]
        options: dict[str, Any] = {"negative": self.nothing, "steps": DRAW_STEPS, "guidance": GUIDANCE, "batch": 16}
        if controls is None:
            return self.base.draw(prompts, seeds, **options)
        return draw_controlled(self.base, prompts, seeds, controls, **options)

    def _real(self) -> list:
        """The real pictures as the base's autoencoder gives them back: what no adapter can be expected to beat."""

        return self.base.decode(self.stored["test"]["mean"])


def setup(method: str, seed: int) -> Any:
    """What ``engine`` adapts by."""
    import smidgen
    from smidgen.training.engine import LinearProbe

    name, options = METHODS[method]
    return (
        LinearProbe() if name == "linear_probe" else smidgen.config(name, target_modules=TARGETS, seed=seed, **options)
    )


def _encoded(base: Any) -> dict[str, dict[str, Any]]:
    """Split -> tensors: latents' ``mean`` and ``std``, ``embeds``, ``points`` and each control's pictures."""
    from safetensors.torch import load_file, save_file

    path = CELLS / f"pictures-{PICTURES}-{HELD_OUT}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {}
        for number, (part, count) in enumerate({"train": PICTURES, "tune": HELD_OUT, "test": HELD_OUT}.items()):
            found |= {f"{part}.{name}": tensor for name, tensor in _drawn(base, part, count, number).items()}
        with new_file(path) as beside:
            save_file(found, beside)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(path).items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    return parts


def _drawn(base: Any, part: str, count: int, number: int) -> dict[str, Any]:
    import torch

    from smidgen.bases.embedded import pose, world
    from smidgen.tasks.control.pairs import as_controls, control_of
    from smidgen.tasks.data.images import to_tensor

    rng = np.random.default_rng([number, 500])
    portraits = [pose.sample_portrait(rng, "train" if part == "train" else "test") for _ in range(count)]
    mean, std = base.encode_images(to_tensor([portrait.picture() for portrait in portraits]), 16)
    found = {"mean": mean, "std": std}
    found["embeds"] = base.encode_prompts([world.caption(portrait.scene) for portrait in portraits]).tensors["embeds"]
    found["points"] = torch.from_numpy(np.stack([portrait.landmarks() for portrait in portraits]))
    for control in CONTROLS:
        found[control] = as_controls([control_of(portrait, control) for portrait in portraits])
    found["pixels"] = as_controls([portrait.picture() for portrait in portraits[:COLUMNS]])
    return found


def packed(images: list) -> str:
    """A strip of pictures as PNG in base64: a cell's file keeps what was drawn, so that it can be scored again."""
    from PIL import Image

    strip = Image.new("RGB", (64 * len(images), 64))
    for number, image in enumerate(images):
        strip.paste(image, (64 * number, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(text: str) -> list:
    """The pictures of a strip."""
    from PIL import Image

    strip = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    return [strip.crop((left, 0, left + 64, 64)) for left in range(0, strip.width, 64)]


@cache
def stored() -> dict[str, dict[str, Any]]:
    """The encoded pictures, made before."""
    return _encoded(None)


def scored(cell: Cell) -> dict[str, Any]:
    """A finished cell with its scores over all pictures, and ``each``: those of every picture alone."""
    from smidgen.tasks.control.sampling import scores

    found = json.loads(path_of("run", cell).read_text())
    control, images = cell[0], unpacked(found["pictures"])
    asked = stored()["test"]["points" if control == "landmarks" else control].numpy()
    if control == "canny":
        asked = asked[:, 0] > 127
    elif control == "segmentation":
        from smidgen.bases.embedded.pose import labels_of

        asked = np.stack([labels_of(picture.transpose(1, 2, 0)) for picture in asked])
    each = [scores(control, [image], asked[number : number + 1]) for number, image in enumerate(images)]
    found |= scores(control, images, asked)
    return found | {"each": {name: [one[name] for one in each] for name in SCORES[control]}}


def plan(stage: str) -> list[Cell]:
    """All cells of a stage as (control, method, rate, seed): the first control whole, then the others seed by seed."""
    if stage == "tune":
        return [
            ("segmentation", m, rate, TUNING_SEED)
            for place in range(2)
            for m, grid in GRIDS.items()
            for rate in grid[place : place + 1]
        ]
    rates = chosen_rates()
    order = [("segmentation", seed) for seed in range(SEEDS)]
    order += [(control, seed) for seed in range(SEEDS) for control in CONTROLS[1:]]
    return [(c, m, rates.get(m, 0.0), seed) for c, seed in order for m in ("real", "base", *METHODS)]


def path_of(stage: str, cell: Cell) -> Path:
    control, method, rate, seed = cell
    return CELLS / stage / f"{control}-{method.replace(' ', '_').replace('*', 'star')}-{rate:g}-{seed}.json"


def work(stage: str, worker: int, workers: int) -> None:
    """Do this worker's share of the cells that are not done."""
    bench = None
    for cell in plan(stage)[worker::workers]:
        path = path_of(stage, cell)
        if path.exists():
            continue
        bench = bench or Bench()
        figures = bench.cell(*cell, steps=TUNING_STEPS if stage == "tune" else STEPS[cell[0]])
        replace_file(path, json.dumps(figures))
        names = ("validation",) if stage == "tune" else SCORES[cell[0]]
        found = figures if stage == "tune" else scored(cell)
        said = ", ".join(f"{name} {found[name]:.4f}" for name in names)
        print(f"{cell}: {said} ({figures['cpu_seconds']:.0f} s)", flush=True)


def run_workers(stage: str, workers: int) -> None:
    """One process a core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.control", "--stage", stage, "--workers", str(workers)]
    running = [subprocess.Popen([*command, "--worker", str(n)], env=environment, cwd=ROOT) for n in range(workers)]
    if any(status != 0 for status in [process.wait() for process in running]):
        raise SystemExit("a worker failed; run the same command again to go on")


@cache
def chosen_rates() -> dict[str, float]:
    """For each method the rate of its grid with the lowest loss on the tuning pictures."""
    found: dict[str, dict[float, float]] = {}
    for cell in plan("tune"):
        path = path_of("tune", cell)
        if not path.exists():
            raise SystemExit("choose the learning rates first: python -m benchmarks.control --stage tune")
        found.setdefault(cell[1], {})[cell[2]] = json.loads(path.read_text())["validation"]
    return {method: min(losses, key=lambda rate: losses[rate]) for method, losses in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("tune", "run", "report"), default="run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.stage, options.worker, options.workers)
        return 0
    if options.stage == "run" and not all(path_of("tune", cell).exists() for cell in plan("tune")):
        run_workers("tune", options.workers)
    if options.stage != "report":
        run_workers(options.stage, options.workers)
    if options.stage != "tune":
        from benchmarks._control_report import report

        report("python -m benchmarks.control")
    return 0


if __name__ == "__main__":
    sys.exit(main())
