"""Does the class keep looking as it did? Drawings of the class, and of the subject, with each way to preserve.

    python -m benchmarks.preservation    (4 people x 2 words x 4 ways; about 9 processor minutes; resumable, a file a cell in work/)
    python -m benchmarks.preservation --people 3 --words sunglasses --ways base none class    (a part of it)

A subject is taught by LoRA on the embedded base under a word: "sks", which the base's text encoder was taught to ignore, or "sunglasses", which
it knows (all the subject's pictures wear them; the class is people without). Without preservation, with class pictures that the
base drew (prior preservation, half a batch more), and held to the base's own answers to the captions of the class.
Then other scenes are drawn of the class and of the subject, from the noise that the base draws them from. ``drift`` is the mean
distance of the class's drawings from the base's own, in grey levels of 255. The trivial way to have less of it is a weaker adapter: the one
without preservation is drawn at weights of .25, .5 and .75 too, and the "weaker" row is read off this curve where the
subject is as alike as with ``--preservation class``. Intervals: 95 % bootstrap over people, of differences too, which are taken person
by person.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._harness import between, write_result
from benchmarks._portraits import (
    BATCH,
    DRAW_STEPS,
    GUIDANCE,
    PICTURES,
    ROOT,
    STEPS,
    Portraits,
    figure,
    keep_strip,
    kept,
    said,
    unstrip,
)

PEOPLE, SCENES, CLASS_IMAGES, WEIGHTS = 4, 8, 16, (0.25, 0.5, 0.75)
WORDS = ("sunglasses", "sks")
WAYS = {
    "base": "the base",
    "none": "no preservation",
    "class": "the base's answers (`--preservation class`)",
    "prior": "class pictures (`--with-prior-preservation`)",
}
SCORES = ("class_identity", "class_drift", "class_caption", "subject_identity", "subject_caption")
CELLS, PAGE = ROOT / "work" / "preservation_bench", ROOT / "docs" / "personalize.md"
SHEET = ROOT / "docs" / "results" / "preservation.png"


class Bench(Portraits):
    """Subjects under a word, and scenes that nobody was taught."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(12)
        self.scenes = [self.world.sample_scene(rng) for _ in range(SCENES)]
        self.drawn: dict[tuple[str, int], list[Image.Image]] = {}

    def told(self, word: str, scenes: Sequence[Any]) -> dict[str, tuple[list[Any], list[str]]]:
        """The ``scenes`` of the class and of the subject, and their captions."""
        from smidgen.tasks.data.images import bind

        if word == "sks":
            captions = list(map(self.world.caption, scenes))
            return {"class": (list(scenes), captions), "subject": (list(scenes), bind(captions, "person", word))}
        plain = [replace(s, glasses="none", eyes="open" if s.eyes == "hidden" else s.eyes) for s in scenes]
        worn = [replace(s, glasses="sunglasses", eyes="hidden") for s in scenes]
        return {kind: (own, list(map(self.world.caption, own))) for kind, own in (("class", plain), ("subject", worn))}

    def cell(self, word: str, way: str, person: int) -> dict[str, float]:
        """Learn a person in the ``way`` under the ``word``, draw, score."""
        people, task, began = *self._task(word, way, person), time.process_time()
        self.learn(task, person)
        figures = {"cpu_seconds": time.process_time() - began}
        figures |= self._scores(word, way, person, people)
        if way == "none":
            import smidgen

            for weight in WEIGHTS:
                smidgen.set_strength(self.base.model, weight)
                found = self._scores(word, way, person, people)
                figures |= {f"{name}_at_{weight}": value for name, value in found.items()}
        return figures

    def _scores(self, word: str, way: str, person: int, people: list) -> dict[str, float]:
        figures, shown = {}, []
        for kind, (scenes, captions) in self.told(word, self.scenes).items():
            images = self.draw(captions, person)
            found = self.scores(images, scenes, people)
            figures |= {f"{kind}_{name}": found[name] for name in ("identity", "caption")}
            shown += images[: SCENES // 2]
            if kind == "class":
                figures["class_drift"] = self._drift(word, person, images)
        path = CELLS / f"{word}-{way}-{person}.png"
        if not path.exists():  # weaker ones are not shown
            keep_strip(path, shown)
        return figures

    def _drift(self, word: str, person: int, images: list[Image.Image]) -> float:
        """Grey levels between ``images`` of the class and the base's own, which are drawn before any adapter's."""
        path = CELLS / f"{word}-class-of-base-{person}.png"
        if not path.exists():
            keep_strip(path, images)
        pairs = zip(images, unstrip(path), strict=True)
        return float(np.mean([np.abs(np.subtract(*map(np.float64, pair))).mean() for pair in pairs]))

    def _task(self, word: str, way: str, person: int) -> tuple[list, Any]:
        """The pictures of ``person``, and the task."""
        from smidgen.tasks.data.images import load_picture, read_folder
        from smidgen.tasks.diffusion.scenes import Scenes
        from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples, encode_prior
        from smidgen.training.randomness import derive

        base, size = self.base, self.base.resolution
        identity = self.world.sample_identity(np.random.default_rng(1000 + person), "test")
        rng = np.random.default_rng(person)
        told = self.told(word, [self.world.sample_scene(rng) for _ in range(PICTURES)])
        with tempfile.TemporaryDirectory() as folder:
            scenes, captions = told["subject"]
            drawn = [self.world.render(identity, scene) for scene in scenes]
            self.world.write_folder(folder, zip(drawn, captions, strict=True))
            found = read_folder(folder)
            pictures = [load_picture(picture.path, size) for picture in found.pictures]
            if way == "base":
                return pictures, None
            subject = encode_examples(base, found.pictures, found.captions, size)
            options: dict[str, Any] = {}
            captions = told["class"][1]
            if way == "prior":
                self.learn(None, person)
                seeds = tuple(derive(person, "prior", number) for number in range(CLASS_IMAGES))
                about = tuple(captions[number % PICTURES] for number in range(CLASS_IMAGES))
                asked = Scenes(about, seeds, DRAW_STEPS, GUIDANCE, size)
                prior = encode_prior(base, asked, Path(folder) / "latents.safetensors", "embedded")
                options = {"prior": prior, "prior_batch_size": BATCH // 2}
            elif way == "class":
                options["preserved"] = base.encode_prompts(captions)
        return pictures, PersonalizeTask(subject, base, batch_size=BATCH, seed=person, **options)


def weaker(base: dict[str, float], full: dict[str, float], alike: float) -> dict[str, float]:
    """Scores of the adapter ``full`` made so weak that its subject is as ``alike`` as asked: between the weights that were drawn."""
    at = [base, *({name: full[f"{name}_at_{weight}"] for name in SCORES} for weight in WEIGHTS), full]
    likeness = np.maximum.accumulate([found["subject_identity"] for found in at])
    return {name: float(np.interp(alike, likeness, [found[name] for found in at])) for name in SCORES}


def table(figures: dict[str, Any], word: str) -> str:
    """What the page shows of a word."""
    from smidgen.tasks.cards import table

    ways = {way: text for way, text in WAYS.items() if f"{word}_{way}_class_drift" in figures}
    rows = {**ways, "weaker": "no preservation, adapter as weak as that", "class_less_none": "the base's answers - no preservation",
            "class_less_weaker": "the base's answers - the weak adapter"}  # fmt: skip
    head = [f"taught as {word!r}", "class: identity", "class: grey levels off the base", "class: captions", "subject: identity",
            "subject: captions"]  # fmt: skip
    return table(
        head, [[text, *(said(figures, f"{word}_{way}_{name}") for name in SCORES)] for way, text in rows.items()]
    )


def sheet(words: Sequence[str], ways: Sequence[str]) -> None:
    """The first person's drawings, word by word."""
    from smidgen.tasks.contact_sheet import Row, contact_sheet

    rows = [Row(way, unstrip(CELLS / f"{word}-{way}-0.png"), word) for word in words for way in ways]
    half, title = SCENES // 2, "One person, taught under a word, and the class"
    columns = ["the class"] * half + ["the subject"] * half
    contact_sheet(title, rows, columns).save(SHEET, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--words", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first three are needed")
    asked = parser.parse_args(arguments)
    people, bench = range(asked.people), []

    def made(word: str, way: str, person: int) -> dict[str, float]:
        bench.extend([] if bench else [Bench()])
        return bench[0].cell(word, way, person)

    cells = [(word, way, person) for word in asked.words for person in people for way in asked.ways]
    found = {cell: kept(CELLS / "{}-{}-{}.json".format(*cell), lambda cell=cell: made(*cell)) for cell in cells}  # type: ignore[misc]
    figures: dict[str, Any] = {"people": len(people), "seeds": 1, "steps": STEPS, "batch": BATCH, "scenes": SCENES}
    for word in asked.words:
        own = {way: [found[word, way, person] for person in people] for way in asked.ways}
        likeness = [scores["subject_identity"] for scores in own["class"]]
        own["weaker"] = [weaker(*three) for three in zip(own["base"], own["none"], likeness, strict=True)]
        for way, cells_of in own.items():
            for name in SCORES:
                figures |= figure(f"{word}_{way}_{name}", [scores[name] for scores in cells_of])
            if way not in ("base", "weaker"):
                figures[f"{word}_{way}_cpu_seconds"] = round(float(np.mean([s["cpu_seconds"] for s in cells_of])), 1)
        for other in ("none", "weaker"):
            for name in SCORES:
                less = [one[name] - two[name] for one, two in zip(own["class"], own[other], strict=True)]
                figures |= figure(f"{word}_class_less_{other}_{name}", less)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    write_result("preservation", figures, f"python -m benchmarks.preservation {given}".strip())
    between(PAGE, "preservation", "\n\n".join(table(figures, word) for word in asked.words))
    sheet(asked.words, asked.ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
