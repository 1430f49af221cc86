"""docs/plan.md's tables of full-size bases, and ``smidgen/tasks/personalize/memory.json``: presets by memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from smidgen.adapters.atomic import replace_file
from smidgen.bases.shapes import full_size
from smidgen.tasks.cards import table
from smidgen.tasks.personalize import plan_text
from smidgen.tasks.personalize.plan import fitting, make_plan
from smidgen.tasks.personalize.presets import FILE, SIZES
from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig
from smidgen.training.loop import LoopConfig

HEAD = ["base", "denoiser", "text encoders", "trained", "blocks", "peak of the run, GB", "+ checkpointing", "+ fp8", "+ nf4",
        "training alone, GB", "+ checkpointing", "+ fp8", "+ nf4",
        "TFLOP a step", "s a step: H100 / A100 / 4090"]  # fmt: skip
ORDER = list(
    dict.fromkeys(
        ["sdxl", "flux2-klein-4b", "flux2-klein-9b", "flux2-dev", "z-image", "qwen-image", *full_size()["bases"]]
    )
)
WORK = Path(__file__).parents[1] / "work" / "plan_tables"
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"


def usual(base: str) -> PersonalizeConfig:
    """One image a step in bf16, LoRA of rank 16 on the base's default layers."""
    return PersonalizeConfig(
        Data(train_batch_size=1), Adapter("lora", rank=16), LoopConfig(mixed_precision="bf16"), base=base
    )


def write(between: Callable[[Path, str, str], None]) -> None:
    """Count all, and write; what an earlier call has counted stays counted."""
    rows: dict[str, list[str]] = {}
    presets: dict[str, dict[str, dict[str, object] | None]] = {}
    for base in ORDER:
        kept = WORK / f"{base}.json"
        if kept.exists():
            rows[base], presets[base] = json.loads(kept.read_text())
        else:
            rows[base], presets[base] = _row(base), {}
            for size in SIZES:
                found = fitting(usual(base), size * 1e9)
                presets[base][str(size)] = None if found is None else plan_text.facts(found)
            replace_file(kept, json.dumps([rows[base], presets[base]]))
        print(base, rows[base], flush=True)
        replace_file(FILE, json.dumps(presets, indent=1) + "\n")
        between(PAGE, "full size", table(HEAD, list(rows.values())))
        cells = [[base, *map(_cell, found.values())] for base, found in presets.items()]
        between(PAGE, "presets", table(["base", *(f"{size} GB" for size in SIZES)], cells))


def _row(base: str) -> list[str]:
    plain = usual(base)
    plan = make_plan(plain, measured=False)
    less = make_plan(replace(plain, gradient_checkpointing=True), measured=False)
    tight = [make_plan(replace(less.config, quantize=kind), measured=False) for kind in ("fp8", "nf4")]
    stacks = sum(s.touched for s in plan.covered.stacks), sum(s.blocks for s in plan.covered.stacks)
    return [
        plan.shapes.title, f"{plan.parameters / 1e9:.2f} B", f"{sum(plan.shapes.texts.values()) / 1e9:.2f} B",
        f"{plan.trained / 1e6:.1f} M", f"{stacks[0]} of {stacks[1]}",
        *(f"{p.peak / 1e9:.1f}" for p in (plan, less, *tight)),
        *(f"{sum(p.training.values()) / 1e9:.1f}" for p in (plan, less, *tight)),
        f"{less.step.forward / 1e12:.1f} + {less.step.training / 1e12:.1f}",
        " / ".join(f"{s:.2g}" for s in less.counted_seconds().values()),
    ]  # fmt: skip


def _cell(found: dict[str, object] | None) -> str:
    if found is None:
        return "none"
    words = [str(found["quantize"] or found["mixed_precision"])]
    words += ["checkpointing"] if found["gradient_checkpointing"] else []
    return ", ".join([*words, *([f"{found['resolution']} px"] if found["resolution"] else [])])
