"""Group training of a zoo: adapters per second against one by one, and against the frozen base's own limit.

    python -m benchmarks.zoo_build

One thread, processor seconds, contenders interleaved in every round, medians over whole training steps (batch, forward,
backward, clipping, optimizer; what comes once a run, such as its checkpoint, is left out, which favours one by one). A
*sample* is one picture at one timestep. The limit is the frozen base alone at its best batch size: forward and backward,
gradients flowing to its input, no weight trained. Loss curves of one group are compared with those of its people trained
one by one, as ``personalize`` does it.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import write_result
from smidgen.bases.families import load_base
from smidgen.difflora.zoo.build import job_of, open_zoo
from smidgen.difflora.zoo.group import GroupTrainer, trainer
from smidgen.difflora.zoo.settings import PRESETS, Subjects, ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.difflora.zoo.task import GroupTask
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.fitting import fit

SATURATION = (16, 32, 64)  # batch sizes tried for the limit
SIZES = (8, 16, 32)  # adapters in a group
PICTURES = (1, 4)  # of each person in a step; the zoo's own number is 1
BRIEF = 7  # steps of a timed run, the first of which is left out


class Clocked:
    """A task that notes the processor's time at every batch, so that the differences are whole steps."""

    def __init__(self, task: Any) -> None:
        self.task, self.times = task, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, index: int) -> dict[str, Any]:
        self.times.append(time.process_time())
        return self.task.batch(index)  # type: ignore[no-any-return]

    def steps(self) -> list[float]:
        """Seconds of the steps but the first and the last."""
        return [end - start for start, end in zip(self.times[1:-1], self.times[2:], strict=True)]


def frozen_steps(unet: torch.nn.Module, batch: int) -> list[float]:
    """Seconds of steps of the base alone, where only its input takes a gradient."""
    times = [time.process_time()]
    for _ in range(2):
        latents = torch.randn(batch, 16, 8, 8, requires_grad=True)
        at, words = torch.randint(0, 1000, (batch,)), torch.randn(batch, 48, 96)
        unet(latents, at, encoder_hidden_states=words, return_dict=False)[0].square().mean().backward()
        times.append(time.process_time())
    return [end - start for start, end in itertools.pairwise(times)]


def train_alone(config: ZooConfig, plain: torch.nn.Module, task: Any) -> list[float]:
    """One adapter as ``personalize`` trains it; its loss curve."""
    unet, decay = copy.deepcopy(plain), config.adapter.weight_decay
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"weight_decay": decay, "progress": False}
        target = Path(folder) / "adapter"
        return fit("alone", unet, task, adapter_config(config), rates(config), config.train, target, **options).losses


def train_group(trainer: GroupTrainer, names: list[str], task: Any) -> torch.Tensor:
    """A group as the zoo trains it; loss curves [step, person]."""
    bank = trainer.fresh_bank(names)
    with tempfile.TemporaryDirectory() as folder, bank.rows([n for n in names for _ in range(task.batch_size)]):
        trainer.train(task, bank, names, Path(folder))
    return torch.stack(task.history)


class Bench:
    """The base, people with their pictures, and the contenders' runs; each gives the seconds of some of its steps."""

    def __init__(self, config: ZooConfig) -> None:
        self.config, zoo = config, open_zoo(config)
        everybody = replace(config, group=replace(config.group, group_size=config.subjects.people))
        people = job_of(everybody, zoo, read_subjects(config.out), 0, keep_work=False).people
        self.trainer, self.plain = trainer(config), load_base(config.base).model.requires_grad_(False)
        self.names = [person.id for person in people]
        self.tasks = [self.trainer.task(person, self.trainer.encode(person)) for person in people]

    def task(self, person: int, pictures: int) -> PersonalizeTask:
        return replace(self.tasks[person], batch_size=pictures)

    def group_task(self, size: int, pictures: int) -> GroupTask:
        return GroupTask([self.task(person, pictures) for person in range(size)])

    def alone(self, pictures: int) -> list[float]:
        task = Clocked(self.task(0, pictures))
        train_alone(self.config, self.plain, task)
        return task.steps()

    def group(self, size: int, pictures: int) -> list[float]:
        task = Clocked(self.group_task(size, pictures))
        train_group(self.trainer, self.names[:size], task)
        return task.steps()

    def curves(self, size: int, steps: int) -> dict[str, float]:
        """How far the loss curves of a group are from those of its people trained one by one."""
        config = replace(self.config, train=replace(self.config.train, max_train_steps=steps))
        alone = torch.tensor([train_alone(config, self.plain, self.task(person, 1)) for person in range(size)]).T
        trainer = copy.copy(self.trainer)
        trainer.config = config
        together = train_group(trainer, self.names[:size], self.group_task(size, 1))
        apart = (together - alone).abs()
        return {
            "curves_people": size,
            "curves_steps": steps,
            "curves_largest_difference": float(apart.max()),
            "curves_largest_relative_difference": float((apart / alone).max()),
        }


def throughput(bench: Bench, rounds: int) -> dict[str, Any]:
    """Milliseconds per sample of each contender, adapters per second against one by one, shares of the limit."""
    runs: dict[str, Callable[[], list[float]]] = {}
    samples: dict[str, int] = {}
    for n in SATURATION:
        runs[f"limit_batch_{n}"], samples[f"limit_batch_{n}"] = lambda n=n: frozen_steps(bench.plain, n), n  # type: ignore[misc]
    for k in PICTURES:
        name = f"one_by_one_pictures_{k}"
        runs[name], samples[name] = lambda k=k: bench.alone(k), k  # type: ignore[misc]
    for size, k in [*((size, PICTURES[0]) for size in SIZES), (SIZES[0], PICTURES[1])]:
        name = f"group_{size}_pictures_{k}"
        runs[name], samples[name] = lambda size=size, k=k: bench.group(size, k), size * k  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in runs}  # [round], ms per sample
    for number in range(rounds + 1):
        for name, run in runs.items():
            found = 1000 * statistics.median(run()) / samples[name]
            taken[name] += [found] if number else []  # the first round warms up
    cost = {name: statistics.median(found) for name, found in taken.items()}
    best = min(SATURATION, key=lambda n: cost[f"limit_batch_{n}"])
    limit = taken[f"limit_batch_{best}"]
    figures: dict[str, Any] = {f"{name}_ms_per_sample": value for name, value in cost.items()}
    for name, found in taken.items():
        if name.startswith("group"):
            alone = taken[f"one_by_one_{name[name.index('pictures') :]}"]
            figures |= _ratios(f"{name}_adapters_per_s_over_one_by_one", alone, found)
        if not name.startswith("limit"):
            figures |= _ratios(f"{name}_share_of_limit", limit, found)
    return figures


def _ratios(name: str, slow: list[float], fast: list[float]) -> dict[str, Any]:
    """The ratio of two contenders' medians, and the lowest and highest ratio of one round."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    return {name: statistics.median(slow) / statistics.median(fast), f"{name}_rounds": [min(rounds), max(rounds)]}


def main() -> None:
    """Runs everything and writes benchmarks/results/zoo_build.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", type=int, nargs=2, default=[16, 50], metavar=("PEOPLE", "STEPS"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        default = PRESETS["default"]
        people = Subjects(people=max(*SIZES, args.curves[0]), held_out=0)
        brief = replace(default.train, max_train_steps=BRIEF, lr_warmup_steps=2)
        bench = Bench(replace(default, subjects=people, train=brief, out=Path(scratch) / "zoo"))
        figures = throughput(bench, args.rounds) | bench.curves(*args.curves)
    figures["cpu_seconds_of_this_benchmark"] = time.process_time() - start
    figures = {name: [round(v, 4) for v in f] if isinstance(f, list) else round(f, 6) for name, f in figures.items()}
    for name, value in figures.items():
        print(f"{name:55} {value}")
    command = f"python -m benchmarks.zoo_build --rounds {args.rounds} --curves {args.curves[0]} {args.curves[1]}"
    write_result("zoo_build", figures, command)


if __name__ == "__main__":
    main()
