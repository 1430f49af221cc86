"""The contenders that were trained for it: a generator's predictions, refined ones, and adapters trained on the photos."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.generator.generator import Generator
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.use.refine import Refine, captions_of, refine_rows, widened
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.zoo.group import GroupTrainer, Person
from smidgen.difflora.zoo.settings import Gate, Group, ZooConfig
from smidgen.difflora.zoo.task import GroupTask
from smidgen.lab.audit.contenders import Contender, Made
from smidgen.lab.audit.people import Sitter
from smidgen.lab.audit.scenes import AuditScenes
from smidgen.lab.audit.scores import key_of
from smidgen.lab.audit.settings import EvaluateConfig
from smidgen.tasks.personalize.settings import PRESETS
from smidgen.training.settings import to_dict

GROUP = 16  # people trained at once


class Predicted:
    """What one generator gives: as it is, refined, and under somebody else's photo."""

    def __init__(
        self, name: str, generator: Generator, digest: str, people: Sequence[Sitter], config: EvaluateConfig,
        scenes: Callable[[Layout], AuditScenes],
    ) -> None:  # fmt: skip
        self.name, self.generator, self.digest, self.people = name, generator, digest, people
        self.config, self.scenes = config, scenes
        self.refinement = Refine(steps=config.refine, seed=config.seed)

    def __iter__(self) -> Iterator[Contender]:
        layout, decides = self.generator.layout, (self.digest, self.config.seeds)
        yield Contender(self.name, layout, lambda: self.made, decides, traced=True)
        yield Contender(f"{self.name}, shuffled photo", layout, self.shuffled, decides)
        if self.config.refine:
            told, wide = to_dict(self.refinement), self._refined_layout()
            yield Contender(f"{self.name} + refine {self.config.refine}", wide, self.refined, (self.digest, told), True)

    @cached_property
    def made(self) -> Made:
        """Each sitter's photos through the generator, one sitter after the other."""
        seeds, rows = list(range(self.config.seeds)), []
        self.generator.predict(self.people[0].photos, names=self._names(self.people[0]))  # loads what is not yet loaded
        start = time.process_time()
        for person in self.people:
            rows.append(self.generator.predict(person.photos, seeds, names=self._names(person)))
        seconds = (time.process_time() - start) / len(self.people) / len(seeds)
        return Made(torch.stack(rows, 1), seconds)

    @torch.no_grad()
    def of_photos(self, photos: Photos) -> Tensor:
        """Adapters [person, numbers] of people by the first of their usable photos."""
        first = [own[0] for own in photos.usable]
        condition = self.generator.network.mixing(photos.face[first, None], photos.image[first, None])
        rows = [self.generator.rows(self.generator.latents(part, [0] * len(part))) for part in condition.split(256)]
        return torch.cat(rows)

    def shuffled(self) -> Made:
        """Everybody with the adapter of somebody else: half of the list further on."""
        assert self.made.rows is not None
        return Made(self.made.rows.roll(max(1, len(self.people) // 2), 1), self.made.seconds)

    def refined(self) -> Made:
        """The first seed's predictions after a few steps on the photos."""
        assert self.made.rows is not None
        pipeline, start = self.scenes(self.generator.layout).pipeline, time.process_time()
        photos = [person.photos for person in self.people]
        captions = [captions_of(self.generator.image, own) for own in photos]
        rows, layout = refine_rows(pipeline, self.made.rows[0], photos, self.refinement, captions)
        layout.check_same(self._refined_layout(), "Refined adapters")
        return Made(rows[None], self.made.seconds + (time.process_time() - start) / len(self.people))

    def _refined_layout(self) -> Layout:
        layout = self.generator.layout
        return layout if self.refinement.keep_rank else widened(layout, self.refinement.extra_rank)

    @staticmethod
    def _names(person: Sitter) -> list[str]:
        return [f"photo {number + 1} of {person.id!r}" for number in range(person.shown)]


class Personalized:
    """``personalize``'s default, trained for each sitter on the first ``photos`` pictures, many at once through the bank.

    Rows of finished groups are kept in ``out/trained``, so that a run that was stopped goes on.
    """

    def __init__(self, name: str, base: str, people: Sequence[Sitter], photos: int, config: EvaluateConfig) -> None:
        self.name, self.people, self.photos, self.out = name, people, photos, config.out / "trained"
        chosen = PRESETS["default"]
        steps = config.personalize_steps or chosen.train.max_train_steps
        self.recipe = ZooConfig(
            adapter=chosen.adapter,
            train=replace(chosen.train, max_train_steps=steps),
            group=Group(group_size=GROUP, train_batch_size=chosen.data.train_batch_size),
            gate=Gate(judged_pictures=0),
            base=base,
            out=self.out,
        )

    @classmethod
    def rows_of(cls, config: EvaluateConfig, base: str, people: Sequence[Sitter]) -> Iterator[Contender]:
        """The rows of the table that ``config`` asks for."""
        if config.personalize:
            name = "trained on the same photo" if config.photos == 1 else f"trained on the same {config.photos} photos"
            yield cls(name, base, people, config.photos, config).contender()
        if config.personalize_photos:
            count = config.personalize_photos
            yield cls(f"trained on {count} photos", base, people, count, config).contender()

    def contender(self) -> Contender:
        return Contender(self.name, self.trainer.layout, self.make, (self.photos, to_dict(self.recipe)))

    @cached_property
    def trainer(self) -> GroupTrainer:
        return GroupTrainer(self.recipe)

    def make(self) -> Made:
        """All groups, one after the other."""
        parts = [self._group(self.people[at : at + GROUP]) for at in range(0, len(self.people), GROUP)]
        total = sum(seconds for _, seconds in parts)
        return Made(torch.cat([rows for rows, _ in parts])[None], total / len(self.people))

    def _group(self, people: Sequence[Sitter]) -> tuple[Tensor, float]:
        """Rows of some people, and processor seconds for all of them."""
        digests = [(person.id, [hash_of(file) for file in person.files[: self.photos]]) for person in people]
        key = key_of(to_dict(replace(self.recipe, out=Path())), self.trainer.layout.digest, digests)
        path = self.out / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("rows"), float(file.metadata()["seconds"])
        except (OSError, SafetensorError):
            pass
        start, work = time.process_time(), self.out / key
        rows = self._trained(people, work)
        seconds = time.process_time() - start
        replace_file(path, save({"rows": rows}, metadata={"seconds": f"{seconds:.3f}"}))
        shutil.rmtree(work, ignore_errors=True)
        return rows, seconds

    def _trained(self, people: Sequence[Sitter], work: Path) -> Tensor:
        trainer, names, count = self.trainer, [person.id for person in people], self.photos
        shown = [Person(p.id, "test", p.files[:count], p.captions[:count]) for p in people]
        task = GroupTask([trainer.task(person, trainer.encode(person)) for person in shown])
        with trainer.fresh_bank(names) as bank:
            with bank.rows([name for name in names for _ in range(task.batch_size)]):
                trainer.train(task, bank, names, work)
            return torch.stack([trainer.layout.pack(bank.get(name)) for name in names]).float().cpu()


def hash_of(content: bytes) -> str:
    """A short hash of a file."""
    return hashlib.sha256(content).hexdigest()[:16]
