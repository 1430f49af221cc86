"""Does a tensor-ring transform of rank 2 use its rank? The triangular start against the paper's.

    python -m benchmarks.ring_init     (all cells, then the figures; resumable, a file a cell in work/)

Layer: W is the query weight of MiniLM's fourth layer, T is fitted to W* by Adam on |W T - W*|^2. W* is W(I + one Kronecker
product), W(I + four), or the same weight after fine-tuning on tweets. Task: TLoRA(R_T, 2) on tweets.
The bond rank is that of T rearranged between core 0 and the others, [i_0 j_0, i_rest j_rest]: a Kronecker product has 1, a
ring of rank R at most R^2. Counted are singular values above 1e-3 of the largest.
On the layer each start has the better of two learning rates; on the task all have the recipe's own.
Intervals: 95 % bootstrap over test tweets, seeds averaged.
"""

import argparse
import functools
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smidgen.adapters.atomic import new_file, replace_file
from smidgen.adapters.transforms.tensor_ring import TensorRingTransform
from smidgen.tasks.png import write_figure

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "work" / "ring_init_bench"
ARMS = {"rank 1": (1, "triangular"), "paper": (2, "paper"), "triangular": (2, "triangular")}  # ring rank, start
LAYER = "bert.encoder.layer.3.attention.self.query"
TARGETS = {"one product": 1, "four products": 4, "fine-tuned": 0}  # Kronecker products added to the identity
STRENGTH = 0.3  # |W* - W| / |W| of the first two
LAYER_RATES, LAYER_STEPS, LAYER_SEEDS, EVERY = (3e-3, 1e-2), 400, 3, 10
TASK_STEPS, TASK_SEEDS, LENGTH, BATCH, TESTED = 60, 3, 32, 16, 1000
RESIDUAL_RATE, TRANSFORM_RATE, HEAD_RATE = 2e-2, 6e-3, 2e-3  # the recipe's own for tlora
ABOVE = 1e-3


def bond_values(dense: Tensor, modes: tuple[int, ...]) -> Tensor:
    """Singular values of T [I, I] rearranged between core 0 and the others, largest first."""
    first, rest = modes[0], dense.shape[0] // modes[0]
    cut = dense.double().reshape(first, rest, first, rest).transpose(1, 2).reshape(first**2, rest**2)
    return torch.linalg.svdvals(cut)


def bond_ranks(values: Tensor) -> dict[str, float]:
    """Values above 1e-3 of the largest; the effective rank, exp of the entropy of their shares; second over first."""
    share = values / values.sum()
    return {
        "counted": int((values > ABOVE * values[0]).sum()),
        "effective": float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum())),
        "second": float(values[1] / values[0]),
    }


def spread(tensors: dict[str, Tensor]) -> float:
    """Largest difference between two slices of a core, over the core's largest number: 0 is a Kronecker product."""
    cores = [tensor for tensor in tensors.values() if tensor.abs().max() > 0]
    return max((float((core - core[:1, :1]).abs().max() / core.abs().max()) for core in cores), default=0.0)


# The layer


def layer_target(name: str, weight: Tensor, modes: tuple[int, ...], seed: int) -> Tensor:
    """W* [out, in]."""
    if name == "fine-tuned":
        return fine_tuned()
    generator = torch.Generator().manual_seed(1000 + seed)
    change = torch.zeros(weight.shape[1], weight.shape[1])
    for _ in range(TARGETS[name]):
        factors = [torch.randn(n, n, generator=generator) for n in modes]
        product = factors[0]
        for factor in factors[1:]:
            product = torch.kron(product, factor)
        change += product
    moved = weight @ change
    return weight + STRENGTH * weight.norm() / moved.norm() * moved


def fit_layer(target: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Relative error |W T - W*|^2 / |W - W*|^2 and bond ranks over the steps."""
    weight = base_weight()
    rank, init = ARMS[arm]
    member = TensorRingTransform(weight.shape[1], rank, init)
    start = member.constants(f"ring_init/{seed}")
    cores = {name: torch.zeros(shape, requires_grad=True) for name, shape in member.shapes().items()}
    change = layer_target(target, weight, member.modes, seed) - weight
    scale = change.square().sum()
    optimizer = torch.optim.Adam(cores.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LAYER_STEPS)
    found: dict[str, Any] = {"steps": [], "errors": [], "counted": [], "effective": []}
    for step in range(LAYER_STEPS + 1):
        excess = member.excess({**start, **cores})
        loss = (weight @ excess - change).square().sum() / scale
        if step % EVERY == 0:
            ranks = bond_ranks(bond_values(torch.eye(len(excess)) + excess.detach(), member.modes))
            for key, value in {"steps": step, "errors": loss.item(), **ranks}.items():
                found.setdefault(key, []).append(value)
        if step < LAYER_STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    numbers = sum(core.numel() for core in cores.values())
    return found | {
        "error": found["errors"][-1],
        "spread": spread({k: v.detach() for k, v in cores.items()}),
        "numbers": numbers,
    }


def base_weight() -> Tensor:
    from smidgen.bases.packaged import model_folder

    return load_file(model_folder("minilm") / "model.safetensors")[LAYER.removeprefix("bert.") + ".weight"].float()


def fine_tuned() -> Tensor:
    """The same weight after fine-tuning all of MiniLM on tweets as the task does; kept beside the cells."""
    path = CELLS / "fine_tuned.safetensors"
    if not path.exists():
        from smidgen.training.engine import FullFineTuning
        from smidgen.training.fitting import Rates, fit

        prepared, loop = task_of(TASK_SEEDS)  # a seed of its own
        rates = Rates(1e-4, 1e-4, HEAD_RATE)
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"heads": prepared.heads, "progress": False}
            model = prepared.fresh()
            fit("full", model, prepared.task, FullFineTuning(), rates, loop, Path(folder), **options)
        weight = model.get_submodule(LAYER).weight.detach().clone()
        with new_file(path) as beside:
            save_file({"weight": weight}, beside)
    return load_file(path)["weight"]


# The task


@functools.cache
def task_of(seed: int) -> tuple[Any, Any]:
    """Tweets as ``smidgen train text-classification`` prepares them, and the loop's settings."""
    from smidgen.tasks.text_classification.recipe import prepare
    from smidgen.tasks.text_classification.settings import TextClassificationConfig, TextData
    from smidgen.tasks.text_classification.task import Encoded
    from smidgen.training.loop import LoopConfig

    loop = LoopConfig(max_train_steps=TASK_STEPS, lr_warmup_steps=5, checkpointing_steps=TASK_STEPS, seed=seed)
    data = TextData("tweets", max_length=LENGTH, train_batch_size=BATCH)
    prepared = prepare(TextClassificationConfig(data=data, train=loop, model="minilm"))
    test = prepared.task.splits["test"]
    some = Encoded(test.rows[:TESTED], test.labels[:TESTED], test.names[:TESTED])
    prepared.task.splits = {**prepared.task.splits, "test": some}
    return prepared, loop


def fit_task(arm: str, seed: int) -> dict[str, Any]:
    """Accuracies, which test tweets were right, and the transforms' bond ranks over the adapted layers."""
    import smidgen
    from smidgen.training.fitting import Rates, fit

    prepared, loop = task_of(seed)
    model = prepared.fresh()
    rank, init = ARMS[arm]
    wanted = {"target_modules": sorted(smidgen.default_targets(model)), "init": init, "seed": seed}
    config = smidgen.config(f"tlora({rank},2)", **wanted)
    rates = Rates(RESIDUAL_RATE, TRANSFORM_RATE, HEAD_RATE)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"heads": prepared.heads, "progress": False}
        run = fit(arm, model, prepared.task, config, rates, loop, Path(folder), **options)
    found: dict[str, Any] = {"numbers": run.trained_numbers, "loss": float(np.mean(run.losses[-20:]))}
    right = prepared.task.predict(model, "test").argmax(1) == prepared.task.splits["test"].labels
    found |= {"test": float(right.float().mean()), "right": right.int().tolist()}
    return found | trained_bonds(model)


def trained_bonds(model: Any) -> dict[str, float]:
    """Bond ranks and spread of the transforms, means over the adapted layers."""
    rows = []
    for layer in model.modules():
        if "default" not in getattr(layer, "smidgen_slots", {}):
            continue
        slot = layer.smidgen_slots["default"]
        tensors = {name: tensor.detach() for name, tensor in (*slot.named_parameters(), *slot.named_buffers())}
        own = {name.removeprefix("transform_"): t for name, t in tensors.items() if name.startswith("transform_")}
        excess = slot.transform.excess(own)
        values = bond_values(torch.eye(len(excess)) + excess, slot.transform.modes)
        moved = {name: tensor for name, tensor in own.items() if name.startswith("e")}
        rows.append({**bond_ranks(values), "spread": spread(moved), "moved": float(excess.norm() / len(excess) ** 0.5)})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


# Cells


def path_of(kind: str, *what: Any) -> Path:
    return CELLS / f"{kind}-{'-'.join(str(part).replace(' ', '_') for part in what)}.json"


def cell(kind: str, *what: Any) -> dict[str, Any]:
    """The figures of one cell, computed now unless they lie in the work folder."""
    path = path_of(kind, *what)
    if not path.exists():
        started = time.process_time()
        found = {"layer": fit_layer, "task": fit_task}[kind](*what)
        found["cpu_seconds"] = time.process_time() - started
        replace_file(path, json.dumps(found))
        told = {key: round(value, 4) for key, value in found.items() if isinstance(value, float | int)}
        print(kind, *what, told, flush=True)
    return json.loads(path.read_text())


def layer_plan(target: str) -> list[tuple[Any, ...]]:
    return [("layer", target, *one) for one in itertools.product(ARMS, LAYER_RATES, range(LAYER_SEEDS))]


def layer_cells(target: str, arm: str) -> tuple[float, list[dict[str, Any]]]:
    """The best rate of the grid by the mean final error, and its cells, one a seed."""
    by_rate = {rate: [cell("layer", target, arm, rate, seed) for seed in range(LAYER_SEEDS)] for rate in LAYER_RATES}
    best = min(by_rate, key=lambda rate: np.mean([found["error"] for found in by_rate[rate]]))
    return best, by_rate[best]


def interval(values: np.ndarray, draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the mean."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return [float(q) for q in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


# The report


def main() -> int:
    from benchmarks._harness import write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--finished", action="store_true", help="train nothing: report the targets and seeds that are done"
    )
    finished = parser.parse_args().finished
    torch.set_num_threads(1)
    CELLS.mkdir(parents=True, exist_ok=True)
    targets = [
        target for target in TARGETS if not finished or all(path_of(*one).exists() for one in layer_plan(target))
    ]
    seeds = [n for n in range(TASK_SEEDS) if not finished or all(path_of("task", arm, n).exists() for arm in ARMS)]
    layers = {target: {arm: layer_cells(target, arm) for arm in ARMS} for target in targets}
    tasks = {arm: [cell("task", arm, seed) for seed in seeds] for arm in ARMS if seeds}
    figures = layer_figures(layers) | (task_figures(tasks) if tasks else {})
    spent = [json.loads(path.read_text())["cpu_seconds"] for path in CELLS.glob("*.json")]
    write_result(
        "ring_init",
        figures | {"cpu_minutes": sum(spent) / 60},
        f"python -m benchmarks.ring_init{' --finished' * finished}",
    )
    plot(layers, tasks, figures, ROOT / "docs" / "results" / "ring_init.png")
    return 0


def layer_figures(layers: dict[str, dict[str, tuple[float, list[dict[str, Any]]]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"layer_seeds": LAYER_SEEDS, "layer_steps": LAYER_STEPS}
    for target, arms in layers.items():
        for arm, (rate, cells) in arms.items():
            key = named("layer", target, arm)
            figures[f"{key}_learning_rate"], figures[f"{key}_numbers"] = rate, cells[0]["numbers"]
            for name in ("error", "spread"):
                figures[f"{key}_{name}"] = float(np.mean([found[name] for found in cells]))
            for name in ("counted", "effective", "second"):
                figures[f"{key}_{name}"] = float(np.mean([found[name][-1] for found in cells]))
    return figures


def task_figures(tasks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"task_seeds": len(tasks["paper"]), "task_steps": TASK_STEPS, "task_batch": BATCH}
    right = {arm: np.mean([found["right"] for found in cells], axis=0) for arm, cells in tasks.items()}
    for arm, cells in tasks.items():
        key = named("task", arm)
        figures[f"{key}_numbers"] = cells[0]["numbers"]
        for name in ("test", "loss", "counted", "effective", "second", "spread", "moved"):
            figures[f"{key}_{name}"] = float(np.mean([found[name] for found in cells]))
        figures[f"{key}_test_interval"] = interval(right[arm])
    for other in ("paper", "rank 1"):
        key = f"{named('task', 'triangular', 'minus', other)}_test"
        figures[key] = float((right["triangular"] - right[other]).mean())
        figures[f"{key}_interval"] = interval(right["triangular"] - right[other])
    return figures | {"task_tested": TESTED}


def named(*parts: str) -> str:
    return "_".join(parts).replace(" ", "_").replace("-", "_")


def plot(layers: dict, tasks: dict, figures: dict[str, Any], path: Path) -> None:
    """Error and bond rank of the layer over the steps, accuracy of the task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * (len(layers) + bool(tasks)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(layers) + bool(tasks), squeeze=False)
    looks = {"rank 1": ("0.5", "-"), "paper": ("tab:orange", "--"), "triangular": ("tab:blue", "-")}
    for column, (target, arms) in enumerate(layers.items()):
        for arm, (rate, cells) in arms.items():
            color, line = looks[arm]
            label = f"{'R_T = 1' if arm == 'rank 1' else f'R_T = 2, {arm}'} (lr {rate:g})"
            for row, name in enumerate(("errors", "effective")):
                curves = np.array([found[name] for found in cells])
                axes[row, column].plot(cells[0]["steps"], curves.mean(0), color=color, linestyle=line, label=label)
                axes[row, column].fill_between(cells[0]["steps"], curves.min(0), curves.max(0), color=color, alpha=0.2)
        axes[0, column].set(title=f"query weight, W*: {target}", ylabel="|WT - W*|² / |W - W*|²", ylim=(0, 1.05))
        axes[1, column].set(xlabel="Adam steps", ylabel="effective bond rank of T")
        axes[0, column].legend(frameon=False, fontsize=7)
    if tasks:
        plot_task(tasks, figures, axes[:, -1], looks)
    for one in axes.flat:
        one.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path)


def plot_task(tasks: dict, figures: dict[str, Any], axes: Any, looks: dict) -> None:
    names = list(tasks)
    for at, arm in enumerate(names):
        key = named("task", arm)
        low, high = figures[f"{key}_test_interval"]
        mean = figures[f"{key}_test"]
        axes[0].errorbar(at, mean, [[mean - low], [high - mean]], fmt="o", capsize=4, color=looks[arm][0])
        ranks = [found["effective"] for found in tasks[arm]]
        axes[1].plot([at] * len(ranks), ranks, "o", color=looks[arm][0])
    axes[0].set(title="tweets, TLoRA(R_T, 2)", ylabel="test accuracy, 95 % interval")
    axes[1].set(ylabel="effective bond rank, mean of layers")
    for row in (0, 1):
        ticks = ["R_T = 1" if arm == "rank 1" else f"R_T = 2\n{arm}" for arm in names]
        axes[row].set_xticks(range(len(names)), ticks)
        axes[row].set_xlim(-0.5, len(names) - 0.5)


if __name__ == "__main__":
    raise SystemExit(main())
