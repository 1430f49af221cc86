"""Evaluate generators on a zoo's held-out people, beside everything simpler. Read from top to bottom.

    report = evaluate(Path("zoo"), EvaluateConfig(generator=(Path("generator"),), out=Path("evaluation")))

Every contender gives an adapter for each sitter from the same photos, the same scenes are drawn with each from the same
noise, and a judge that no contender has seen scores the pictures. A contender that was scored under the same conditions is
not drawn again, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from smidgen.bases.judging import Judge
from smidgen.difflora.generator.generator import JSON, SHIPPED, Generator, load_generator
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import read_pictures
from smidgen.errors import BaseLockError, ConfigError
from smidgen.lab.audit.contenders import Contender, Made, Simple
from smidgen.lab.audit.distances import comparable, distances, nearest
from smidgen.lab.audit.learned import Personalized, Predicted
from smidgen.lab.audit.memorisation import memorised, write_memorisation
from smidgen.lab.audit.people import Sitter, sitters, subjects
from smidgen.lab.audit.report import REAL, Report, write_report
from smidgen.lab.audit.scenes import AuditScenes, Drawn, difference
from smidgen.lab.audit.scores import Score, Scores, key_of
from smidgen.lab.audit.settings import EvaluateConfig
from smidgen.tasks.data.images import load_picture
from smidgen.training.alone import runs_alone
from smidgen.training.settings import to_dict

if TYPE_CHECKING:
    from PIL.Image import Image


@runs_alone
def evaluate(folder: Path, config: EvaluateConfig, judge: Judge | None = None, progress: bool = True) -> Report:
    """Scores all contenders on the zoo in ``folder`` and writes ``config.out``.

    Args:
        judge: who scores; None: the base's own.

    Raises:
        DataError: no zoo, nobody held out, no pictures, no face, a damaged file.
        BaseLockError: a generator for another base than the zoo's, or a zoo of another base than this machine's.
        ConfigError: nobody can judge pictures of this base.
    """
    audit = Audit(folder, config, judge, progress)
    for contender in audit.bar(audit.contenders()):
        audit.score(contender)
    return write_report(audit.report(), config.out)


class Audit:
    """Zoo, sitters, contenders and scores of one evaluation."""

    def __init__(self, folder: Path, config: EvaluateConfig, judge: Judge | None, progress: bool) -> None:
        self.zoo, self.config, self.progress = Zoo(folder), config, progress
        self.subjects = subjects(self.zoo)
        self.base = str(self.zoo.settings["base"])
        self.generators = named_generators(config.generator)
        for name, (generator, _) in self.generators.items():
            check_base(self.zoo, name, generator)
        self.judge = judge
        self.loaded: dict[str, AuditScenes] = {}
        scenes = self.scenes(self.zoo.layout)
        self.people = sitters(self.zoo, config.people, config.photos, scenes.pipeline.base.resolution)
        least = min(len(person.pictures) for person in self.people)
        if config.personalize_photos > least:
            raise ConfigError(
                f"There are {least} pictures of each person, not {config.personalize_photos} to train on."
            )
        first = next(iter(self.generators.values()))[0]
        self.simple = Simple(
            self.zoo, self.people, config, (first.face, first.image), scenes.pipeline.base.resolution,
            config.out / "features", progress,
        )  # fmt: skip
        self.predicted = [
            Predicted(name, generator, digest, self.people, config, self.scenes)
            for name, (generator, digest) in self.generators.items()
        ]
        self.scores = Scores(config.out)
        self.keys: dict[str, str] = {}  # of each contender, in the order of the table
        shared = to_dict(replace(config, out=Path(), generator=()))
        told = {name: shared[name] for name in ("photos", "drawing", "seed")}
        self.conditions = (self.zoo.digest(), self.judge_name, [person.id for person in self.people], told)
        self.score_real(scenes)

    @property
    def judge_name(self) -> str:
        assert self.judge is not None
        return self.judge.name

    def scenes(self, layout: Layout) -> AuditScenes:
        """Where adapters of ``layout`` are drawn; the last two are kept loaded."""
        if layout.digest not in self.loaded:
            while len(self.loaded) > 1:
                self.loaded.pop(next(iter(self.loaded)))
            scenes = AuditScenes(self.base, layout, self.judge, self.config.drawing, self.config.seed)
            self.judge, self.loaded[layout.digest] = scenes.judge, scenes
        return self.loaded[layout.digest]

    def contenders(self) -> list[Contender]:
        """All of them, in the order of the table."""
        found = [*self.simple, *Personalized.rows_of(self.config, self.base, self.people)]
        return found + [contender for one in self.predicted for contender in one]

    def bar(self, contenders: Sequence[Contender]) -> Iterator[Contender]:
        """The contenders under a progress bar that names the one at work."""
        from tqdm.auto import tqdm

        with tqdm(contenders, unit="contender", disable=not self.progress, dynamic_ncols=True) as bar:
            for contender in bar:
                bar.set_description(contender.name)
                yield contender

    # ---- one contender -----------------------------------------------------------------------------------------------

    def score(self, contender: Contender) -> None:
        """Draws and scores a contender, unless its lines are there."""
        key = key_of(self.conditions, contender.name, contender.layout.digest, contender.decides)
        self.keys[contender.name] = key
        if self.scores.has(key):
            return
        made, scenes = contender.make(), self.scenes(contender.layout)
        drawn = self._drawn(scenes, made)
        near = self._neighbours(contender, made)
        cost: dict[str, Any] = {"seconds": made.seconds}
        if made.rows is not None:
            cost |= {"numbers": contender.layout.size, "bytes": scenes.bytes}
        lines = []
        for number, person in enumerate(self.people):
            own = [pictures[number] for pictures in drawn]
            known = {"contender": contender.name, "key": key, "person": person.id} | cost
            known |= self._judged(scenes, own, person)
            if near:
                known |= {"neighbour": near[number], "neighbour_identity": self._likeness(scenes, own[0], near[number])}
            lines.append(Score(**known))
        self.scores.add(lines, [pictures[0] for pictures in drawn[0]])

    def score_real(self, scenes: AuditScenes) -> None:
        """The photos themselves: as alike as real pictures of one person are."""
        self.judge = scenes.judge
        key = self.keys[REAL] = key_of(self.conditions, REAL)
        if self.scores.has(key):
            return
        lines = []
        for person in self.people:
            texts = [scenes.texts[0]] * person.shown  # what they show was not asked for: no caption score
            found = scenes.judge.scores(person.photos, texts, person.others)
            lines.append(Score(REAL, key, person.id, found["identity"], traits=found.get("traits")))
        self.scores.add(lines, [person.photos[0] for person in self.people])

    def _drawn(self, scenes: AuditScenes, made: Made) -> list[Drawn]:
        """Pictures [chance][sitter][prompt]."""
        if made.rows is None:
            return [[scenes.base_pictures] * len(self.people)]
        drawn = scenes.draw(made.rows.flatten(0, 1))
        return [drawn[at : at + len(self.people)] for at in range(0, len(drawn), len(self.people))]

    def _judged(self, scenes: AuditScenes, own: Drawn, person: Sitter) -> dict[str, Any]:
        """Scores of one sitter's pictures [chance][prompt]."""
        base, base_unrelated = scenes.split(scenes.base_pictures)
        parts = [scenes.split(pictures) for pictures in own]
        found = [scenes.scores(shown, person.others) for shown, _ in parts]
        scores: dict[str, Any] = {
            n: mean(f[n] for f in found) for n in ("identity", "caption", "traits") if n in found[0]
        }
        scores["moved"] = mean(difference(shown, base) or 0.0 for shown, _ in parts)
        if base_unrelated:
            scores["unrelated"] = mean(difference(others, base_unrelated) or 0.0 for _, others in parts)
        if len(parts) > 1:
            scores["diversity"] = mean(difference(a, b) or 0.0 for (a, _), (b, _) in combinations(parts, 2))
        return scores

    def _neighbours(self, contender: Contender, made: Made) -> list[str]:
        """Each sitter's training identity nearest in weights."""
        if not contender.traced or made.rows is None or not comparable(contender.layout, self.zoo.layout):
            return []
        found = distances(made.rows[0], contender.layout, self.simple.training, self.zoo.layout)
        return [self.simple.rows.ids[place] for place in nearest(found, 1)[1][:, 0].tolist()]

    def _likeness(self, scenes: AuditScenes, pictures: Sequence[Image], name: str) -> float:
        """Identity score of pictures beside a training person's own."""
        files = read_pictures(self.zoo.folder, self.subjects[name])
        own = [load_picture(io.BytesIO(content), scenes.pipeline.base.resolution) for content in files]
        return scenes.scores(pictures, own)["identity"]

    # ---- what comes of it --------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The scores of all contenders, in the order of the table."""
        lines = {name: self.scores.lines[key] for name, key in self.keys.items()}
        shown = {name: self.scores.shown(key) for name, key in self.keys.items()}
        first = self.predicted[0].name
        found = [memorised(self.simple, one, lines) for one in self.predicted]
        note = write_memorisation(found, self.simple, self.predicted, self.config.out)
        return Report(self.zoo.folder, self.config, self.judge_name, first, lines, shown, (note,))


def named_generators(folders: Sequence[Path]) -> dict[str, tuple[Generator, str]]:
    """Name in the table -> generator, and the hash of its files; the shipped one when there are none.

    Raises:
        ConfigError: two folders are the same.
    """
    found: dict[str, tuple[Generator, str]] = {}
    if twice := [str(folder) for folder, count in Counter(f.resolve() for f in folders).items() if count > 1]:
        raise ConfigError(f"The generator {twice[0]} is given twice.")
    for folder in folders or (None,):
        where = SHIPPED if folder is None else folder
        name = "shipped" if folder is None else where.resolve().name
        if f"DiffLoRA ({name})" in found:
            name = str(where)
        generator = load_generator(folder)
        digest = hashlib.sha256((where / JSON).read_bytes() + generator.layout.to_json().encode())
        codec = where / "codec" / "codec.json"
        digest.update(codec.read_bytes() if codec.exists() else b"")
        found[f"DiffLoRA ({name})"] = generator, digest.hexdigest()
    return found


def check_base(zoo: Zoo, name: str, generator: Generator) -> None:
    """Raises BaseLockError unless the generator's adapters belong to the zoo's base."""
    mine, theirs = zoo.layout.base["sha256"], generator.layout.base["sha256"]
    if mine != theirs:
        raise BaseLockError(
            f"{name} makes adapters for another base (weights {theirs[:12]}) than {zoo.folder} holds ({mine[:12]}): train a "
            "generator on the zoo's base, or evaluate it on a zoo of its own."
        )
