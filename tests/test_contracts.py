"""The house: no circle of imports, no wing that outgrows the others, and contracts that a wrong import breaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

grimp = pytest.importorskip("grimp")
ROOT = Path(__file__).parents[1]
WRONG = {  # a contract -> a file, and what it must not import
    "Wings point down": ("training/loop.py", "smidgen.bases.families"),
    "Inside lab": ("lab/statistics.py", "smidgen.lab.audit.settings"),
    "Inside serving": ("serving/shelf.py", "smidgen.serving.jobs"),
    "Inside difflora": ("difflora/weightspace/layout.py", "smidgen.difflora.zoo.settings"),
    "Inside tasks": ("tasks/diffusion/task.py", "smidgen.tasks.control.settings"),
    "Inside bases": ("bases/protocol.py", "smidgen.bases.pipelines"),
    "Inside training": ("training/randomness.py", "smidgen.training.loop"),
    "Inside adapters": ("adapters/methods.py", "smidgen.adapters.api"),
}


def test_there_is_no_circle() -> None:
    graph = grimp.build_graph("smidgen", exclude_type_checking_imports=True)
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()


def test_no_wing_has_more_than_three_tenths_of_all_lines() -> None:
    lines = {path: path.read_text().count("\n") for path in (ROOT / "smidgen").rglob("*.py")}
    total = sum(lines.values())
    for wing in (path for path in (ROOT / "smidgen").iterdir() if path.is_dir()):
        share = sum(count for path, count in lines.items() if path.is_relative_to(wing)) / total
        assert share <= 0.3, f"{wing.name} holds {share:.1%} of {total} lines"


def test_a_wrong_import_breaks_its_contract(tmp_path: Path) -> None:
    command = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("import-linter is not installed")
    shutil.copytree(
        ROOT / "smidgen", tmp_path / "smidgen", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, module in WRONG.values():
        with (tmp_path / "smidgen" / file).open("a") as text:
            text.write(f"\nimport {module}\n")
    run = subprocess.run(
        [command, "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    broken = {line.removesuffix(" BROKEN").strip() for line in run.stdout.splitlines() if line.endswith("BROKEN")}
    assert run.returncode == 1 and broken == set(WRONG), run.stdout + run.stderr
