"""`smidgen plan` against real runs on both embedded bases: peak memory of the process and seconds a step.

    python -m benchmarks.plan            (about 6 minutes on two cores)
    python -m benchmarks.plan --tables   (docs/plan.md's tables of full-size bases, and the presets by memory; about 20 minutes)

Each run is a process of its own, `smidgen personalize`, started right after its plan was made; its peak is ru_maxrss as the kernel
tells it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._harness import between, write_result
from smidgen.tasks.personalize.plan import Plan, make_plan
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
from smidgen.training.loop import LoopConfig

RUNS: tuple[tuple[str, int, bool], ...] = (  # method, batch, gradient checkpointing
    ("lora", 4, False),
    ("svfit", 4, False),
    ("tlora", 16, False),
    ("loldu", 64, False),
    ("lora", 64, True),
)
# Starts a run from a small process and says its peak: a child's ru_maxrss begins at what its parent had.
RUN = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


def steps(batch: int) -> int:
    """Steps of a real run: enough for the first one not to count."""
    return 60 if batch <= 16 else 16


def run(base: str, method: str, batch: int, less: bool, pictures: Path, out: Path) -> tuple[Plan, float, float]:
    """The plan, the real run's peak bytes, and its seconds a step."""
    config = PersonalizeConfig(
        Data(folder=pictures, instance_prompt="a portrait of a person", train_batch_size=batch, resolution=64),
        Adapter(method),
        LoopConfig(max_train_steps=steps(batch), lr_warmup_steps=1),
        Show(compare_lora=False, num_prompts=1, num_seeds=1, inference_steps=2),
        base=base,
        out=out,
        gradient_checkpointing=less,
    )
    plan = make_plan(config)
    from smidgen.training.settings import dump_yaml

    settings = out.with_suffix(".yaml")
    settings.write_text(dump_yaml(replace(config, overwrite=True)))
    words = [sys.executable, "-c", RUN, sys.executable, "-m", "smidgen", "personalize", "--config", str(settings)]
    told = subprocess.run(words, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{' '.join(words[3:])} ended with {told.returncode}: {told.stderr[-2000:]}")
    entries = json.loads((out / "report.json").read_text())["entries"]
    return (
        plan,
        float(told.stdout.split()[-1]) * 1024,
        next(e["seconds"] for e in entries if e["seconds"]) / steps(batch),
    )


def main() -> None:
    """Run, write ``results/plan.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--only", choices=("unet", "flow"))
    asked = parser.parse_args()
    if asked.tables:
        from benchmarks._plan_tables import write

        return write(between)
    figures: dict[str, Any] = {}
    off: dict[str, list[float]] = {"memory": [], "above_start": [], "seconds": []}
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        folder = Path(scratch)
        pictures = folder / "pictures"
        subprocess.run([sys.executable, "-m", "smidgen", "subject", str(pictures), "--seed", "7"], check=True)
        for label, base in (("unet", "embedded"), ("flow", "embedded-flow")):
            if asked.only not in (None, label):
                continue
            for method, batch, less in RUNS:
                key = f"{label}.{method}.batch{batch}{'.checkpointing' if less else ''}"
                plan, peak, seconds = run(base, method, batch, less, pictures, folder / key)
                start, planned = plan.process or 0.0, plan.seconds or 0.0
                figures |= {f"{key}.planned_MB": plan.peak / 1e6, f"{key}.measured_MB": peak / 1e6}
                figures |= {f"{key}.process_MB": start / 1e6, f"{key}.planned_s": planned, f"{key}.measured_s": seconds}
                off["memory"].append(plan.peak / peak - 1)
                off["seconds"].append(planned / seconds - 1)
                if peak > 1.5 * start:
                    off["above_start"].append((plan.peak - start) / (peak - start) - 1)
                print(f"{key}: {plan.peak / 1e6:.0f} of {peak / 1e6:.0f} MB ({start / 1e6:.0f} before any model), "
                      f"{planned:.3f} of {seconds:.3f} s", flush=True)  # fmt: skip
    for name, found in off.items():
        if found:
            figures |= {f"{name}.worst": max(found, key=abs), f"{name}.median": statistics.median(map(abs, found))}
    figures = {name: round(value, 4) for name, value in figures.items()}
    name = f"plan_{asked.only}" if asked.only else "plan"
    print(write_result(name, figures, "python -m benchmarks.plan" + (f" --only {asked.only}" if asked.only else "")))


if __name__ == "__main__":
    main()
