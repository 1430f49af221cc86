"""Fresh Python processes that work on an experiment: it goes in as JSON on standard input, one thread each."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from smidgen.lab.compare.experiment import Experiment
from smidgen.training.settings import from_dict, to_dict

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}


def start_fresh(module: str, experiment: Experiment, words: Sequence[str], **options: object) -> subprocess.Popen[str]:
    """Start ``python -m module words...`` with ``experiment`` on its standard input."""
    environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, *words]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    process.stdin.write(json.dumps(to_dict(experiment)))
    process.stdin.close()
    process.stdin = None  # communicate() must not close it again
    return process


def run_fresh(module: str, experiment: Experiment, words: Sequence[str]) -> tuple[int, list[str]]:
    """Run such a process to its end; returns its status and the lines of its standard output."""
    process = start_fresh(module, experiment, words, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process.returncode, output.splitlines()


def experiment_here() -> Experiment:
    """The experiment on this process's standard input."""
    return from_dict(Experiment, json.load(sys.stdin))


def one_thread() -> None:
    """Keep torch to one thread: the number of threads decides the last bits of every sum."""
    import torch

    torch.set_num_threads(1)
