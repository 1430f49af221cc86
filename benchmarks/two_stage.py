"""The two stages inside one basis, judged on people that nothing has seen, from one photo each.

    python -m benchmarks.two_stage --work work/two_stage

Trains the preset two-stage twice on the same people: in a basis that is learnt with their latents (an auto-decoder, no encoder of
photos takes part) and in the shipped generator's. Every round of both stands beside the training people's mean, the training person
whose photo is the most alike, ridge from features to latents, and two adapters that the person trained on all their pictures: their
own latent in the same basis, and a LoRA alone, each for the zoo's steps. Identity and captions are the judge's; rank-1, hard set and
Lab errors (``_true_drawings``) know no network. What ships is measured after `smidgen invert` too. Rows of 256 held-out people,
the 64 among them, tell more closely. Killed, it goes on: trainings from their checkpoints, scores from those that are there. ``--paper FOLDER``
adds a row for a generator of the preset paper. Seconds are of one processor core, those of a killed run without what the kill lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import RESULTS, between, write_result
from benchmarks._true_drawings import hard_set, lab_errors, rank_1
from benchmarks.wide_people import inverted
from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import world
from smidgen.bases.embedded.base import GUIDANCE
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.fit import fit
from smidgen.difflora.generator.generator import Generator, load_generator
from smidgen.difflora.generator.latent_zoo import LatentTable, ZooTask, read_latents
from smidgen.difflora.generator.people import Photos, people_of
from smidgen.difflora.generator.settings import PRESETS, GeneratorConfig
from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.zoo.settings import Subjects, ZooConfig, rates
from smidgen.difflora.zoo.subjects import TABLE, make_subjects, read_subjects
from smidgen.lab.audit.regression import choose_strength, ridge
from smidgen.lab.audit.statistics import bootstrap
from smidgen.tasks.data.images import load_picture
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.loop import train
from smidgen.training.randomness import derive

PAGE = Path(__file__).parents[1] / "docs" / "difflora_generator.md"
KINDS = {"learned": "a basis learnt with the zoo", "shipped": "the shipped generator's basis"}
ORDER = (
    "base model",
    "LoRA",
    *(f"{kind}, " for kind in KINDS),
    "shipped generator",
    "paper",
)  # of contenders in the table
MEASURES = ("identity", "caption", "rank-1", "hard set", "hair Lab", "skin Lab")
MANY = 256  # held-out people of the rows that tell more closely


def config_of(kind: str, given: argparse.Namespace, rounds: int) -> GeneratorConfig:
    """The preset two-stage with the benchmark's sizes."""
    preset = PRESETS["two-stage"]
    stage, diffusion = preset.shared_basis, preset.two_stage.train
    assert stage is not None
    diffusion = replace(diffusion, max_train_steps=_of(kind, given, "diffusion_steps") or diffusion.max_train_steps)
    stage = replace(
        stage, basis=kind, rounds=rounds, people=replace(stage.people, people=_of(kind, given, "people")),
        train=replace(stage.train, max_train_steps=given.steps or stage.train.max_train_steps),
        zoo=replace(stage.zoo, max_train_steps=given.zoo_steps or stage.zoo.max_train_steps),
        round=replace(stage.round, max_train_steps=given.round_steps or stage.round.max_train_steps),
    )  # fmt: skip
    return replace(
        preset, shared_basis=stage, two_stage=replace(preset.two_stage, train=diffusion), out=given.work / kind
    )


def _of(kind: str, given: argparse.Namespace, name: str) -> Any:
    """A flag that has one value for both kinds, or one for each."""
    values = getattr(given, name)
    return values and values[min(given.only.index(kind), len(values) - 1)]


class Seconds:
    """Processor seconds by stage, added up over the calls that it took, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.known[stage] = self.known.get(stage, 0.0) + time.process_time() - start
            replace_file(self.path, json.dumps(self.known, indent=1))


def trained(given: argparse.Namespace, seconds: Seconds) -> None:
    """Trains what is missing of both generators; kinds with equally many people share them."""
    for kind in given.only:
        out = given.work / kind
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "people").exists():
            everybody = given.work / f"people_{_of(kind, given, 'people')}"
            everybody.mkdir(exist_ok=True)
            os.symlink(everybody.resolve(), out / "people")
        for number in range(1, given.rounds + 1):
            if not (out / f"round_{number}" / "zoo.safetensors").exists():
                with seconds.of(f"{kind}, {'basis or zoo, and ' if number == 1 else ''}round {number}"):
                    fit(config_of(kind, given, number))


# ---- who is judged, by what ------------------------------------------------------------------------------------------


class Held:
    """Held-out people: the photo that contenders see, the others to judge by, and how pictures of them are scored."""

    def __init__(self, folder: Path, count: int, base: Any) -> None:
        if not (folder / TABLE).exists():
            make_subjects(folder, Subjects(people=1, held_out=count, pictures=6, people_seed=7, same_scenes=False))
        self.subjects = [person for person in read_subjects(folder) if person.split == "test"]
        self.people = [world.Identity(**person.attributes) for person in self.subjects]
        self.pictures = [[load_picture(folder / path, base.resolution) for path in p.pictures] for p in self.subjects]
        rng = np.random.default_rng(derive(0, "two stage"))
        self.shown = [world.sample_scene(rng) for _ in range(3)]
        captions = tuple(world.caption(scene) for scene in self.shown)
        self.scenes = Scenes(captions, tuple(derive(0, "two stage", n) for n in range(3)), 10, GUIDANCE)
        self.judge: Any = base.judge()._judge

    @property
    def photos(self) -> list[Any]:
        return [own[0] for own in self.pictures]

    def scores(self, pictures: list[list[Any]]) -> dict[str, list[float]]:
        """Every measure of each person."""
        found: dict[str, list[float]] = {"identity": [], "caption": []}
        for row, own in zip(pictures, self.pictures, strict=True):
            found["identity"].append(float(self.judge.identity_score(row, own[1:]).mean()))
            found["caption"].append(float(self.judge.caption_score(row, self.shown)["mean"]))
        arguments = (pictures, self.people, self.shown)
        found |= {"rank-1": rank_1(*arguments), "hard set": hard_set(*arguments)}
        return found | {f"{n} Lab": lab_errors(*arguments, a) for n, a in (("hair", "hair_color"), ("skin", "skin"))}


class Alone(nn.Module):
    """Adapters [people, numbers] with nothing shared."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(rows)

    def forward(self, people: list[int]) -> tuple[Tensor, Tensor]:
        return self.table[people], self.table[people]


def own(held: Held, pipeline: AdaptedPipeline, codec: Basis | None, given: argparse.Namespace, folder: Path) -> Tensor:
    """Adapters of the held-out people, each trained alone on all their pictures for the zoo's steps: a latent of ``codec``, or a
    whole LoRA."""
    stage = config_of(given.only[-1], given, 1).shared_basis
    assert stage is not None
    flat = [picture for pictures in held.pictures for picture in pictures]
    captions = [caption for person in held.subjects for caption in person.captions]
    places = np.arange(len(flat)).reshape(len(held.people), -1).tolist()
    bank = pipeline.bank(["start"])
    pictures = PersonalizeTask(pipeline.encode(flat, captions), pipeline.base, 1, noise_power=stage.noise_power)
    task = ZooTask(pictures, places, pipeline.model, bank, pipeline.layout, 32, 1, derive(0, "own"))
    if codec is None:
        model: Any = Alone(pipeline.layout.pack(bank.get("start")).repeat(len(places), 1))
        rate = rates(ZooConfig()).residual
    else:
        model, rate = LatentTable(codec, torch.zeros(len(places), codec.latents)), stage.zoo_learning_rate
    loop = replace(stage.zoo, gradient_accumulation_steps=task.passes)
    codec is None or codec.numbers.requires_grad_(False)
    group = {"params": [model.table], "lr": rate, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    train(task, model, [group], loop, folder, resume="latest", progress=False)
    task.release()
    with torch.no_grad():
        return model(list(range(len(places))))[1].detach()


def nearest_and_ridge(generator: Generator, folder: Path, photos: Photos, held: Held) -> tuple[Tensor, Tensor]:
    """Latents, as the basis takes them, of the training person with the photo most alike, and by ridge from the features."""
    ids, latents = read_latents(folder)
    place = {name: number for number, name in enumerate(ids)}
    owners = [place[name] for name, usable in zip(photos.ids, photos.usable, strict=True) for _ in usable]
    usable = [photo for places in photos.usable for photo in places]
    face, image = generator.face.encode(held.photos), generator.image.encode(held.photos)
    there = torch.nn.functional.normalize(photos.face[usable], dim=1)
    alike = (torch.nn.functional.normalize(face, dim=1) @ there.T).argmax(1)
    features, targets = torch.cat([photos.face, photos.image], 1)[usable], latents[owners]
    fitted = ridge(features, targets, choose_strength(features, targets, owners))
    return targets[alike], fitted(torch.cat([face, image], 1))


def spread(generator: Generator, held: Held) -> dict[str, float]:
    """Deviation of latents, in those of the training people: between 64 samples without a photo, between the predictions for
    held-out people, and between 8 seeds of one person's."""
    free = generator.latents(None, range(64))
    seeds = torch.stack([generator.latents(generator.condition([photo]), range(8)) for photo in held.photos[:16]])
    found = {"samples": free.std(0), "people": seeds[:, 0].std(0), "seeds": seeds.std(1)}
    return {name: round(float(value.mean()), 4) for name, value in found.items()}


QUANTILES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


@torch.no_grad()
def losses_by_noise(held: Held, pipeline: AdaptedPipeline, generator: Generator) -> dict[str, list[float]]:
    """The denoising loss of held-out people's last pictures by quantile of the noise: the base's, and with predicted adapters."""
    rows = torch.cat([generator.predict([photo]) for photo in held.photos])
    encoded = pipeline.encode([own[-1] for own in held.pictures], [person.captions[-1] for person in held.subjects])
    task, everybody = PersonalizeTask(encoded, pipeline.base, 1), list(range(len(rows)))
    noise = torch.randn(encoded.mean.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {"base": [], "shipped generator": []}
    batch = encoded.rows(everybody, torch.Generator().manual_seed(0)) | {
        "noise": noise,
        "weights": torch.ones(len(rows)),
    }
    with pipeline.banked() as bank:
        for quantile in QUANTILES:
            batch["levels"] = pipeline.base.schedule.levels(torch.full((len(rows),), quantile))
            for name, owners in (("base", [None] * len(rows)), ("shipped generator", everybody)):
                with bank.holding(pipeline.layout.unpack(rows), rows=owners):
                    found[name].append(float(task.errors(pipeline.model, batch).mean()))
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def scored(given: argparse.Namespace, pipeline: AdaptedPipeline, held: Held) -> dict[str, dict[str, list[float]]]:
    """Contender -> measure -> people."""
    found: dict[str, dict[str, list[float]]] = {}

    def score(
        name: str, make: Callable[[], Tensor | None], drawn_by: AdaptedPipeline = pipeline, held: Held = held
    ) -> None:
        path = given.work / "scores" / f"{name}.json"
        if not path.is_file():
            rows = make()
            if rows is None:
                pictures = drawn_by.draw(torch.empty(0, pipeline.layout.size), held.scenes, with_base=True) * len(
                    held.people
                )
            else:
                pictures = drawn_by.draw(rows, held.scenes, batch=16) * (len(held.people) // len(rows))  # one for all
                sheet(given.work / "scores" / f"{name}.png", held, pictures)
            replace_file(path, json.dumps(held.scores(pictures)))
        found[name] = json.loads(path.read_text())
        print(name, {m: round(float(np.nanmean(v)), 3) for m, v in found[name].items()}, flush=True)

    def predicted(generator: Generator, held: Held = held) -> Tensor:
        return torch.cat([generator.predict([photo]) for photo in held.photos])

    many = Held(given.work / f"held_out_{MANY}", MANY, pipeline.base)
    score("base model", lambda: None)
    score(f"base model, {MANY} people", lambda: None, held=many)
    score("LoRA of the person alone", lambda: own(held, pipeline, None, given, given.work / "own" / "lora"))
    for kind in given.only:
        rounds = [
            n for n in range(1, given.rounds + 1) if (given.work / kind / f"round_{n}" / "zoo.safetensors").is_file()
        ]
        for number in rounds:
            score(
                f"{kind}, round {number}",
                lambda k=kind, n=number: predicted(load_generator(given.work / k / f"round_{n}")),
            )
        if not rounds:
            continue
        folder = given.work / kind / f"round_{rounds[-1]}"
        generator = load_generator(folder)
        assert isinstance(generator.codec, Basis)
        numbers, stage = generator.codec.numbers, config_of(kind, given, 1).shared_basis
        assert stage is not None
        photos, _ = people_of(
            given.work / kind / "people", stage.people, pipeline.base, generator.face, generator.image
        )
        near, fitted = nearest_and_ridge(generator, folder, photos, held)
        with torch.no_grad():
            rows = {"nearest training person": numbers(near), "ridge": numbers(fitted)}
            rows["mean"] = numbers(read_latents(folder)[1].mean(0, keepdim=True))
        for name, value in rows.items():
            score(f"{kind}, {name}", lambda value=value: value)
        first = load_generator(given.work / kind / f"round_{rounds[0]}")
        score(f"{kind}, round {rounds[0]}, {MANY} people", lambda g=first: predicted(g, many), held=many)
        with torch.no_grad():
            fitted = numbers(nearest_and_ridge(generator, folder, photos, many)[1])
        score(f"{kind}, ridge, {MANY} people", lambda value=fitted: value, held=many)
        score(
            f"{kind}, own latent",
            lambda k=kind, c=generator.codec: own(held, pipeline, c, given, given.work / "own" / k),
        )
    score("shipped generator", lambda: predicted(load_generator()))
    score("shipped generator, inverted", lambda: inverted(load_generator(), pipeline, held.photos))
    score(f"shipped generator, {MANY} people", lambda: predicted(load_generator(), many), held=many)
    if given.paper:
        paper = load_generator(given.paper)
        score("paper", lambda: predicted(paper), AdaptedPipeline.load("embedded", paper.layout))
    return found


def sheet(path: Path, held: Held, pictures: list[list[Any]], people: int = 12) -> None:
    """A row for each of the first people: photo, and the true drawing beside what was drawn in each scene."""
    from PIL import Image

    size = world.SIZE
    canvas = Image.new("RGB", (size * (1 + 2 * len(held.shown)), size * people), "white")
    for y in range(min(people, len(pictures))):
        row = [held.photos[y]]
        for scene, picture in zip(held.shown, pictures[y], strict=True):
            row += [world.render(held.people[y], scene), picture]
        for x, image in enumerate(row):
            canvas.paste(image.resize((size, size)), (x * size, y * size))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def table(figures: dict[str, Any], given: argparse.Namespace) -> str:
    """The page's table."""
    lines = ["| contender | " + " | ".join(MEASURES) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    names = [key.removesuffix(": identity") for key in figures if key.endswith(": identity")]
    for name in sorted(names, key=lambda name: next(n for n, start in enumerate(ORDER) if name.startswith(start))):
        cells = []
        for measure in MEASURES:
            digits = 1 if "Lab" in measure else 3
            low, high = figures[f"{name}: {measure} interval"]
            bracket = f" [{low:.{digits}f}, {high:.{digits}f}]" if measure == "identity" else ""
            cells.append(f"{figures[f'{name}: {measure}']:.{digits}f}{bracket}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    people = ", ".join(f"{kind} {figures[f'{kind}: people']}" for kind in KINDS if f"{kind}: people" in figures)
    told = "; ".join(
        f"{k.removeprefix('seconds: ')} {round(v)}" for k, v in figures.items() if k.startswith("seconds: ")
    )
    return "\n".join(lines) + (
        f"\n\n{given.held_out} held-out people, one photo each, three scenes of 10 steps at guidance {GUIDANCE:g}; training people: "
        f"{people}. "
        f"Brackets: 95 % bootstrap over people. Processor seconds: {told}."
    )


def kept(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Figures of an earlier run of kinds that this one does not do again, and which run that was."""
    path, others = RESULTS / "two_stage.json", set(KINDS) - set(given.only)
    if not path.is_file() or not others:
        return {}, ""
    before = json.loads(path.read_text())
    of = tuple(start for kind in others for start in (f"{kind}, ", f"{kind}: ", f"seconds: {kind}"))
    found = {key: value for key, value in before["figures"].items() if key.startswith(of)}
    told = before["command"].partition("; ")[0]
    return found, f"; {', '.join(sorted(others))} as of {before['commit']}: {told}"


def write(
    given: argparse.Namespace, found: dict[str, dict[str, list[float]]], noise: dict[str, list[float]], held: Held,
    seconds: Seconds,
) -> None:  # fmt: skip
    """The figures, and the page's tables."""
    before, said = kept(given)
    figures: dict[str, Any] = {"held_out": given.held_out} | before
    figures |= {f"{kind}: people": _of(kind, given, "people") for kind in given.only}
    for name, scores in found.items():
        for measure, values in scores.items():
            interval = bootstrap([value for value in values if value == value])
            figures[f"{name}: {measure}"] = round(interval.mean, 4)
            if interval.low is not None and interval.high is not None:
                figures[f"{name}: {measure} interval"] = [round(interval.low, 4), round(interval.high, 4)]
    for name, values in noise.items():
        figures |= {f"loss at quantile {q:g}: {name}": round(v, 4) for q, v in zip(QUANTILES, values, strict=True)}
    for kind in given.only:
        for name, value in spread(load_generator(given.work / kind / f"round_{given.rounds}"), held).items():
            figures[f"{kind}: spread of {name}"] = value
    figures |= {f"seconds: {stage}": round(value, 1) for stage, value in seconds.known.items()}
    write_result("two_stage", figures, "python -m benchmarks.two_stage " + " ".join(sys.argv[1:]) + said)
    head = "| quantile | " + " | ".join(f"{q:g}" for q in QUANTILES) + " |\n" + "|---" * (1 + len(QUANTILES)) + "|\n"
    lines = ["| " + " | ".join([name, *(f"{v:.3f}" for v in values)]) + " |" for name, values in noise.items()]
    between(PAGE, "two_stage_noise", head + "\n".join(lines))
    between(PAGE, "two_stage", table(figures, given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/two_stage"))
    parser.add_argument(
        "--people", type=int, nargs="+", default=[1000], help="to train on; of each of --only, or of all"
    )
    parser.add_argument("--diffusion-steps", type=int, nargs="+", help="of a diffusion; of each of --only, or of all")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the learnt basis; the preset's when left out")
    parser.add_argument("--zoo-steps", type=int, help="of a zoo from nothing")
    parser.add_argument("--round-steps", type=int, help="of a zoo from what was predicted")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--paper", type=Path, help="a generator of the preset paper")
    parser.add_argument("--no-training", action="store_true", help="score what is there")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    seconds = Seconds(given.work / "seconds.json")
    if not given.no_training:
        trained(given, seconds)
    pipeline = AdaptedPipeline.load("embedded", load_generator().layout)
    held = Held(given.work / "held_out", given.held_out, pipeline.base)
    noise = losses_by_noise(held, pipeline, load_generator())
    found = scored(given, pipeline, held)
    if not given.no_write:
        write(given, found, noise, held, seconds)


if __name__ == "__main__":
    main()
