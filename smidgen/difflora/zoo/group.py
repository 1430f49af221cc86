"""One group of a zoo, from pictures to files: the one path that local workers and Ray run.

``build_group(job) -> files`` needs nothing but the job and the base: pictures come as bytes, what is made goes back as
bytes. The same job gives the same bytes on the same machine, whoever runs it and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.tuner.bank import Bank
from smidgen.adapters.tuner.peft_bridge import make_slot
from smidgen.bases.judging import judge_for
from smidgen.bases.stable_diffusion import default_device, encode_pictures, encode_prompts, load_base
from smidgen.bases.stable_diffusion import time_ids as sdxl_time_ids
from smidgen.difflora.weightspace.layout import Layout, layout_of
from smidgen.difflora.zoo.gate import Drawer, Verdict, decide
from smidgen.difflora.zoo.records import GroupFiles, Record, pack_group
from smidgen.difflora.zoo.settings import ZooConfig, adapter_config, rates
from smidgen.difflora.zoo.task import GroupTask
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import load_picture, to_tensor
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask, make_task
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.loop import LoopConfig, train
from smidgen.training.randomness import derive

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
        shop = workshop(job.config)
        job.layout.check_same(shop.layout, "Adapters made with this machine's base")
        with contextlib.ExitStack() as stack:
            work = job.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rows, records = shop.make(job, work)
        return pack_group(job.layout, job.group, rows, records, time.perf_counter() - started)


@lru_cache(maxsize=1)
def workshop(config: ZooConfig) -> Workshop:
    """The loaded base and what hangs on it, once a process."""
    return Workshop(config)


class Workshop:
    """A base with one frozen adapter as a carrier for banks, its layout, and its judge if it has one."""

    def __init__(self, config: ZooConfig) -> None:
        self.config = config
        self.base = load_base(config.base, config.train.mixed_precision, default_device())
        self.unet: nn.Module = self.base.unet
        if config.gradient_checkpointing:
            self.base.unet.enable_gradient_checkpointing()
        smidgen.adapt(self.unet, adapter_config(config))
        self.own: smidgen.SmidgenConfig = self.unet.peft_config["default"]  # type: ignore[index,assignment]
        self.layout = layout_of(self.unet, self.own)
        for parameter in self.unet.parameters():
            parameter.requires_grad_(False)
        judge = judge_for(self.base) if config.gate.judged_pictures else None
        self.drawer = Drawer(self.base, judge, config.gate, config.train.seed) if judge else None

    def make(self, job: Job, work: Path) -> tuple[Tensor, list[Record]]:
        """Rows [adapters x checkpoints, size] and their lines."""
        names = [person.id for person in job.people]
        encoded = [self.encode(person) for person in job.people]
        bank = self.fresh_bank(names)
        task = GroupTask([self.task(person, one) for person, one in zip(job.people, encoded, strict=True)])
        repeated = [name for name in names for _ in range(task.batch_size)]
        with bank.rows(repeated):
            self.train(task, bank, names, work)
            losses = self.measure(task)
        with bank.rows([None] * len(repeated)):
            base_losses = self.measure(task)
        scores: list[Any] = [None] * len(names)
        if self.drawer is not None:
            own = [
                [load_picture(io.BytesIO(p), self.base.resolution) for p in person.pictures] for person in job.people
            ]
            scores = list(self.drawer.identities(bank, names, own))  # type: ignore[arg-type]
        found = zip(losses.tolist(), base_losses.tolist(), scores, strict=True)
        return self._lines(job, bank, work, [decide(self.config.gate, *each) for each in found])

    def train(self, task: GroupTask, bank: Bank, names: list[str], work: Path) -> None:
        """Trains the bank with the one loop; goes on from the newest checkpoint in ``work``."""
        rate, decay = rates(self.config), self.config.adapter.weight_decay
        groups: dict[str, dict[str, Any]] = {}
        for layer in bank.layers.values():
            for name, parameter in layer.bank.named_parameters():  # type: ignore[union-attr]
                parameter.requires_grad_(True)
                kind = name.partition("_")[0]
                lr = rate.transform if kind == "transform" else rate.residual
                groups.setdefault(kind, {"params": [], "lr": lr, "weight_decay": decay})["params"].append(parameter)
        identity = {"people": names, "layout": self.layout.digest}
        try:
            train(
                task,
                self.unet,
                list(groups.values()),
                self.loop(),
                work,
                resume="latest",
                identity=identity,
                progress=False,
            )
        finally:
            for parameter in bank.parameters():
                parameter.requires_grad_(False)

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
        moved = ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches)
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            return torch.stack([task.losses(self.unet, batch).float().cpu() for batch in moved]).mean(0)

    def fresh_bank(self, names: list[str]) -> Bank:
        """A bank of untrained adapters that shares the carrier's frozen factors."""
        bank = Bank(self.unet, self.own, names)
        for layer in bank.layers.values():
            slot: Any = layer.bank
            if not slot.ready:
                bank._share_factors(slot, layer.slot("default"))
        if not self.config.group.shared_start:
            self._start_apart(bank)
        return bank

    def _start_apart(self, bank: Bank) -> None:
        for row, name in enumerate(bank.names):
            own = replace(self.own, seed=derive(self.config.train.seed, "start", name))
            for target, layer in bank.layers.items():
                slot: Any = layer.bank
                fresh = make_slot(own, layer.get_base_layer(), target)
                fixed = [f"{p}_{n}" for p, member in slot.members() for n in member.constants(f"{slot.seed}/{p}")]
                if any(not torch.equal(getattr(fresh, side), getattr(slot, side).cpu()) for side in fixed):
                    raise ConfigError(
                        f"{self.config.adapter.method!r} keeps {fixed[0]!r} frozen at values of its seed, which adapters of "
                        "one zoo share: shared_start=False has no meaning for it."
                    )
                with torch.no_grad():
                    for side, value in slot.trained().items():
                        value[row] = fresh.trained()[side].to(value)

    def encode(self, person: Person) -> Encoded:
        """A person's pictures and captions, encoded by the base."""
        images = [load_picture(io.BytesIO(content), self.base.resolution) for content in person.pictures]
        mean, std = encode_pictures(self.base, to_tensor(images), batch=16)
        size = (self.base.resolution, self.base.resolution)
        ids = torch.stack([sdxl_time_ids(size, self.base.resolution)] * len(images))
        names = tuple(f"{person.id} picture {number}" for number in range(len(images)))
        prompts = encode_prompts(self.base, person.captions)
        return Encoded(mean, std, prompts, ids if self.base.family == "sdxl" else None, names)

    def task(self, person: Person, encoded: Encoded) -> PersonalizeTask:
        """A person's own task; with common noise its random numbers are everybody's."""
        config, seed = self.config, self.config.train.seed
        seed = seed if config.group.common_noise else derive(seed, "person", person.id)
        return make_task(
            self.base, encoded, batch_size=config.group.train_batch_size, seed=seed, snr_gamma=config.adapter.snr_gamma
        )

    def _lines(self, job: Job, bank: Bank, work: Path, verdicts: list[Verdict]) -> tuple[Tensor, list[Record]]:
        """The bank's adapters, and those of the earlier checkpoints, which share the last one's verdict."""
        last = self.config.train.max_train_steps
        parameters = {name: p for name, p in self.unet.named_parameters() if ".bank." in name}
        steps = {last: {name: p.detach() for name, p in parameters.items()}}
        if self.config.group.keep_last > 1:
            store = CheckpointStore(work, self.config.group.keep_last)
            steps = {s: store.read(s).trained for s in store.steps()[-self.config.group.keep_last :]} | steps
        rows, records = [], []
        for step in sorted(steps):
            stacked = self.layout.pack(self._named(steps[step])).cpu()
            for person, verdict, row in zip(job.people, verdicts, stacked, strict=True):
                rows.append(row)
                records.append(
                    Record(person.id, job.group, 0, person.split, step, step == last, **vars(verdict), sha256="")
                )
        return torch.stack(rows), records

    @staticmethod
    def _named(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            target, _, side = name.partition(".bank.")
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
