"""Peak memory and step time of a method, each measured in a fresh process that does nothing else.

The process loads base and data, adapts, and takes some training steps; its peak resident memory is read. Then it loads
the base again with the head alone trained, and times the two steps in turn: both see the same noise of the machine.
"""

import json
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

from smidgen.errors import TrainingError
from smidgen.lab.compare.cells import Record
from smidgen.lab.compare.experiment import Experiment, Method
from smidgen.lab.compare.fresh import run_fresh

WARM_UP = 1  # pairs of steps that are not counted


def measure_apart(experiment: Experiment, method: Method, rate: float, seed: int) -> Record:
    """``peak_memory`` in bytes, ``step_ratio``, and ``cpu_seconds`` of the measuring process itself.

    Raises:
        TrainingError: the process failed.
    """
    alone = replace(experiment.only([method.name]), claim=None)
    status, lines = run_fresh("smidgen.lab.compare.cost", alone, [str(rate), str(seed)])
    if status != 0 or not lines:
        raise TrainingError(f"The process that measures {method.name!r} ended with status {status}.")
    return dict(json.loads(lines[-1]))


def measure(experiment: Experiment, rate: float, seed: int) -> Record:
    """The figures of the only method of ``experiment``, taken in this process."""
    import torch

    from smidgen.lab.compare.recipes import prepare
    from smidgen.lab.compare.setups import make_rates, make_setup
    from smidgen.training import engine
    from smidgen.training.randomness import derive

    (method,) = experiment.methods
    config = experiment.config(seed)
    prepared = prepare(experiment.recipe, config)
    heads, head_rate = prepared.heads, config.adapter.head_learning_rate

    def steps_of(model: Any, setup: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "init"))
            engine.adapt(model, setup, heads)
        rates = make_rates(rate, head_rate)
        groups = engine.groups(model, rates, 0.0, heads)
        model.train()
        return _Steps(prepared.task, model, torch.optim.AdamW(groups))

    setup = make_setup(experiment, method, seed, prepared.model, prepared.task, prepared.heads)
    adapted = steps_of(prepared.model, setup)
    for number in range(experiment.cost_steps):
        adapted(number)
    peak = peak_memory()
    found: Record = {"peak_memory": peak, "step_ratio": None, "step_seconds": None, "base_step_seconds": None}
    if heads:
        base = steps_of(prepared.fresh(), engine.LinearProbe())
    else:
        base = _Steps(prepared.task, prepared.fresh().requires_grad_(False).train(), None)
    pairs = [(base(number), adapted(number)) for number in range(WARM_UP + experiment.cost_steps)][WARM_UP:]
    found["step_ratio"] = median(own / plain for plain, own in pairs)
    found["base_step_seconds"] = median(plain for plain, _ in pairs)
    found["step_seconds"] = median(own for _, own in pairs)
    return found | {"cpu_seconds": time.process_time()}


class _Steps:
    """Training steps of one model; calling it takes step number ``number`` and returns its CPU seconds.

    Without an optimizer nothing is trained and a step is the forward pass alone: a frozen base without a head.
    """

    def __init__(self, task: Any, model: Any, optimizer: Any):
        self.task, self.model, self.optimizer = task, model, optimizer

    def __call__(self, number: int) -> float:
        batch = self.task.batch(number)
        started = time.process_time()
        loss = self.task.loss(self.model, batch)
        if self.optimizer is not None:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - started


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, by the system's own count."""
    import resource

    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _main() -> None:
    from smidgen.lab.compare.fresh import experiment_here, one_thread

    one_thread()
    experiment, (rate, seed) = experiment_here(), sys.argv[1:]
    sys.stdout.write(json.dumps(measure(experiment, float(rate), int(seed))) + "\n")


if __name__ == "__main__":
    _main()
