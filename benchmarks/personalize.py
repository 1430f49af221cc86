"""Identity and caption scores of each method on held-out people, by bytes, beside two of peft's own methods.

    python -m benchmarks.personalize --stage tune   (learning rates: the same small grid for every method, other people)
    python -m benchmarks.personalize                (8 people x 3 seeds x methods; resumable, a file a cell in work/)
    python -m benchmarks.personalize --rates package   (no tuning: the package's own learning rates)
    python -m benchmarks.personalize --stage report    (of the people and seeds that all methods have done so far)
    python -m benchmarks.personalize_flow           (the same on the embedded flow base)

Every method sees the same pictures, noise, timesteps and number of steps, and draws the same scenes from the same
noise.
Intervals: 95 % bootstrap over people (seeds averaged first).
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.adapters.atomic import replace_file
from smidgen.tasks.png import write_figure

ROOT = Path(__file__).parents[1]
RESULTS = {"embedded": "personalize", "embedded-flow": "personalize_flow"}  # base -> name of its results
PICTURES, STEPS, BATCH = 6, 150, 4
SCENES, DRAW_STEPS, GUIDANCE = 8, 12, 3.0
SUBJECTS, SEEDS, TUNING = 8, 3, 2  # people in the run, seeds each, other people the rates are chosen on

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tlora": ("tlora", {}),
    "svfit": ("svfit", {"r": "full"}),
    "loldu": ("loldu", {"r": "full"}),
    "lora": ("lora", {"r": 4}),
    "lora r1": ("lora", {"r": 1}),
    "peft LoRA": ("peft.LoraConfig", {"r": 4, "lora_alpha": 4}),
    "peft OFT": ("peft.OFTConfig", {"oft_block_size": 16, "r": 0}),
    "seeded": ("seeded", {"r": 192}),
    "ia3": ("ia3", {}),
}
GRIDS: dict[str, tuple[float, ...]] = {  # three rates a method, a factor of 2 to 3 apart, around where each one learns
    "tlora": (1e-2, 3e-2, 1e-1),
    "svfit": (1e-1, 2e-1, 5e-1),
    "loldu": (1e-1, 2e-1, 5e-1),
    "lora": (3e-3, 1e-2, 3e-2),
    "lora r1": (3e-3, 1e-2, 3e-2),
    "peft LoRA": (3e-3, 1e-2, 3e-2),
    "peft OFT": (3e-3, 1e-2, 3e-2),
    "seeded": (3e-2, 1e-1, 3e-1),
    "ia3": (1e-2, 3e-2, 1e-1),
}
RATES = ("tuned", "package")
SCORES = ("identity", "caption", "traits")


class Bench:
    """One process's base, judge and pictures."""

    def __init__(self, base: str) -> None:
        import torch

        from smidgen.bases.embedded.base import EmbeddedJudge
        from smidgen.bases.families import load_base

        torch.set_num_threads(1)
        self.base = load_base(base)
        self.judge = EmbeddedJudge()
        self.scenes = self.judge.prompts(SCENES, seed=1)
        self.prompts, self.nothing = self.base.encode_prompts(self.scenes), self.base.encode_prompts([""])
        self.clean = copy.deepcopy(self.base.model)

    def cell(self, method: str, rate: float, person: int, seed: int) -> dict[str, float]:
        """Train one adapter and score it; ``base`` draws without any."""
        from smidgen.tasks.diffusion.task import PersonalizeTask
        from smidgen.training.fitting import Rates, fit
        from smidgen.training.loop import LoopConfig

        subject, encoded = self._person(person)
        setattr(self.base.pipe, self.base.component, copy.deepcopy(self.clean))
        figures: dict[str, float] = {}
        if method != "base":
            task = PersonalizeTask(encoded, self.base, batch_size=BATCH, seed=seed)
            setup = config_of(method, seed, list(self.base.targets))
            loop = LoopConfig(max_train_steps=STEPS, seed=seed, checkpointing_steps=STEPS)
            with tempfile.TemporaryDirectory() as folder:
                rates = Rates(rate, 0.3 * rate)
                run = fit(method, self.base.model, task, setup, rates, loop, Path(folder), progress=False)
            figures = {"numbers": run.trained_numbers, "bytes": run.bytes, "seconds": run.seconds}
            figures |= self._score(subject, seed)
            figures["int4_bytes"] = self._in_codes()
            return figures | {f"int4_{name}": value for name, value in self._score(subject, seed).items()}
        return figures | self._score(subject, seed)

    def _in_codes(self) -> int:
        """Round what was trained to what the package's int4 file holds, for every method by the same code; the numbers' bytes."""
        from smidgen.adapters.checkpoint import packing

        live: dict[str, dict[str, Any]] = {}
        for name, parameter in self.base.model.named_parameters():
            if parameter.requires_grad:
                layer, _, kind = name.replace(".default", "").rpartition(".lora_" if ".lora_" in name else ".")
                live.setdefault(layer, {})[f"residual_{kind.replace('.', '_')}"] = parameter
        coded = packing.encode(packing.pack(live), "int4")
        back = packing.decode(coded, "int4", "here")
        for name, values in back.items():
            at = 0
            for layer in sorted(live):
                if name in live[layer]:
                    own = live[layer][name]
                    own.data.copy_(values[at : at + own.numel()].view_as(own))
                    at += own.numel()
        return sum(value.numel() for value in coded.values())

    def _person(self, person: int):
        from smidgen.bases.embedded import world
        from smidgen.tasks.data.images import load_picture, read_folder
        from smidgen.tasks.diffusion.task import encode_examples

        identity = world.sample_identity(np.random.default_rng(1000 + person), "test")
        with tempfile.TemporaryDirectory() as folder:
            world.write_subject(folder, identity, PICTURES, seed=person)
            found = read_folder(folder)
            subject = [load_picture(picture.path, self.base.resolution) for picture in found.pictures]
            return subject, encode_examples(self.base, found.pictures, found.captions, self.base.resolution)

    def _score(self, subject: list, seed: int) -> dict[str, float]:

        from smidgen.training.randomness import derive

        noise = [derive(seed, "bench", number) for number in range(SCENES)]
        options: dict[str, Any] = {"negative": self.nothing, "steps": DRAW_STEPS, "guidance": GUIDANCE}
        images = self.base.draw(self.prompts, noise, **options)
        return self.judge.scores(images, self.scenes, subject)


def config_of(method: str, seed: int, targets: list[str]) -> Any:
    """The config of one of ``METHODS``."""
    import peft

    import smidgen

    name, options = METHODS[method]
    if name.startswith("peft."):
        return getattr(peft, name.removeprefix("peft."))(target_modules=targets, **options)
    return smidgen.config(name, target_modules=targets, seed=seed, **options)


def methods_on(base: str) -> list[str]:
    """Those that are run: peft's LoRA ends where ours does on the UNet, and is left out elsewhere."""
    return [method for method in METHODS if base == "embedded" or method != "peft LoRA"]


def plan(base: str, stage: str, rates: str = "tuned") -> list[tuple[str, float, int, int]]:
    """All cells of a stage as (method, rate, person, seed), seeds outermost, then people: early results cover all methods."""
    methods = methods_on(base)
    if stage == "tune":
        people = range(100, 100 + TUNING)
        return [(m, rate, person, 0) for person in people for m in methods for rate in GRIDS[m]]
    found = chosen_rates(base, rates)
    pairs = [(person, seed) for seed in range(SEEDS) for person in range(SUBJECTS)]
    return [(m, found.get(m, 0.0), person, seed) for person, seed in pairs for m in ("base", *methods)]


def path_of(base: str, stage: str, cell: tuple[str, float, int, int]) -> Path:
    method, rate, person, seed = cell
    return (
        ROOT / "work" / f"{RESULTS[base]}_bench" / stage / f"{method.replace(' ', '_')}-{rate:g}-{person}-{seed}.json"
    )


def work(base: str, stage: str, rates: str, worker: int, workers: int) -> None:
    """Do this worker's share of the cells that are not done."""
    mine = plan(base, stage, rates)[worker::workers]
    bench = None
    for cell in mine:
        path = path_of(base, stage, cell)
        if path.exists():
            continue
        bench = bench or Bench(base)
        started = time.process_time()
        figures = bench.cell(*cell) | {"cpu_seconds": time.process_time() - started}
        replace_file(path, json.dumps(figures))
        print(f"{cell}: identity {figures['identity']:.3f} captions {figures['caption']:.3f}", flush=True)


def run_workers(base: str, stage: str, rates: str, workers: int) -> None:
    """One process a core."""
    if workers == 1:
        return work(base, stage, rates, 0, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"--base": base, "--stage": stage, "--rates": rates, "--workers": str(workers)}
    command = [sys.executable, "-m", "benchmarks.personalize", *(word for pair in options.items() for word in pair)]
    running = [
        subprocess.Popen([*command, "--worker", str(number)], env=environment, cwd=ROOT) for number in range(workers)
    ]
    if any(status != 0 for status in [process.wait() for process in running]):
        raise SystemExit("a worker failed; run the same command again to go on")


def chosen_rates(base: str, rates: str = "tuned") -> dict[str, float]:
    """For each method the rate of its grid with the best mean of identity and caption score on the tuning people, or the one that
    the package trains it with."""
    if rates == "package":
        from smidgen.adapters.methods import learning_rates
        from smidgen.bases.families import learning_kind

        ours = {m: METHODS[m][0].removeprefix("peft.").removesuffix("Config").lower() for m in methods_on(base)}
        return {method: learning_rates(name, learning_kind(base)).residual for method, name in ours.items()}
    scores: dict[tuple[str, float], list[float]] = {}
    for cell in plan(base, "tune"):
        path = path_of(base, "tune", cell)
        if not path.exists():
            raise SystemExit(
                f"choose the learning rates first: python -m benchmarks.personalize --base {base} --stage tune"
            )
        found = json.loads(path.read_text())
        scores.setdefault(cell[:2], []).append((found["identity"] + found["caption"]) / 2)
    return {m: max(GRIDS[m], key=lambda rate: np.mean(scores[m, rate])) for m in methods_on(base)}


def finished(base: str, rates: str) -> list[tuple[int, int]]:
    """(person, seed) of which every method is done; a report may be made before the last one is."""
    missing = {cell[2:] for cell in plan(base, "run", rates) if not path_of(base, "run", cell).exists()}
    return [(person, seed) for seed in range(SEEDS) for person in range(SUBJECTS) if (person, seed) not in missing]


def table(base: str, rates: str) -> dict[str, dict[str, np.ndarray]]:
    """method -> figure -> [person], averaged over each person's finished seeds."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    done = finished(base, rates)
    for method, rate, person, seed in plan(base, "run", rates):
        if (person, seed) in done:
            figures = json.loads(path_of(base, "run", (method, rate, person, seed)).read_text())
            for name, value in figures.items():
                found.setdefault(method, {}).setdefault(name, {}).setdefault(person, []).append(value)
    return {
        method: {name: np.array([np.mean(people[p]) for p in sorted(people)]) for name, people in figures.items()}
        for method, figures in found.items()
    }


def interval(values: np.ndarray, draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the mean over people."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return [float(q) for q in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


def report(base: str, chosen: str) -> None:
    """Results, page and plot of a base."""
    from benchmarks._harness import write_result

    done = finished(base, chosen)
    if not done:
        raise SystemExit("no person is done with every method yet; run the same command again to go on")
    found, rates, name = table(base, chosen), chosen_rates(base, chosen), RESULTS[base]
    figures: dict[str, Any] = {
        "people": len({person for person, _ in done}),
        "runs": len(done),
        "steps": STEPS,
        "batch": BATCH,
    }
    for method, values in found.items():
        key = method.replace(" ", "_").lower()
        for score in (name for name in (*SCORES, *(f"int4_{score}" for score in SCORES)) if name in values):
            figures[f"{key}_{score}"] = float(values[score].mean())
            figures[f"{key}_{score}_interval"] = interval(values[score])
        if method in rates:
            sizes = (name for name in ("numbers", "bytes", "int4_bytes", "cpu_seconds") if name in values)
            figures |= {f"{key}_{name}": float(values[name].mean()) for name in sizes}
            figures[f"{key}_learning_rate"] = rates[method]
    write_result(name, figures, f"python -m benchmarks.{name}" + ("" if chosen == "tuned" else f" --rates {chosen}"))
    folder = ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(_page(base, figures, list(found), chosen))
    _plot(figures, list(rates), folder / f"{name}.png")


def _page(base: str, figures: dict[str, Any], methods: list[str], chosen: str) -> str:
    from smidgen.tasks import cards

    def score(key: str, name: str) -> str:
        low, high = figures[f"{key}_{name}_interval"]
        return f"{figures[f'{key}_{name}']:.3f} [{low:.3f}, {high:.3f}]"

    rows = []
    for method in methods:
        key = method.replace(" ", "_").lower()
        scores = [score(key, name) for name in ("identity", "traits", "caption")]
        sizes = [
            f"{figures[f'{key}_{name}']:,.0f}" if f"{key}_{name}" in figures else "0" for name in ("numbers", "bytes")
        ]
        rate = f"{figures[f'{key}_learning_rate']:g}" if f"{key}_learning_rate" in figures else "-"
        rows.append([method, *sizes, *scores, rate])
    head = ["method", "trained numbers", "bytes on disk", "identity", "traits", "captions", "learning rate"]
    tuned = f"rates were chosen from three values each on {TUNING} other people"
    rates = tuned if chosen == "tuned" else "rates are the package's own for its embedded bases, not tuned on this one"
    return f"""# Personalisation on the base `{base}`, by method and bytes

{figures["people"]} people the base has never seen, {figures["runs"]} runs of each method (people x seeds); {PICTURES} pictures a person, {STEPS} steps of {BATCH}.
Every method saw the same pictures, noise and steps; {rates}.
Scores by the embedded base's judge (identity: 1 is the same person in another scene, 0 a stranger; traits: share of
hair, hair colour, skin and facial hair read right; captions: share of scene attributes read right). Brackets: 95 %
bootstrap intervals over people. `make bench NAME={RESULTS[base]}` redoes it.

{cards.table(head, rows)}

{_reading(figures, "peft_lora" if "peft LoRA" in methods else "lora")}

{_at_equal_bytes(figures, methods)}{_beside(base, figures, methods)}![identity and captions by bytes]({RESULTS[base]}.png)
"""


def _reading(figures: dict[str, Any], other: str) -> str:
    """The table against LoRA in sentences."""
    lines, name = [], other.replace("_", " ").replace("peft lora", "peft's LoRA").replace("lora", "LoRA")
    for key in ("svfit", "loldu", "tlora"):
        share = figures[f"{key}_bytes"] / figures[f"{other}_bytes"]
        behind = figures[f"{other}_identity"] - figures[f"{key}_identity"]
        verdict = f"{behind:.2f} less identity than" if behind > 0 else f"{-behind:.2f} more identity than"
        drift = figures[f"{key}_caption"] - figures[f"{other}_caption"]
        lines.append(f"- {key}: {verdict} {name} with {share:.0%} of its bytes; captions {drift:+.3f}.")
    return (
        "\n".join(lines)
        + "\n\nBytes count both files; the config with its base lock is about 1 kB of each (bytes were counted again after the config became smaller)."
    )


def _at_equal_bytes(figures: dict[str, Any], methods: list[str]) -> str:
    """Every method in two number formats, by the bytes of its numbers, where that was measured."""
    from smidgen.tasks import cards

    rows: list[tuple[float, list[str]]] = []
    for method in methods:
        key = method.replace(" ", "_").lower()
        if f"{key}_int4_bytes" not in figures:
            continue
        for label, code, size in (
            ("fp16", "", 2 * figures[f"{key}_numbers"]),
            ("int4", "int4_", figures[f"{key}_int4_bytes"]),
        ):
            low, high = figures[f"{key}_{code}identity_interval"]
            told = f"{figures[f'{key}_{code}identity']:.3f} [{low:.3f}, {high:.3f}]"
            rows.append((size, [f"{size / 1000:.1f}", method, label, told, f"{figures[f'{key}_{code}caption']:.3f}"]))
    if not rows:
        return ""
    head = ["kB of numbers", "method", "format", "identity", "captions"]
    return f"""By bytes, every method in the same two formats (int4: four bits and a scale for each 64 numbers, rounded after training; in fp16 the
scores are those of the numbers as trained). Numbers alone are counted: a config of about 1 kB comes with each.

{cards.table(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])])}

"""


def _beside(base: str, figures: dict[str, Any], methods: list[str]) -> str:
    """What the same methods reached on the UNet base, where its results are."""
    from benchmarks._harness import RESULTS as folder
    from smidgen.tasks import cards

    path = folder / f"{RESULTS['embedded']}.json"
    if base == "embedded" or not path.exists():
        return ""
    other, rows = json.loads(path.read_text())["figures"], []
    for method in methods:
        key = method.replace(" ", "_").lower()
        cells = [
            f"{own[f'{key}_{name}']:.2f}" if f"{key}_{name}" in own else "-"
            for name in ("identity", "caption", "cpu_seconds")
            for own in (figures, other)
        ]
        rows.append([method, *cells])
    head = [
        "method",
        *(f"{what}, {on}" for what in ("identity", "captions", "processor seconds") for on in ("flow", "UNet")),
    ]
    return f"""Beside the UNet base ({other["people"]} people, its own tuned rates, `make bench NAME=personalize`):

{cards.table(head, rows)}

"""


def _plot(figures: dict[str, Any], methods: list[str], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("identity", "caption"), strict=True):
        low, high = figures[f"base_{score}_interval"]
        axes.axhspan(low, high, color="0.9")
        axes.axhline(figures[f"base_{score}"], color="0.6", linestyle="--", label="base")
        for method in methods:
            key = method.replace(" ", "_").lower()
            mean, (low, high) = figures[f"{key}_{score}"], figures[f"{key}_{score}_interval"]
            marker = "s" if method.startswith("peft") else "o"
            axes.errorbar(
                figures[f"{key}_bytes"], mean, [[mean - low], [high - mean]], fmt=marker, capsize=3, label=method
            )
        axes.set(xscale="log", xlabel="kilobytes on disk", ylabel=score)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1000:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=RESULTS, default="embedded")
    parser.add_argument("--stage", choices=("tune", "run", "report"), default="run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rates", choices=RATES, default="tuned")
    options = parser.parse_args(arguments)
    base, stage, rates = options.base, options.stage, options.rates
    if options.worker is not None:
        work(base, stage, rates, options.worker, options.workers)
        return 0
    tuned = rates == "package" or all(path_of(base, "tune", cell).exists() for cell in plan(base, "tune"))
    if stage == "run" and not tuned:
        run_workers(base, "tune", rates, options.workers)
    if stage != "report":
        run_workers(base, stage, rates, options.workers)
    if stage != "tune":
        report(base, rates)
    print(chosen_rates(base, rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
