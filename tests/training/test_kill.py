"""SIGKILL at a random moment, then resume: the same adapter, bit for bit. The 20-fold run is benchmarks/resume.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from benchmarks.resume import attempts
found = attempts(Path(sys.argv[1]), int(sys.argv[2]), seed=int(sys.argv[3]))
print(found)
assert all(attempt.same for attempt in found), found
assert any(attempt.killed and attempt.kind == "write" for attempt in found), "no kill fell into a write"
"""


def kill(folder: Path, times: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", CODE, str(folder), str(times), "3"]
    done = subprocess.run(words, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_killed_runs_end_in_the_same_file(tmp_path):
    kill(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_twenty_killed_runs_end_in_the_same_file(tmp_path):
    kill(tmp_path, 20)
