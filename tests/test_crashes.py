"""What died with its worker runs once more; what failed does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import os
from pathlib import Path

def ran(name):
    with open(name, "a") as file:
        file.write("x")
    return len(Path(name).read_text())

def test_dies_once():
    if ran("once") == 1:
        os.abort()

def test_dies_always():
    ran("always")
    os.abort()

def test_fails():
    assert ran("fails") == 2  # would pass the second time

def test_passes():
    ran("passes")
"""


def test_only_what_died_runs_again(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("from crashes import pytest_configure\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    out = done.stdout
    assert done.returncode == 1, out + done.stderr
    runs = {name: len((tmp_path / name).read_text()) for name in ("once", "always", "fails", "passes")}
    assert runs == {"once": 2, "always": 2, "fails": 1, "passes": 1}, out
    assert "2 failed, 2 passed, 2 rerun" in out, out
    assert "died with its worker, 1 x: test_it.py::test_dies_once" in out
    assert "died with its worker, 2 x: test_it.py::test_dies_always" in out
    traces = [path.read_text() for path in (tmp_path / "build" / "crashes").iterdir()]
    assert any("in test_dies_once" in trace for trace in traces) and all("Fatal Python error" in t for t in traces)
