"""Group training of a zoo: adapters per second against one by one, and against the frozen base's own limit.

    python -m benchmarks.zoo_build

One thread, processor seconds, contenders interleaved in every round, medians. A *sample* is one picture at one timestep,
forward and backward. The limit is the frozen base alone at its best batch size, gradients flowing through all of its
layers but into no weight. With ``--people N`` a small zoo is built as well and its scores are printed.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import smidgen
from benchmarks._harness import write_result
from smidgen.difflora.zoo.build import build, job_of, open_zoo
from smidgen.difflora.zoo.group import Workshop, workshop
from smidgen.difflora.zoo.settings import PRESETS, Subjects, ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.difflora.zoo.task import GroupTask
from smidgen.training.loop import train
from smidgen.training.pipelines import load_base
from smidgen.training.tasks.personalize import PersonalizeTask

SATURATION = (16, 32, 64)  # batch sizes tried for the limit


def frozen_step(unet: torch.nn.Module, batch: int) -> None:
    """Forward and backward of the base alone; only its input takes a gradient."""
    latents = torch.randn(batch, 16, 8, 8, requires_grad=True)
    times, words = torch.randint(0, 1000, (batch,)), torch.randn(batch, 48, 96)
    unet(latents, times, encoder_hidden_states=words, return_dict=False)[0].square().mean().backward()


def train_alone(config: ZooConfig, unet: torch.nn.Module, task: PersonalizeTask) -> list[float]:
    """One adapter as ``personalize`` trains it; returns its loss curve."""
    smidgen.adapt(unet, adapter_config(config), "alone")
    rate = rates(config)
    groups = smidgen.parameter_groups(unet, lr=rate.residual, transform_lr=rate.transform)
    with tempfile.TemporaryDirectory() as folder:
        losses = train(task, unet, groups, config.train, folder, progress=False).losses
    from smidgen.adapters.tuner.peft_bridge import remove

    remove(unet, "alone")
    return losses


def train_group(shop: Workshop, names: list[str], tasks: list[PersonalizeTask]) -> torch.Tensor:
    """A group as the zoo trains it; returns loss curves [step, person]."""
    bank, task = shop.fresh_bank(names), GroupTask(tasks)
    with tempfile.TemporaryDirectory() as folder, bank.rows([n for n in names for _ in range(task.batch_size)]):
        shop.train(task, bank, names, Path(folder))
    return torch.stack(task.history)


def seconds(run) -> float:  # type: ignore[no-untyped-def]
    start = time.process_time()
    run()
    return time.process_time() - start


def throughput(config: ZooConfig, sizes: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Samples per second of each contender, their ratios, and how far the loss curves are apart."""
    shop, zoo = workshop(config), open_zoo(config)
    everybody = replace(config, group=replace(config.group, group_size=max(sizes)))
    people = job_of(everybody, zoo, read_subjects(config.out), 0, keep_work=False).people
    tasks = [shop.task(person, shop.encode(person)) for person in people]
    names = [person.id for person in people]
    plain, steps, batch = load_base(config.base).unet, config.train.max_train_steps, config.group.train_batch_size
    runs = {f"limit_batch_{n}": (lambda n=n: frozen_step(plain, n)) for n in SATURATION}
    runs["one_by_one"] = lambda: train_alone(config, plain, tasks[0])
    runs |= {f"group_{g}": (lambda g=g: train_group(shop, names[:g], tasks[:g])) for g in sizes}
    samples = {f"limit_batch_{n}": n for n in SATURATION} | {"one_by_one": steps * batch}
    samples |= {f"group_{g}": g * steps * batch for g in sizes}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        runs[name]()  # warm
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    figures = {f"{name}_samples_per_s": samples[name] / statistics.median(t) for name, t in taken.items()}
    limit = max(figures[f"limit_batch_{n}_samples_per_s"] for n in SATURATION)
    for g in sizes:
        figures[f"group_{g}_over_one_by_one"] = (
            figures[f"group_{g}_samples_per_s"] / figures["one_by_one_samples_per_s"]
        )
        figures[f"group_{g}_over_limit"] = figures[f"group_{g}_samples_per_s"] / limit
    together = train_group(shop, names[: sizes[0]], tasks[: sizes[0]])
    alone = torch.tensor([train_alone(config, plain, task) for task in tasks[: sizes[0]]]).T
    figures["loss_curves_largest_relative_difference"] = float(((together - alone).abs() / alone).max())
    return {name: round(value, 6) for name, value in figures.items()}


def small_zoo(config: ZooConfig, people: int) -> dict[str, float]:
    """Scores and seconds of a zoo of ``people`` by the default settings."""
    start = time.process_time()
    found = build(replace(config, subjects=replace(config.subjects, people=people, held_out=0)), progress=False)
    print(found)
    spent = {"zoo_cpu_seconds_per_adapter": (time.process_time() - start) / people, "zoo_kept": found.kept}
    spent |= {"zoo_identity": found.identity or 0.0, "zoo_base_identity": found.base_identity or 0.0}
    return {name: round(value, 4) for name, value in spent.items()}


def main() -> None:
    """Runs everything and writes benchmarks/results/zoo_build.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, help="pictures of each person in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--people", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = PRESETS["default"]
        brief = replace(config.train, max_train_steps=args.steps, lr_warmup_steps=2)
        people = Subjects(people=max(args.sizes), held_out=0)
        group = replace(config.group, train_batch_size=args.batch)
        timed = replace(config, subjects=people, train=brief, group=group, out=Path(scratch) / "timed")
        figures = throughput(timed, tuple(args.sizes), args.rounds)
        if args.people:
            workshop.cache_clear()
            figures |= small_zoo(replace(config, out=Path(scratch) / "zoo"), args.people)
    for name, value in figures.items():
        print(f"{name:45} {value}")
    command = f"python -m benchmarks.zoo_build --batch {args.batch} --steps {args.steps} --people {args.people}"
    write_result("zoo_build", figures, command)


if __name__ == "__main__":
    main()
