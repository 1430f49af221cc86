"""What every benchmark shares: where results go and what they carry."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from smidgen.adapters.atomic import replace_file

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "peft", "transformers", "diffusers", "safetensors", "numpy")


def write_result(name: str, figures: Mapping[str, float | int | Sequence[float]], command: str) -> Path:
    """Write ``results/NAME.json`` atomically: command, commit, machine, versions and flat figures.

    A figure is a number, or an interval as [low, high].
    """
    for key, value in figures.items():
        if isinstance(value, Sequence) and len(value) != 2:
            raise ValueError(f"figure {key!r} is a number or an interval [low, high], got {value!r}")
    record = {
        "command": command,
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "figures": dict(figures),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    replace_file(path, json.dumps(record, indent=2) + "\n")
    return path


def between(page: Path, name: str, text: str) -> None:
    """Puts a text between ``<!-- name -->`` and ``<!-- /name -->`` of a page."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, mark, rest = page.read_text().partition(start)
    if not mark or end not in rest:
        raise ValueError(f"{page} has no {start} ... {end}")
    replace_file(page, f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median processor seconds of ``run``: unlike wall time, hardly moved by other work on a shared machine."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return told.stdout.strip() or "unknown"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
