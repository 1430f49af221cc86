"""Generators of several adapter families, trained end to end for equally many steps and scored on the same people.

    python -m benchmarks.generator_families --zoo work/zoo --steps 400

Each family sees the same people, photos, pictures, timesteps and noise. ``--only`` names some of them; what was trained
before is taken up again. The paper's two stages on the same zoo, and the end-to-end stage begun from them, are among the
rows. Scores are those of ``smidgen zoo evaluate``: one photo, the same scenes from the same noise, the same judge.
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
from smidgen.difflora.generator.fit import fit
from smidgen.difflora.generator.generator import JSON, load_generator
from smidgen.difflora.generator.settings import PRESETS, GeneratorConfig
from smidgen.difflora.zoo.store import Zoo
from smidgen.lab.audit.people import sitters
from smidgen.lab.audit.scenes import AuditScenes
from smidgen.lab.audit.settings import Drawing
from smidgen.lab.audit.statistics import bootstrap
from smidgen.tasks.personalize.settings import Adapter


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


def scored(folder: Path, zoo: Path, people: int) -> dict[str, float | list[float]]:
    """Identity with its interval and captions of the generator in ``folder`` from one photo of held-out people."""
    generator = load_generator(folder)
    scenes = AuditScenes(generator.base, generator.layout, None, Drawing(unrelated=()), 0)
    sitting = sitters(Zoo(zoo), people, 1, scenes.pipeline.base.resolution)
    rows = torch.cat([generator.predict(person.photos) for person in sitting])
    found = [scenes.scores(p, person.others) for p, person in zip(scenes.draw(rows), sitting, strict=True)]
    identity = bootstrap([score["identity"] for score in found])
    figures: dict[str, float | list[float]] = {"numbers": generator.layout.size, "identity": round(identity.mean, 3)}
    if identity.low is not None and identity.high is not None:
        figures["interval"] = [round(identity.low, 3), round(identity.high, 3)]
    return figures | {"captions": round(sum(score["caption"] for score in found) / len(found), 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", type=Path, default=Path("work/zoo"))
    parser.add_argument("--work", type=Path, default=Path("work/families"))
    parser.add_argument("--people", type=Path, help="a folder of people from another generator's training, to share")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--no-scores", action="store_true")
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
    if given.no_scores:
        return
    for out in there:
        figures |= {f"{out.name} {name}": value for name, value in scored(out, given.zoo, given.held_out).items()}
        print({name: value for name, value in figures.items() if name.startswith(out.name + " ")}, flush=True)
    write_result("generator_families", figures, "python -m benchmarks.generator_families " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
