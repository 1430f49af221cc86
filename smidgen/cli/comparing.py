"""The command that compares methods."""

import os
import shlex
from pathlib import Path
from typing import Literal


def compare(
    experiment: str,
    /,
    stage: Literal["search", "run", "report"] | None = None,
    workers: int | None = None,
    only: list[str] | None = None,
    out: Path | None = None,
    report: Path | None = None,
) -> None:
    """Run EXPERIMENT, a data file of methods, seeds and a task, and report quality per byte.

    It may be stopped at any time; the same command goes on with what is not done. A cell that failed is told in the
    report; remove its file to try it again.

    Args:
        experiment: debug, tweets, emoji, wordnet, or a .yaml file.
        stage: search finds learning rates, run trains and measures, report writes from what is there (none: all).
        workers: processes, each with one thread (none: one for each core).
        only: names of methods; the others are left out.
        out: where every training leaves its figures (none: runs/compare/NAME).
        report: where table, plot and JSON go (none: --out).
    """
    from smidgen.lab.compare.experiment import load_experiment
    from smidgen.lab.compare.run import compare as run

    chosen = load_experiment(experiment).only(only)
    folder = out or Path("runs/compare") / chosen.name
    words = ["smidgen", "compare", experiment, *(["--only", *only] if only else [])]
    page = run(
        chosen, folder, stage=stage, workers=workers or os.cpu_count() or 1, command=shlex.join(words), report=report
    )
    print(page or f"Learning rates: {folder / 'search'}")
