"""One group of a zoo, from pictures to files: the one path that local workers and Ray run.

``build_group(job) -> files`` needs nothing but the job and the base: pictures come as bytes, what is made goes back as
bytes. The same job gives the same bytes on the same machine, whoever runs it and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smidgen.adapters.bank import Bank
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.zoo.gate import ScoredScenes, decide
from smidgen.difflora.zoo.records import GroupFiles, Record, pack_group
from smidgen.difflora.zoo.settings import ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.task import GroupTask
from smidgen.errors import ConfigError, SmidgenError
from smidgen.tasks.data.images import load_picture
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.interrupts import scratch_folder
from smidgen.training.loop import LoopConfig
from smidgen.training.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

PROBES = 4  # batches on which final losses are measured


@dataclass(frozen=True)
class Person:
    """What building an adapter needs of a subject: pictures as files' contents, with their captions."""

    id: str
    split: str
    pictures: tuple[bytes, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One group. ``work`` is a folder for checkpoints that outlives a kill, None for a scratch one."""

    config: ZooConfig
    layout: Layout
    group: int
    people: tuple[Person, ...]
    work: Path | None = None


def build_group(job: Job) -> GroupFiles:
    """Trains, judges and packs one group.

    Raises:
        BaseLockError: the base of this machine is another than the zoo's.
        TrainingInterrupted: after SIGINT or SIGTERM, a checkpoint in ``job.work``.
    """
    started = time.perf_counter()
    with _one_thread():
        group = trainer(job.config)
        job.layout.check_same(group.layout, "Adapters made with this machine's base")
        with contextlib.ExitStack() as stack:
            work = job.work or stack.enter_context(scratch_folder())
            rows, records = group.make(job, work)
        return pack_group(job.layout, job.group, rows, records, time.perf_counter() - started)


@lru_cache(maxsize=1)
def trainer(config: ZooConfig) -> GroupTrainer:
    """The loaded base and what hangs on it, once a process."""
    return GroupTrainer(config)


class GroupTrainer:
    """Trains adapters of a zoo's config, many at once in a bank, and scores them if there is a judge for the base."""

    def __init__(self, config: ZooConfig) -> None:
        self.config = config
        self.pipeline = AdaptedPipeline.load(config.base, adapter_config(config), config.train.mixed_precision)
        self.base, self.model, self.layout = self.pipeline.base, self.pipeline.model, self.pipeline.layout
        if config.gradient_checkpointing:
            self.base.model.enable_gradient_checkpointing()
        judge = self.base.judge() if config.gate.judged_pictures else None
        self.scenes = ScoredScenes(self.pipeline, judge, config.gate, config.train.seed) if judge else None

    def make(self, job: Job, work: Path) -> tuple[Tensor, list[Record]]:
        """Rows [adapters x checkpoints, size] and their lines."""
        names = [person.id for person in job.people]
        task = GroupTask([self.task(person, self.encode(person)) for person in job.people])
        repeated = [name for name in names for _ in range(task.batch_size)]
        with self.fresh_bank(names) as bank:
            with bank.rows(repeated):
                self.train(task, bank, names, work)
                losses = self.measure(task)
            with bank.rows([None] * len(repeated)):
                base_losses = self.measure(task)
            rows = self._rows(bank, work)
        scores: Sequence[Any] = [None] * len(names)
        if self.scenes is not None:
            scores = self.scenes.identities(list(rows.values())[-1], [self.pictures(person) for person in job.people])
        found = zip(losses.tolist(), base_losses.tolist(), scores, strict=True)
        verdicts = [decide(self.config.gate, *each) for each in found]
        lines = [
            Record(person.id, job.group, 0, person.split, step, step == max(rows), **vars(verdict), sha256="")
            for step in rows
            for person, verdict in zip(job.people, verdicts, strict=True)
        ]
        return torch.cat(list(rows.values())), lines

    def train(self, task: GroupTask, bank: Bank, names: list[str], work: Path) -> None:
        """Trains the bank with the one loop; goes on from the newest checkpoint in ``work``."""
        rate, decay = rates(self.config), self.config.adapter.weight_decay
        self.pipeline.train(task, bank, rate, decay, self.loop(), work, {"people": names})

    def loop(self) -> LoopConfig:
        """The loop's settings: as asked for, with the checkpoints that go into the zoo among those it writes."""
        group, chosen = self.config.group, self.config.train
        if group.keep_last == 1:
            return chosen
        return replace(chosen, checkpointing_steps=group.keep_every, checkpoints_total_limit=group.keep_last)

    @torch.no_grad()
    def measure(self, task: GroupTask) -> Tensor:
        """Each person's mean loss over batches that training did not use [people]."""
        total = self.config.train.max_train_steps * self.config.train.gradient_accumulation_steps
        batches = (task.batch(total + number) for number in range(PROBES))
        device, precision = self.base.device, self.config.train.mixed_precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        moved = ({k: v.to(device) if hasattr(v, "to") else v for k, v in b.items()} for b in batches)
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            return torch.stack([task.losses(self.model, batch).float().cpu() for batch in moved]).mean(0)

    def fresh_bank(self, names: list[str]) -> Bank:
        """A bank of untrained adapters, all from one start or each from its own."""
        if self.config.group.shared_start:
            return self.pipeline.bank(names)
        try:
            return self.pipeline.bank(names, [derive(self.config.train.seed, "start", name) for name in names])
        except SmidgenError as error:
            raise ConfigError(
                f"{self.config.adapter.method!r} keeps frozen what its seed decides, and adapters of one zoo share it: "
                f"shared_start=False has no meaning for it. {error}"
            ) from error

    def pictures(self, person: Person) -> list[Image]:
        """A person's pictures in the base's size."""
        return [load_picture(io.BytesIO(content), self.base.resolution) for content in person.pictures]

    def encode(self, person: Person) -> Encoded:
        """A person's pictures and captions, encoded by the base."""
        return self.pipeline.encode(self.pictures(person), person.captions, f"{person.id} picture")

    def task(self, person: Person, encoded: Encoded) -> PersonalizeTask:
        """A person's own task; with common noise its random numbers are everybody's."""
        config, seed = self.config, self.config.train.seed
        seed = seed if config.group.common_noise else derive(seed, "person", person.id)
        size, gamma = config.group.train_batch_size, config.adapter.snr_gamma
        return PersonalizeTask(encoded, self.base, size, seed, snr_gamma=gamma)

    def _rows(self, bank: Bank, work: Path) -> dict[int, Tensor]:
        """Step -> the bank's adapters [people, size] then, of the checkpoints to keep and of the end."""
        mark = f".banks.{bank.label}."
        steps = {name: p.detach() for name, p in self.model.named_parameters() if mark in name}
        found = {self.config.train.max_train_steps: steps}
        if self.config.group.keep_last > 1:
            store = CheckpointStore(work, self.config.group.keep_last)
            found = {s: store.read(s).trained for s in store.steps()[-self.config.group.keep_last :]} | found
        return {step: self.layout.pack(self._named(found[step], mark)).cpu() for step in sorted(found)}

    @staticmethod
    def _named(tensors: dict[str, Tensor], mark: str) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            target, _, side = name.partition(mark)
            found.setdefault(target, {})[side] = value
        return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for arithmetic: sums do not depend on how many cores or workers there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
