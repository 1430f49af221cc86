"""Generators of several adapter families, trained end to end for equally many steps, in one audit.

    python -m benchmarks.generator_families --zoo work/zoo --steps 600

Each family sees the same people, photos, pictures, timesteps and noise. ``--only`` names some of them; what was trained
before is taken up again. The paper's two stages on the same zoo, and the end-to-end stage begun from them, are among the
rows. Writes ``work/families/evaluation`` and the figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks._harness import write_result
from smidgen.difflora.audit.evaluate import evaluate
from smidgen.difflora.audit.settings import EvaluateConfig
from smidgen.difflora.generator.fit import fit
from smidgen.difflora.generator.generator import JSON
from smidgen.difflora.generator.settings import PRESETS, GeneratorConfig
from smidgen.training.recipes.personalize_settings import Adapter


def families(zoo: Path, steps: int) -> dict[str, GeneratorConfig]:
    """Name -> config."""
    start = PRESETS["default"]
    stage = start.end_to_end
    assert stage is not None
    loop = replace(stage.train, max_train_steps=steps, ema_decay=0.99, checkpointing_steps=100)
    start = replace(start, end_to_end=replace(stage, train=loop))

    def family(method: str, rank: int | None = None, **changes: object) -> GeneratorConfig:
        return replace(start, adapter=Adapter(method=method, rank=rank), **changes)  # type: ignore[arg-type]

    staged = replace(start.two_stage, zoo=zoo)
    return {
        "lora-r1": family("lora", 1),
        "lora-r2": family("lora", 2),
        "lora-r4": family("lora", 4),
        "lora-r4-shared-a": family("lora", 4, shared="learned"),
        "lora-r4-random-a": family("lora", 4, shared="random"),
        "svfit": family("svfit"),
        "loldu": family("loldu"),
        "two-stage-pca": family("lora", 1, two_stage=staged, end_to_end=None),
        "two-stage-then-end-to-end": family("lora", 1, two_stage=staged),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", type=Path, default=Path("work/zoo"))
    parser.add_argument("--work", type=Path, default=Path("work/families"))
    parser.add_argument("--people", type=Path, help="a folder of people from another generator's training, to share")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--no-audit", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float | list[float]] = {"steps": given.steps, "held_out": given.held_out}
    there = []
    for name, config in families(given.zoo, given.steps).items():
        out = given.work / name
        if not given.only or name in given.only:
            out.mkdir(parents=True, exist_ok=True)
            shared = given.people or given.work / "people"
            shared.mkdir(parents=True, exist_ok=True)
            if not (out / "people").exists():
                os.symlink(shared.resolve(), out / "people")
            before = time.process_time()
            fit(replace(config, out=out))
            print(f"{name}: {time.process_time() - before:.0f} processor seconds", flush=True)
        if (out / JSON).exists():
            there.append(out)
    if given.no_audit:
        return
    report = evaluate(given.zoo, EvaluateConfig(tuple(there), given.held_out, seeds=1, out=given.work / "evaluation"))
    print(report)
    for name, lines in report.lines.items():
        scores = torch.tensor([line.identity for line in lines])
        figures[f"{name} identity"] = round(float(scores.mean()), 4)
        figures[f"{name} numbers"] = lines[0].numbers
    write_result("generator_families", figures, "python -m benchmarks.generator_families " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
