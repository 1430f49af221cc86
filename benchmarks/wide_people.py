"""A generator of people of the wide world: from one photo of a held-out person an adapter on the wide base, judged beside everything
simpler.

    python -m benchmarks.wide_people    (64 people; about 25 processor minutes; resumable)

Each person is drawn in three scenes that hide nothing (no hat, normal light, the plain style) and in one scene of any kind, which counts
for captions alone. The judge of the wide world reads words and says how alike people are; everything else is pixels beside true drawings
(``_true_drawings``), which nothing trains on; rank-1 is that of one drawing alone. Contenders that are no adapters are drawings:

real                     the true drawing
autoencoder              the true drawing, encoded and decoded by the base
words                    a perfect drawing of the person with the named colours that are nearest: all that words can say
nearest training person  a perfect drawing of the training person whose photo the encoder sees as most alike

``trained on 24 pictures`` is what the base and an adapter of this size can do at all: from the prediction on, 300 steps on 24 true drawings of
the person with their captions (no contender from one photo). ``mean`` is the adapter of the mean latent of training people, ``another's photo`` the generator's from the next person's photo. Photos show the
whole person; ``inverted`` is the prediction after 30 steps on that photo (`smidgen invert`); ``moved photo`` is the same 0.8 to 1.25 times as large and a tenth off the middle, ``any photo`` one of any scene, and ``held-out
colours`` are 32 people with hair or skin of the ranges of colours that no training person has. Intervals: 95 % bootstrap over people.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._harness import between, write_result
from benchmarks._portraits import ROOT, interval
from benchmarks._true_drawings import halos, hard_set, lab_errors, rank_1
from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import EMBEDDED_WIDE, colors, wide
from smidgen.bases.embedded.wide_judge import load_wide_judge
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.generator import Generator, load_generator, shipped
from smidgen.difflora.generator.people import photos_of
from smidgen.difflora.generator.reading import moved
from smidgen.difflora.use.invert import invert
from smidgen.difflora.use.refine import Refine, captions_of, refine_rows
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import TABLE, make_subjects, read_subjects
from smidgen.tasks.data.images import to_tensor
from smidgen.training.randomness import derive

SEED, PLAIN, ANY, RANGE = 61, 3, 1, 32  # scenes that hide nothing, scenes of any kind, people of held-out colours
OWN_PICTURES, OWN_STEPS = 24, 300  # of a person, and the steps that an adapter is trained on them
PAGE, SHEET = ROOT / "docs" / "results" / "wide_people.md", ROOT / "docs" / "results" / "wide_people.png"
Pictures = list[list[Image.Image]]
JUDGED = ("hair", "facial_hair", "brows")
MEASURES = {
    "identity": "identity", "hair": "hair", "facial_hair": "facial hair", "brows": "eyebrows", "caption": "caption", "rank-1": "rank-1",
    "hard set": "hard set", "beard": "beard by pixels", "hair Lab": "hair, Lab", "skin Lab": "skin, Lab",
    "free hair Lab": "free hair, Lab", "free skin Lab": "free skin, Lab", "halo": "halo, Lab",
}  # fmt: skip


class People:
    """Held-out people with the scenes that they are drawn in, and their photos."""

    def __init__(self, count: int, split: str = "test") -> None:
        rng = np.random.default_rng(derive(SEED, "people", split))
        self.people: list[Any] = [wide.sample_identity(rng, split) for _ in range(count)]  # type: ignore[arg-type]
        self.scenes = [[_plain(rng, p) for _ in range(PLAIN)] + [wide.sample_scene(rng, p) for _ in range(ANY)] for p in self.people]  # fmt: skip
        self.photos = [wide.render(person, _plain(rng, person)) for person in self.people]
        self.any = [wide.render(person, wide.sample_scene(rng, person)) for person in self.people]
        self.moved = [moved(photo, rng) for photo in self.photos]
        self.shown = [own[:PLAIN] for own in self.scenes]
        self.judge = load_wide_judge()

    @property
    def drawings(self) -> Pictures:
        """True ones, of everybody in every scene."""
        return [[wide.render(p, scene) for scene in own] for p, own in zip(self.people, self.scenes, strict=True)]

    @property
    def in_words(self) -> Pictures:
        """True drawings of everybody with the nearest named colours."""
        near = [_in_words(person) for person in self.people]
        return [[wide.render(p, scene) for scene in own] for p, own in zip(near, self.scenes, strict=True)]

    @cached_property
    def others(self) -> Pictures:
        """Other true drawings of everybody, whom drawings are to be like."""
        rng = np.random.default_rng(derive(SEED, "others"))
        return [[wide.render(person, _plain(rng, person)) for _ in range(3)] for person in self.people]

    def scores(self, pictures: Pictures) -> dict[str, list[float]]:
        """Every measure of each person; NaN where there is nothing to measure."""
        plain = [row[:PLAIN] for row in pictures]
        found: dict[str, list[float]] = {name: [] for name in ("identity", "caption", *JUDGED)}
        for person, scenes, row, others in zip(self.people, self.scenes, pictures, self.others, strict=True):
            found["identity"].append(float(self.judge.identity_score(row[:PLAIN], others).mean()))
            found["caption"].append(float(self.judge.caption_score(row, scenes)["mean"]))
            read = self.judge.read(row[:PLAIN])
            for name in JUDGED:
                seen = [wide.seen(person, scene)[name] for scene in scenes[:PLAIN]]
                right = [word == getattr(person, name) for word, there in zip(read[name], seen, strict=True) if there]
                found[name].append(float(np.mean(right)) if right else float("nan"))
        arguments = (plain, self.people, self.shown)
        found |= {"hard set": hard_set(*arguments), "halo": halos(*arguments)}
        found["rank-1"] = rank_1([row[:1] for row in plain], self.people, [own[:1] for own in self.shown])
        found["beard"] = hard_set(*arguments, ["facial_hair"])
        for name, attribute in (("hair", "hair_color"), ("skin", "skin")):
            errors = lab_errors(*arguments, attribute)
            free = [getattr(person, attribute).startswith("#") for person in self.people]
            found[f"{name} Lab"] = errors
            found[f"free {name} Lab"] = [e if f else float("nan") for e, f in zip(errors, free, strict=True)]
        return found


def _plain(rng: np.random.Generator, person: Any) -> Any:
    """A scene that hides nothing of a person: no hat, normal light, plain style, glasses through which one sees."""
    scene = wide.sample_scene(rng, person)
    while (
        scene.style != "plain" or scene.hat != "none" or scene.glasses == "sunglasses" or scene.framing == "miniature"
    ):
        scene = wide.sample_scene(rng, person)
    return wide.Scene(**(scene.as_dict() | {"light": "normal"}))


def _in_words(person: Any) -> Any:
    words = person.as_dict()
    for name in wide.FREE:
        words[name] = colors.nearest(colors.lab(str(wide.color_of(person, name))), wide.ATTRIBUTES[name])[0]
    return wide.Identity(**words)


@torch.no_grad()
def draw(pipeline: AdaptedPipeline, rows: Tensor | None, people: People, batch: int = 40) -> Pictures:
    """Everybody in their own scenes with their own adapter of ``rows`` [people, numbers], or [1, numbers] for all; None: the base."""
    base, count = pipeline.base, PLAIN + ANY
    flat = [scene for own in people.scenes for scene in own]
    prompts, negative = base.encode_prompts([wide.caption(scene) for scene in flat]), base.encode_prompts([""])
    sampling = {"steps": base.sampling.steps, "guidance": base.sampling.guidance, "negative": negative}
    images: list[Image.Image] = []
    with pipeline.banked() as bank:
        for start in range(0, len(flat), batch):
            places = list(range(start, min(start + batch, len(flat))))
            own = [None if rows is None else (place // count) % len(rows) for place in places]
            seeds = [derive(SEED, "noise", place) for place in places]
            held = bank.rows(own) if rows is None else bank.holding(pipeline.layout.unpack(rows), own, copies=True)
            with held:
                latents = base.draw_latents(prompts[places], seeds, batch=batch, **sampling)
            images += base.decode(latents, batch)
    return [images[start : start + count] for start in range(0, len(flat), count)]


def predicted(generator: Generator, photos: Sequence[Image.Image]) -> Tensor:
    """Adapters [people, numbers] of one photo each."""
    return torch.cat([generator.predict([photo]) for photo in photos])


def inverted(generator: Generator, pipeline: AdaptedPipeline, photos: Sequence[Image.Image]) -> Tensor:
    """The same after `smidgen invert`: the latent alone trained on the photo, under the caption that the encoder reads in it."""
    own = [invert(generator, pipeline, [photo], captions=captions_of(generator.image, [photo]))[0] for photo in photos]
    return generator.rows(torch.stack(own))


def trained_on_many(generator: Generator, pipeline: AdaptedPipeline, people: People) -> Tensor:
    """Adapters [people, numbers], each trained from the prediction on true drawings of its person in scenes of any kind."""
    rng = np.random.default_rng(derive(SEED, "many"))
    scenes = [[wide.sample_scene(rng, person) for _ in range(OWN_PICTURES)] for person in people.people]
    pictures = [[wide.render(p, scene) for scene in own] for p, own in zip(people.people, scenes, strict=True)]
    config = Refine(steps=OWN_STEPS, keep_rank=True, timesteps=(0.0, 1.0), batch_size=2)
    captions = [[wide.caption(scene) for scene in own] for own in scenes]
    return refine_rows(pipeline, predicted(generator, people.photos), pictures, config, captions)[0]


def mean_person(generator: Generator, training: Path) -> Tensor:
    """The adapter [1, numbers] of the mean latent of 256 training people's first photos."""
    people = [person for person in read_subjects(training) if person.split == "train"][:256]
    photos = [Image.open(training / person.pictures[0]).convert("RGB") for person in people]
    latents = torch.cat([generator.latents(generator.condition([photo]), [0]) for photo in photos])
    return generator.rows(latents.mean(0, keepdim=True))


def nearest_people(generator: Generator, training: Path, people: People) -> Pictures:
    """Perfect drawings of the training person whose photo's features are nearest, in deviations of training photos."""
    known = [person for person in read_subjects(training) if person.split == "train"]
    photos = photos_of(training, known, generator.face, generator.image, 64, False, training / "nearest")
    owners = [number for number, own in enumerate(photos.usable) for _ in own]
    features = photos.face[[place for own in photos.usable for place in own]]
    width = features.std(0)
    nearest = torch.cdist(generator.face.encode(people.photos) / width, features / width).argmin(1)
    found = [wide.Identity(**known[owners[int(at)]].attributes) for at in nearest]
    return [[_drawn(one, scene) for scene in own] for one, own in zip(found, people.scenes, strict=True)]


def _drawn(person: Any, scene: Any) -> Image.Image:
    """The person in the scene, in the plain style where the other one has no parts for them."""
    able = scene.style in wide.styles_for(person)
    return wide.render(person, scene if able else wide.Scene(**(scene.as_dict() | {"style": "plain"})))


def read_words(generator: Generator, people: People, photos: Sequence[Image.Image]) -> list[float]:
    """The share of each person's words that the encoder reads right of a photo: hair, facial hair, and colours within 20 of
    Lab."""
    face: Any = generator.face
    read, seen = face.read(photos), face.see(photos)
    found = []
    for number, person in enumerate(people.people):
        right = [
            max(read[name], key=lambda w, n=name: read[n][w][number]) == getattr(person, name) for name in JUDGED[:2]
        ]
        for name in wide.FREE:
            if name == "hair_color" and person.hair == "bald" and person.facial_hair == "none":
                continue
            there = seen.colors[number, wide.COLORS.index(name)].numpy()
            right.append(bool(np.linalg.norm(there - colors.lab(str(wide.color_of(person, name)))) <= 20))
        found.append(float(np.mean(right)))
    return found


class Contest:
    """Contenders scored once each; scores and pictures are kept in ``work``."""

    def __init__(self, work: Path, generator: Generator) -> None:
        self.work, self.digest = work, generator.digest[:12]
        self.found: dict[str, dict[str, list[float]]] = {}
        self.pipeline = AdaptedPipeline.load(EMBEDDED_WIDE, generator.layout)

    def score(self, name: str, make: Callable[[], Pictures | Tensor | None], people: People) -> None:
        path = self.path(name, people).with_suffix(".json")
        if not path.is_file():
            made = make()
            pictures = made if isinstance(made, list) else draw(self.pipeline, made, people)
            sheet(path.with_suffix(".png"), people, {name: pictures})
            replace_file(path, json.dumps(people.scores(pictures)))
        self.found[name] = json.loads(path.read_text())
        print(name, {m: round(float(np.nanmean(v)), 3) for m, v in self.found[name].items()}, flush=True)

    def path(self, name: str, people: People) -> Path:
        """Where a contender's scores and pictures are, without an ending."""
        return self.work / (self.digest if name in OWN else "without") / f"{len(people.people)}" / name

    def decoded(self, drawings: Pictures) -> Pictures:
        """Drawings as the base's autoencoder gives them back."""
        base = self.pipeline.base
        return [base.decode(base.encode_images(to_tensor(row))[0]) for row in drawings]


def sheet(path: Path, people: People, drawn_by: dict[str, Pictures], count: int = 10) -> None:
    """A row for each of the first people: the photo, and for each scene the true drawing beside what was drawn."""
    size, columns = 64, 1 + PLAIN * (1 + len(drawn_by))
    canvas = Image.new("RGB", (size * columns, size * count), "white")
    for y in range(min(count, len(people.people))):
        row = [people.photos[y]]
        for number in range(PLAIN):
            row += [wide.render(people.people[y], people.scenes[y][number]), *(p[y][number] for p in drawn_by.values())]
        for x, image in enumerate(row):
            canvas.paste(image, (x * size, y * size))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.resize((canvas.width * 3 // 2, canvas.height * 3 // 2), Image.Resampling.LANCZOS).quantize(256).save(
        path, optimize=True
    )


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The page's table."""
    lines = [f"| | {' | '.join(MEASURES.values())} |", "|---" * (1 + len(MEASURES)) + "|"]
    for name, scores in found.items():
        cells = []
        for measure in MEASURES:
            values = [value for value in scores[measure] if value == value]
            low, high = interval(values) if values else (0, 0)
            digits = 1 if measure.endswith("Lab") or measure == "halo" else 2
            cells.append(f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_of(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, scores in found.items():
        for measure, given in scores.items():
            values = [value for value in given if value == value]
            if values:
                figures[f"{name}: {measure}"] = round(float(np.mean(values)), 4)
                figures[f"{name}: {measure}_interval"] = interval(values)
    return figures


def contenders(
    contest: Contest, generator: Generator, training: Path, people: People, away: People
) -> dict[str, tuple[Callable[[], Any], People]]:
    """Name -> what makes pictures or adapters, and whose."""
    after = people.photos[1:] + people.photos[:1]
    return {
        "real": (lambda: people.drawings, people),
        "autoencoder": (lambda: contest.decoded(people.drawings), people),
        "words": (lambda: people.in_words, people),
        "base": (lambda: None, people),
        "nearest training person": (lambda: nearest_people(generator, training, people), people),
        "words, held-out colours": (lambda: away.in_words, away),
        "mean": (lambda: mean_person(generator, training), people),
        "another's photo": (lambda: predicted(generator, after), people),
        "trained on 24 pictures": (lambda: trained_on_many(generator, contest.pipeline, people), people),
        "generator": (lambda: predicted(generator, people.photos), people),
        "generator, inverted": (lambda: inverted(generator, contest.pipeline, people.photos), people),
        "generator, moved photo": (lambda: predicted(generator, people.moved), people),
        "generator, any photo": (lambda: predicted(generator, people.any), people),
        "generator, held-out colours": (lambda: predicted(generator, away.photos), away),
    }


OWN = ("mean", "another's photo", "trained on 24 pictures", "generator", "generator, inverted", "generator, moved photo", "generator, any photo", "generator, held-out colours")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument(
        "--generator", type=Path, default=shipped(EMBEDDED_WIDE), help="the one that ships, or another folder"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "wide_people")
    run(parser.parse_args())


def run(given: argparse.Namespace) -> None:
    """Scores all and writes results, table and sheet."""
    torch.set_num_threads(1)
    generator = load_generator(given.generator)
    training = given.work / "training"
    if not (training / TABLE).exists():
        make_subjects(training, Subjects(people=2000, held_out=0, pictures=1, same_scenes=False, people_seed=1), wide)
    people, away = People(given.people), People(min(RANGE, given.people), "range")
    contest = Contest(given.work, generator)
    for name, (make, own) in contenders(contest, generator, training, people, away).items():
        contest.score(name, make, own)
    figures: dict[str, Any] = {"people": given.people, "numbers": generator.layout.size, **figures_of(contest.found)}
    for name, photos in (("photos", people.photos), ("moved photos", people.moved)):
        read = read_words(generator, people, photos)
        figures |= {
            f"words read of {name}": round(float(np.mean(read)), 4),
            f"words read of {name}_interval": interval(read),
        }
        print(f"words read of {name}", figures[f"words read of {name}"], flush=True)
    write_result("wide_people", figures, "python -m benchmarks.wide_people")
    between(PAGE, "wide_people", table(contest.found))
    shutil.copyfile(contest.path("generator", people).with_suffix(".png"), SHEET)


if __name__ == "__main__":
    main()
