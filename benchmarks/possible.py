"""Who a photo may show: eight seeds of photos that hide something, of plain photos, and of no photo.

    python -m benchmarks.possible    (32 held-out people; about 12 processor minutes; resumable, a file a kind in work/)

Held-out people, each in a plain photo and under a hat. Each of eight seeds is drawn in three scenes, and the judge reads the three together: of
each attribute the word of the greatest mean log-probability. ``words``: how many different words of an
attribute the eight show; ``right``: how often the word is right; ``one right``: in how many people one of the eight at least is. Of a
hidden hair nothing can be told but what is likely: with 24 hairs one of eight guesses is right by chance in a third at most. ``spread``: mean
change of the pixels from their mean over the seeds, in % of their range. ``kept``: the same word as in what is drawn from the person's plain
photo; ``kept, one picture``: the same of single pictures, each beside the plain photo's in its scene. ``guidance`` and ``steps`` are the same of hatted photos with other settings of the sampler. ``samples``: the deviation of latents drawn without a photo, in that of the training
people, and how near each is to the nearest of them, beside how near held-out people are. Identity: three scenes, seed 0, against
the person's other pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._harness import between, write_result
from benchmarks._portraits import ROOT, interval
from benchmarks._true_drawings import array
from benchmarks.two_stage import Held
from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import wide, world
from smidgen.bases.embedded.judge import as_tensor
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.directions import load_directions
from smidgen.difflora.generator.generator import SHIPPED, Generator, Possible, load_generator
from smidgen.difflora.generator.reading import latents_alone

PAGE, PICTURE = ROOT / "docs" / "difflora_generator.md", ROOT / "docs" / "results" / "possible.png"
SEEDS, SHOWN = 8, 4
VISIBLE = {"plain": tuple(world.IDENTITY_ATTRIBUTES), "hat": ("skin", "facial_hair")}  # what each kind of photo shows


def photos_of(held: Held) -> dict[str, list[Image.Image]]:
    """Kind -> a photo of each person."""
    rng = np.random.default_rng(5)

    hats = [wide.in_a_hat(one.as_dict(), world.sample_scene(rng), rng) for one in held.people]
    return {"plain": held.photos, "hat": hats}


class Bench:
    """The generator and its base, and the held-out people."""

    def __init__(self, folder: Path | None, work: Path, count: int) -> None:
        self.folder, self.work, self.count = folder or SHIPPED, work, count
        self.generator: Generator = load_generator(folder)
        if self.generator.possible is None:
            raise SystemExit(f"{self.folder} has no possible.safetensors.")
        self.possible = self.generator.possible
        self.usual: list[tuple[list[dict[str, str]], dict[str, str]]] = []
        self.pipeline = AdaptedPipeline.load("embedded", self.generator.layout)
        self.held = Held(work / "held_out", count, self.pipeline.base)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.work / self.generator.digest[:12] / f"{name}.json"
        if not path.exists():
            replace_file(path, json.dumps(make()))
        found = json.loads(path.read_text())
        print(name, {k: round(float(np.mean(v)), 3) for k, v in found.items()}, flush=True)
        return found

    def latents(self, photo: Image.Image, kind: str, seeds: Sequence[int], **chosen: Any) -> torch.Tensor:
        """As predict makes them: of a plain photo by the first network, of others by the one that knows who it may be."""
        if kind == "plain":
            return self.generator.latents(self.generator.condition([photo]), seeds)
        assert self.generator.possible is not None
        return self.generator.possible.latents(self.generator.features([photo]), seeds, **chosen)

    def drawn(self, photos: Sequence[Image.Image], kind: str, **chosen: Any) -> Any:
        """Pictures [person][seed]."""
        latents = [self.latents(photo, kind, range(SEEDS), **chosen) for photo in photos]
        flat = self.pipeline.draw(self.generator.rows(torch.cat(latents)), self.held.scenes, batch=16)
        return [flat[at : at + SEEDS] for at in range(0, len(flat), SEEDS)]

    @torch.no_grad()
    def words(self, pictures: Sequence[Image.Image]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """What is read in each of one person's pictures, and in all of them together."""
        logits = self.held.judge.reader(as_tensor(pictures))
        together = {}
        for name in VISIBLE["plain"]:
            together[name] = list(world.ATTRIBUTES[name])[int(logits[name].log_softmax(-1).mean(0).argmax())]
        alone = self.held.judge.read(pictures)
        return [{name: words[at] for name, words in alone.items()} for at in range(len(pictures))], together

    def read(
        self, pictures: Sequence[Sequence[Sequence[Image.Image]]], visible: Sequence[str]
    ) -> dict[str, list[float]]:
        """Figures of each person."""
        if not self.usual:
            own = [self.latents(photo, "plain", [0]) for photo in self.held.photos]
            drawn = self.pipeline.draw(self.generator.rows(torch.cat(own)), self.held.scenes, batch=16)
            self.usual = [self.words(row) for row in drawn]
        found: dict[str, list[float]] = {"spread": []}
        for seeds, person, (alone, together) in zip(pictures, self.held.people, self.usual, strict=False):
            pixels = np.stack([np.stack([array(picture) for picture in row]) for row in seeds])
            found["spread"].append(100 * float(np.abs(pixels - pixels.mean(0)).mean()))
            each, whole = zip(*(self.words(row) for row in seeds), strict=True)
            right = {name: [word[name] == getattr(person, name) for word in whole] for name in VISIBLE["plain"]}
            for name, own in right.items():
                found.setdefault(f"{name}: words", []).append(len({word[name] for word in whole}))
                found.setdefault(f"{name}: right", []).append(float(np.mean(own)))
                found.setdefault(f"{name}: one right", []).append(float(any(own)))
            same = [word[name] == together[name] for word in whole for name in visible]
            single = [w[name] == u[name] for row in each for w, u in zip(row, alone, strict=True) for name in visible]
            found.setdefault("visible kept", []).append(float(np.mean(same)))
            found.setdefault("visible kept, one picture", []).append(float(np.mean(single)))
            found.setdefault("visible right", []).append(float(np.mean([right[name] for name in visible])))
            found.setdefault("one right", []).append(float(np.mean([any(own) for own in right.values()])))
        return found

    def identity(self, kind: str) -> Any:
        """Of each person, from the plain photo, seed 0."""
        latents = torch.cat([self.latents(photo, kind, [0]) for photo in self.held.photos])
        pictures = self.pipeline.draw(self.generator.rows(latents), self.held.scenes, batch=16)
        pairs = zip(pictures, self.held.pictures, strict=True)
        return [float(self.held.judge.identity_score(row, own[1:]).mean()) for row, own in pairs]

    def samples(self) -> dict[str, list[float]]:
        """Latents without a photo, in deviations of training people's: their spread, and distances to the nearest of 1,000 people
        drawn as the training people are spread, over the distance to the second."""
        assert self.generator.possible is not None
        free = self.generator.possible.latents(None, range(256))
        space = load_directions(self.folder, self.generator)
        deviation = space.spread.square().sum(0).sqrt()
        return {"samples: spread": (free.std(0) / deviation).tolist()}


def near(
    generator: Generator, possible: Possible, held: Held, training: Sequence[Image.Image]
) -> dict[str, list[float]]:
    """Distance to the nearest latent of ``training`` photos, and that over the second nearest: of samples without a photo, of
    held-out people, and of the training people among each other."""
    known = latents_alone(generator, training)
    parts = {
        "samples": possible.latents(None, range(256)),
        "held-out people": latents_alone(generator, held.photos),
    }
    found = {}
    for name, latents in [*parts.items(), ("training people", known)]:
        far = torch.cdist(latents, known)
        if name == "training people":
            far.fill_diagonal_(float("inf"))
        two = far.topk(2, largest=False).values
        found |= {
            f"{name}: nearest": two[:, 0].tolist(),
            f"{name}: nearest over second": (two[:, 0] / two[:, 1]).tolist(),
        }
    return found


def figures_of(kind: str, found: dict[str, list[float]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, values in found.items():
        made |= {f"{kind}: {name}": round(float(np.mean(values)), 4), f"{kind}: {name}_interval": interval(values)}
    return made


def table(figures: dict[str, Any]) -> str:
    """The page's."""
    lines = [
        "| photo | different hairs of 8 | hair colours | skins | facial hair | pixel spread | visible kept | one of 8 right |"
    ]
    lines.append("|---" * 8 + "|")
    for kind in VISIBLE:
        cells = [f"{figures[f'{kind}: {name}: words']:.1f}" for name in VISIBLE["plain"]]
        cells += [f"{figures[f'{kind}: spread']:.2f} %"]
        for name in ("visible kept", "one right"):
            low, high = figures[f"{kind}: {name}_interval"]
            cells.append(f"{figures[f'{kind}: {name}']:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Pictures of one size side by side, twice as large as they are."""
    side = 2 * world.SIZE
    canvas = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture.resize((side, side)), (side * x, side * y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--generator", type=Path, help="the folder of another than the shipped one")
    parser.add_argument("--training", type=Path, help="people/ of its training, for how near samples are to them")
    parser.add_argument("--work", type=Path, default=Path("work/possible"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0])
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.generator, given.work, given.people)
    figures: dict[str, Any] = {"people": given.people, "seeds": SEEDS}
    photos = photos_of(bench.held)
    for kind, shown in photos.items():
        figures |= figures_of(kind, bench.kept(kind, lambda s=shown, k=kind: bench.read(bench.drawn(s, k), VISIBLE[k])))
    told = {"identity": "plain", "identity by the second network": "any"}
    figures |= figures_of("plain", bench.kept("identity", lambda: {n: bench.identity(k) for n, k in told.items()}))
    settings = [("guidance", value) for value in given.guidance] + [("steps", value) for value in given.steps]
    for name, value in settings:
        chosen = {name: value}

        def hatted(chosen: dict[str, Any] = chosen, name: str = name) -> dict[str, list[float]]:
            hats = bench.read(bench.drawn(photos["hat"], "hat", **chosen), VISIBLE["hat"])
            return {
                f"hat, {name}": hats[name]
                for name in ("hair: words", "spread", "visible kept", "visible right", "one right")
            }

        figures |= figures_of(f"{name} {value:g}", bench.kept(f"{name} {value:g}", hatted))
    figures |= figures_of("no photo", bench.kept("samples", bench.samples))
    if given.training:
        from smidgen.difflora.zoo.subjects import read_subjects
        from smidgen.tasks.data.images import load_picture

        people = [person for person in read_subjects(given.training) if person.split == "train"][:1000]

        def copies() -> dict[str, list[float]]:
            first = [load_picture(given.training / one.pictures[0], bench.pipeline.base.resolution) for one in people]
            return near(bench.generator, bench.possible, bench.held, first)

        figures |= figures_of("near", bench.kept("near", copies))
    drawn = bench.drawn(photos["hat"][:SHOWN], "hat")
    truth = [world.render(person, bench.held.shown[0]) for person in bench.held.people[:SHOWN]]
    sheet(given.picture, [[photos["hat"][n], truth[n], *(seed[0] for seed in drawn[n])] for n in range(SHOWN)])
    if not given.no_write:
        write_result("possible", figures, "python -m benchmarks.possible --training PEOPLE")
        between(PAGE, "possible", table(figures))


if __name__ == "__main__":
    main()
