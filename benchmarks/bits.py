"""What rounding costs: each method trained once, its file written with 32, 16, 8 and 4 bits a number, and each file scored.

    python -m benchmarks.bits     (about 15 processor minutes; resumable, a folder a method in work/bits)

`tweets` with MiniLM by the recipe as it ships, bf16, 200 steps, the last checkpoint; heads are float16 beside codes, as in any such file.
Each file is loaded into a fresh base and read on the 2,000 test texts. Losses are of the score with 32 bits, paired by text: mean and
95 % interval over texts (1.96 standard errors). They say what rounding did to this one training, not how methods compare.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import between, write_result
from smidgen.adapters.atomic import new_file, replace_file
from smidgen.adapters.checkpoint import packing
from smidgen.tasks.finetune.course import targets
from smidgen.tasks.finetune.settings import Adapter, rates, setup
from smidgen.tasks.text_classification import recipe
from smidgen.tasks.text_classification.settings import TextData
from smidgen.training import engine
from smidgen.training.fitting import budgeted, fit

ROOT = Path(__file__).parents[1]
WORK, PAGE = ROOT / "work" / "bits", ROOT / "docs" / "budget.md"
WIDE, SHORT = "float32", "int4"
BUDGET = "5kB"
STEPS = 200
METHODS = {
    "lora r8": Adapter("lora", rank=8),
    "svfit": Adapter("svfit"),
    "loldu": Adapter("loldu"),
    f"seeded, {BUDGET}": Adapter("seeded", budget=BUDGET),
    "ia3": Adapter("ia3"),
    "dora": Adapter("dora"),
    "tlora": Adapter("tlora"),
}


class Course:
    """One task and base for all methods."""

    def __init__(self, steps: int) -> None:
        preset = recipe.PRESETS["default"]
        train = replace(preset.train, max_train_steps=steps, eval_steps=0, load_best=False, mixed_precision="bf16")
        self.config = replace(preset, data=TextData("tweets", max_length=64), train=train)
        self.prepared = recipe.prepare(self.config)

    def train(self, adapter: Adapter, folder: Path) -> None:
        """Trains one adapter and saves it with 32 bits a number."""
        prepared, config = self.prepared, replace(self.config, adapter=adapter)
        model, heads = prepared.fresh(), prepared.heads
        if adapter.budget:  # as many numbers as the budget holds in 4 bits
            options = {"seed": config.train.seed, "target_modules": "all-linear", "store_dtype": SHORT}
            made = budgeted(model, prepared.task, heads, adapter.budget, **options)
        else:
            made = setup(adapter, targets(config, model), config.train.seed)
        made.store_dtype = WIDE
        own = rates(adapter, prepared.family)
        fit(adapter.method, model, prepared.task, made, own, config.train, folder, heads=heads, progress=False)

    def rewrite(self, wide: Path, folder: Path, dtype: str) -> None:
        """The same adapter's file in another number format."""
        model = self.prepared.fresh()
        engine.load(model, wide)
        own = model.peft_config[engine.NAME]
        own.store_dtype = dtype
        engine.save(model, own, folder, self.prepared.heads)

    def logits(self, folder: Path) -> Tensor:
        """What the adapter of a folder says of the test texts [text, class]."""
        model = self.prepared.fresh()
        engine.load(model, folder)
        return self.prepared.task.predict(model, "test")  # type: ignore[no-any-return]


def each(course: Course, name: str, work: Path) -> None:
    """Trains a method, if it was not, and reads the test texts with each of its files."""
    folder = work / name.replace(", ", "-").replace(" ", "-")
    wide = folder / WIDE
    if not (wide / "adapter_config.json").is_file():
        course.train(METHODS[name], wide)
    for dtype in packing.STORED:
        if dtype != WIDE and not (folder / dtype / "adapter_config.json").is_file():
            course.rewrite(wide, folder / dtype, dtype)
        if not (folder / f"{dtype}.pt").is_file():
            with new_file(folder / f"{dtype}.pt") as beside:
                torch.save(course.logits(folder / dtype), beside)
    labels = course.prepared.task.splits["test"].labels
    replace_file(folder / "figures.json", json.dumps(figures(folder, labels)))
    print(name, (folder / "figures.json").read_text(), flush=True)


def figures(folder: Path, labels: Tensor) -> dict[str, Any]:
    """Scores of each file of a method, what its folder takes without the head, and its losses against 32 bits."""
    read = {dtype: torch.load(folder / f"{dtype}.pt").double() for dtype in packing.STORED}
    right = {dtype: (logits.argmax(1) == labels).double() for dtype, logits in read.items()}
    nats = {
        dtype: torch.nn.functional.cross_entropy(logits, labels, reduction="none") for dtype, logits in read.items()
    }
    own = json.loads((folder / WIDE / "adapter_config.json").read_text())
    found: dict[str, Any] = {"numbers": int(stored_numbers(folder / WIDE)), "r": own.get("r")}
    for dtype in packing.STORED:
        found[f"{dtype}_score"] = float(right[dtype].mean())
        found[f"{dtype}_log_loss"] = float(nats[dtype].mean())
        found[f"{dtype}_bytes"] = folder_bytes(folder / dtype)
        found[f"{dtype}_changed"] = float((read[dtype].argmax(1) != read[WIDE].argmax(1)).double().mean())
        found[f"{dtype}_loss"], found[f"{dtype}_loss_interval"] = paired(right[WIDE] - right[dtype])
        found[f"{dtype}_nats"], found[f"{dtype}_nats_interval"] = paired(nats[dtype] - nats[WIDE])
    return found


def paired(differences: Tensor) -> tuple[float, list[float]]:
    mean, half = float(differences.mean()), 1.96 * float(differences.std()) / len(differences) ** 0.5
    return mean, [mean - half, mean + half]


def stored_numbers(folder: Path) -> int:
    """Packed numbers of a file with 32 bits a number."""
    from safetensors.torch import load_file

    return sum(
        t.numel() for key, t in load_file(folder / "adapter_model.safetensors").items() if packing.is_packed(key)
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of an adapter's folder, the heads' tensors not counted."""
    from safetensors.torch import load_file

    heads = [t for key, t in load_file(folder / "adapter_model.safetensors").items() if not packing.is_packed(key)]
    return sum((folder / file).stat().st_size for file in engine.FILES) - sum(t.numel() * t.itemsize for t in heads)


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| method | numbers | bytes 32 bits → 4 bits | score 32 bits | 16 | 8 | 4 | loss at 4 bits, 95 % interval | answers changed | log loss at 4 bits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        low, high = own["int4_loss_interval"]
        scores = " | ".join(f"{own[f'{dtype}_score']:.4f}" for dtype in packing.STORED)
        lines.append(
            f"| {name} | {own['numbers']:,} | {own['float32_bytes']:,} → {own['int4_bytes']:,} | {scores} | {own['int4_loss']:+.4f} ({low:+.4f} to "
            f"{high:+.4f}) | {own['int4_changed']:.1%} | {own['int4_nats']:+.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    course = Course(args.steps)
    for name in args.only:
        each(course, name, args.work)
    if args.steps == STEPS:
        write(args.work)


def write(work: Path) -> None:
    """Writes the result and the table of the methods that are measured so far."""
    folders = {name: work / name.replace(", ", "-").replace(" ", "-") / "figures.json" for name in METHODS}
    found = {name: json.loads(path.read_text()) for name, path in folders.items() if path.is_file()}
    flat = {f"{name}_{key}": value for name, own in found.items() for key, value in own.items() if value is not None}
    write_result(
        "bits", {key.replace(", ", "_").replace(" ", "_"): value for key, value in flat.items()}, "make bench NAME=bits"
    )
    between(PAGE, "bits", table(found))


if __name__ == "__main__":
    main()
