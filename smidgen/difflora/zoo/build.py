"""Build a zoo: people, pictures, groups, and whoever works on them. Killed at any moment, the same command goes on.

At most the steps since the last checkpoint of the groups in work are lost, no adapter is made twice, and the files are
those of a build that was never interrupted. Local workers share one queue; Ray spreads the same jobs over machines.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from smidgen.difflora.zoo.group import Job, Person, build_group, trainer
from smidgen.difflora.zoo.queue import Queue
from smidgen.difflora.zoo.settings import ZooConfig
from smidgen.difflora.zoo.status import Status, status
from smidgen.difflora.zoo.store import DESCRIPTION, Zoo
from smidgen.difflora.zoo.subjects import Subject, make_subjects, read_pictures, read_subjects
from smidgen.errors import ConfigError, MissingExtraError, SmidgenError
from smidgen.training.interrupts import TrainingInterrupted
from smidgen.training.settings import to_dict

logger = logging.getLogger(__name__)


def build(config: ZooConfig, workers: int = 1, ray: str | None = None, progress: bool = True) -> Status:
    """Builds what is missing of the zoo in ``config.out``.

    Args:
        config: the zoo; an unfinished one in ``out`` must have been started with the same settings.
        workers: processes on this machine.
        ray: address of a Ray cluster, ``local`` to start one here; then ``workers`` is how many groups run at once.
        progress: show a bar.

    Raises:
        DataError, BaseLockError: what is in ``out`` is another zoo.
        TrainingInterrupted: on Ctrl-C or SIGTERM.
        SmidgenError: a worker failed; what the others made is kept.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}.")
    zoo = open_zoo(config)
    people = read_subjects(config.out)
    todo = [group for group in range(_groups(config, people)) if not zoo.has(group)]
    with _bar(zoo, len(people), config.group.group_size, progress) as bar:
        try:
            if ray is not None:
                _with_ray(zoo, config, people, todo, workers, ray, bar)
            elif workers == 1:
                _work(config, people, bar)
            else:
                _with_processes(config, workers, bar)
        except TrainingInterrupted as error:
            raise TrainingInterrupted(
                f"Stopped with {len(zoo.groups())} of {_groups(config, people)} groups in {config.out}; the same command "
                "goes on from there.",
                error.signum,
            ) from error
    return status(config.out)


def open_zoo(config: ZooConfig) -> Zoo:
    """The zoo in ``config.out``, made ready: subjects and their pictures first, then the description."""
    pipeline = trainer(config)  # a base or a target that is refused leaves no folder
    if not (config.out / DESCRIPTION).exists():
        make_subjects(config.out, config.subjects, getattr(pipeline.base, "drawn", None))
    zoo = Zoo.create(config.out, pipeline.layout, settings_of(config))
    zoo.sweep()
    return zoo


def settings_of(config: ZooConfig) -> dict[str, Any]:
    """What decides the zoo's bytes, as JSON; where it lies and what it costs does not."""
    return {name: value for name, value in to_dict(config).items() if name not in ("out", "gradient_checkpointing")}


def job_of(config: ZooConfig, zoo: Zoo, people: Sequence[Subject], group: int, keep_work: bool) -> Job:
    """Everything that building ``group`` needs."""
    size = config.group.group_size
    members = tuple(
        Person(person.id, person.split, tuple(read_pictures(config.out, person)), person.captions)
        for person in people[group * size : (group + 1) * size]
    )
    work = config.out / "work" / f"{group:06d}" if keep_work else None
    return Job(config, zoo.layout, group, members, work)


def _groups(config: ZooConfig, people: Sequence[Subject]) -> int:
    return -(-len(people) // config.group.group_size)


# ---- who works -------------------------------------------------------------------------------------------------------


def _work(config: ZooConfig, people: Sequence[Subject], bar: Any = None, parent: int | None = None) -> None:
    """Takes group after group from the queue until none is left (or the parent process is gone)."""
    zoo, queue = Zoo(config.out), Queue(config.out / "locks")
    left = [group for group in range(_groups(config, people)) if not zoo.has(group)]
    while left:
        taken = False
        for group in left:
            if parent is not None and os.getppid() != parent:
                return
            with queue.claim(group) as mine:
                if mine and not zoo.has(group):
                    zoo.commit(build_group(job_of(config, zoo, people, group, keep_work=True)))
                    taken = True
                if mine:
                    shutil.rmtree(config.out / "work" / f"{group:06d}", ignore_errors=True)
            if bar is not None:
                bar.count()
        left = [group for group in left if not zoo.has(group)]
        if not taken:
            return  # all that is left is in other workers' hands


def _worker(config: ZooConfig, parent: int) -> tuple[str, int] | None:
    """A process of the pool: None when done, else (what went wrong, the signal or 0); errors do not always pickle."""
    try:
        _work(config, read_subjects(config.out), parent=parent)
    except TrainingInterrupted as error:
        return str(error), error.signum
    except (SmidgenError, OSError) as error:
        return f"{type(error).__name__}: {error}", 0
    return None


def _with_processes(config: ZooConfig, workers: int, bar: Any) -> None:
    trainer.cache_clear()  # this process only waits
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: list[Future] = [pool.submit(_worker, config, os.getpid()) for _ in range(workers)]
        pending: set[Future] = set(futures)
        while pending:
            _, pending = wait(pending, timeout=1.0)
            bar.count()
    failed = []
    for future in futures:
        try:
            result = future.result()
        except BrokenProcessPool:
            result = ("a worker was killed (out of memory?)", 0)
        if result is not None and result[1]:
            raise TrainingInterrupted(result[0], result[1])
        if result is not None:
            failed.append(result[0])
    if failed:
        raise SmidgenError(
            f"{len(failed)} of {workers} workers failed: {'; '.join(dict.fromkeys(failed))} What was made is kept, and the "
            "same command goes on."
        )


def _with_ray(
    zoo: Zoo, config: ZooConfig, people: Sequence[Subject], todo: list[int], workers: int, address: str, bar: Any
) -> None:
    """The same jobs on a Ray cluster; this process reads the pictures and writes what comes back."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("Building on a cluster needs Ray: pip install 'smidgen[ray]'") from error
    started = not ray.is_initialized()
    if started:
        where: dict[str, Any] = {"num_cpus": workers} if address == "local" else {"address": address}
        ray.init(log_to_driver=False, include_dashboard=False if address == "local" else None, **where)
    try:
        remote = ray.remote(max_retries=2)(build_group)
        waiting = list(todo)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(remote.remote(job_of(config, zoo, people, waiting.pop(0), keep_work=False)))
            done, running = ray.wait(running, num_returns=1)
            for reference in done:
                try:
                    zoo.commit(ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    raise SmidgenError(f"A Ray worker failed: {error.cause}") from error
            bar.count()
    finally:
        if started:
            ray.shutdown()


class _Bar:
    """Adapters that are there, of those wanted."""

    def __init__(self, zoo: Zoo, total: int, size: int, bar: Any) -> None:
        self.zoo, self.total, self.size, self.bar = zoo, total, size, bar

    def count(self) -> None:
        """Shows how many adapters are there now."""
        self.bar.update(_there(self.zoo, self.total, self.size) - self.bar.n)


def _there(zoo: Zoo, total: int, size: int) -> int:
    return min(total, len(zoo.groups()) * size)


@contextmanager
def _bar(zoo: Zoo, total: int, size: int, progress: bool) -> Iterator[_Bar]:
    from tqdm.auto import tqdm

    options = {"desc": "zoo", "unit": "adapter", "dynamic_ncols": True, "disable": not progress}
    with tqdm(total=total, initial=_there(zoo, total, size), **options) as bar:
        yield _Bar(zoo, total, size, bar)
