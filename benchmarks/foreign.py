"""What `predict` says of photos that are not like the drawings that the shipped generator learnt from.

    python -m benchmarks.foreign    (24 people; about 4 processor minutes; resumable, a file a kind in work/)

Held-out people drawn as the generator knows them, and the same people at other scales, moved, turned, in grey and tinted light, under
hats, in other hair and skin colours, with parts painted over, blurred, noisy, as JPEG; besides, portraits in other drawing styles, logos and
noise. Each is read as `predict` reads it. A photo is *refused*, or *accepted*; of the accepted, a person is *silently wrong* where a
word of who they are is read wrong, no word of theirs is said to be unsure, and the photo is not said to be unusual. A free colour is read right when the word's
colour is within 20 of it in Lab; hair under a hat is always read wrong. ``pairs``: photos of one person, of two who differ in one
attribute, and of any two, and how often they are taken for two people. What is said of unusual photos, and the rule for pairs, were chosen on the people of the table; pairs and the
kinds of which some are accepted are measured on other people too (``fresh``). The reliability plot holds every word of who they are that was read of an
accepted photo. Intervals: 95 % bootstrap over people; where nobody is, of none seen in n, 3 / n.
"""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks._harness import between, write_result
from benchmarks._portraits import ROOT, interval
from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import colors, pose, wide, world

PEOPLE, SEED, FRESH = 24, 53, 59
CELLS, PAGE = ROOT / "work" / "foreign_bench", ROOT / "docs" / "difflora_generator.md"
PLOT = ROOT / "docs" / "results" / "foreign_reliability.png"
STYLES = (
    "micah", "adventurer", "lorelei", "open-peeps", "personas", "notionists", "big-smile", "bottts", "pixel-art", "toon-head",
    "miniavs", "identicon", "shapes", "fun-emoji",
)  # fmt: skip
HARD = (
    "eyes painted over",
    "face painted over",
    "hat",
    "any hair colour",
    "any skin colour",
)  # of which some are accepted
LAB = 20.0
Person, Drawn = world.Identity, tuple[Image.Image, dict[str, str] | None]  # a photo, and the words that are right


class Photos:
    """Kinds of photos, each drawn for the same people."""

    def __init__(self, count: int, seed: int = SEED) -> None:
        self.count = count
        rng = np.random.default_rng(seed)
        self.people = [(world.sample_identity(rng, "test"), world.sample_scene(rng)) for _ in range(count)]

    def kinds(self) -> dict[str, Callable[[np.random.Generator], list[Drawn]]]:
        found: dict[str, Callable[[np.random.Generator], list[Drawn]]] = {"as it knows them": self._of(world.render)}
        for scale in (0.8, 0.9, 1.1, 1.25):
            found[f"scale {scale}"] = self._posed(lambda rng, s=scale: pose.Pose(size=1.2 * s))  # type: ignore[misc]
        found["shift 10 %"] = self._posed(_shifted)
        found["turned 15 degrees"] = self._posed(lambda rng: pose.Pose(turn=float(rng.choice([-15, 15]))))
        found["JPEG 70"] = self._changed(_jpeg)
        found["blur of 2 pixels"] = self._changed(lambda image, rng: image.filter(ImageFilter.GaussianBlur(2)))
        found["noise of 40 levels"] = self._changed(_noised)
        found["upside down"] = self._changed(lambda image, rng: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
        for light in ("grey", "warm", "cold", "dim"):
            found[light] = self._changed(lambda image, rng, light=light: wide.lit(image, light))  # type: ignore[misc]
        for part, box in {
            "mouth": (18, 36, 48, 54),
            "eyes": (16, 24, 50, 34),
            "face": (16, 14, 48, 52),
            "half": (0, 0, 31, 63),
            "hair": (8, 0, 56, 20),
        }.items():
            found[f"{part} painted over"] = self._changed(lambda image, rng, box=box: _masked(image, box, rng))  # type: ignore[misc]
        found["hat"] = self._hats
        found["any hair colour"] = self._coloured("hair_color")
        found["any skin colour"] = self._coloured("skin")
        found["other styles"] = lambda rng: [(_style(STYLES[n % len(STYLES)], n), None) for n in range(2 * self.count)]
        found["logos"] = lambda rng: [(_logo(rng), None) for _ in range(self.count)]
        found["noise alone"] = lambda rng: [
            (Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), None) for _ in range(self.count)
        ]
        return found

    def _of(self, draw: Callable[[Person, Any], Image.Image]) -> Callable[[np.random.Generator], list[Drawn]]:
        return lambda rng: [(draw(person, scene), person.as_dict()) for person, scene in self.people]

    def _posed(self, where: Callable[[np.random.Generator], pose.Pose]) -> Callable[[np.random.Generator], list[Drawn]]:
        return lambda rng: [(pose.Portrait(p, s, where(rng)).picture(), p.as_dict()) for p, s in self.people]

    def _changed(self, change: Callable[..., Image.Image]) -> Callable[[np.random.Generator], list[Drawn]]:
        return lambda rng: [(change(world.render(p, s), rng), p.as_dict()) for p, s in self.people]

    def _hats(self, rng: np.random.Generator) -> list[Drawn]:
        drawn = [wide.in_a_hat(person.as_dict(), scene, rng) for person, scene in self.people]
        return [(image, p.as_dict() | {"hair": ""}) for image, (p, _) in zip(drawn, self.people, strict=True)]

    def _coloured(self, name: str) -> Callable[[np.random.Generator], list[Drawn]]:
        def draw(rng: np.random.Generator) -> list[Drawn]:
            found: list[Drawn] = []
            for person, scene in self.people:
                color = "#{:02x}{:02x}{:02x}".format(*rng.integers(0, 256, 3).tolist())
                words = person.as_dict() | {name: color}
                found.append((wide.render(wide.Identity(**words), wide.Scene(**scene.as_dict())), words))
            return found

        return draw


def _shifted(rng: np.random.Generator) -> pose.Pose:
    right, down = ((10, 0), (-10, 0), (0, 10), (0, -10))[int(rng.integers(4))]
    return pose.Pose(right=right, down=2 + down)


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    stored = io.BytesIO()
    image.resize((512, 512), Image.Resampling.BICUBIC).save(stored, "JPEG", quality=70)
    return Image.open(stored).convert("RGB")


def _noised(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(image) + rng.normal(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8))


def _masked(image: Image.Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> Image.Image:
    ImageDraw.Draw(image).rectangle(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def _style(name: str, seed: int) -> Image.Image:
    avatar, style, _ = world.drawing_tools(name)
    background = list(world.BACKGROUND.values())[seed % len(world.BACKGROUND)]
    return world.rasterize(
        str(avatar(style, {"seed": f"p{seed}", "size": 64, "backgroundColor": background}).to_string())
    )


def _logo(rng: np.random.Generator) -> Image.Image:
    def color() -> tuple[int, ...]:
        return tuple(rng.integers(0, 256, 3).tolist())

    image = Image.new("RGB", (64, 64), color())
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        (left, right), (top, bottom) = sorted(rng.integers(0, 64, 2).tolist()), sorted(rng.integers(0, 64, 2).tolist())
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((left, top, right + 8, bottom + 8), fill=color())
    pen.text((8, 26), "".join(chr(65 + letter) for letter in rng.integers(0, 26, 6)), fill=color())
    return image


def right(name: str, read: str, true: str) -> bool:
    """Whether a word is right; of a free colour, whether it looks like it."""
    if true.startswith("#"):
        return bool(np.linalg.norm(colors.lab(world.ATTRIBUTES[name][read]) - colors.lab(true)) <= LAB)
    return read == true


def read_kind(reader: Any, generator: Any, photos: Sequence[Drawn]) -> list[dict[str, Any]]:
    """For each photo: accepted, whether something was said, and of each attribute how surely it was read and whether that is right."""
    found = []
    for image, words in photos:
        seen = reader.look(generator, image.resize((64, 64), Image.Resampling.LANCZOS))
        told = {n: [sure, right(n, word, words[n]) if words else False] for n, (word, sure) in seen.words.items()}
        found.append(
            {
                "accepted": not reader.refusal(seen), "words": told,
                "said": bool(reader.unsure(seen)) or reader.unusual(seen),
                "features": min(seen.features, 1e9), "colours": seen.colours,
            }
        )  # fmt: skip
    return found


def read_pairs(reader: Any, generator: Any, photos: Photos) -> dict[str, list[bool]]:
    """For each kind of pair, which were taken for two people."""
    rng = np.random.default_rng(FRESH + 1)
    people = [person for person, _ in photos.people]
    others = {
        "one person": people,
        "two who differ in one attribute": [_neighbour(person, rng) for person in people],
        "any two": people[1:] + people[:1],
    }
    first = [world.render(*one) for one in photos.people]
    found = {}
    for kind, second in others.items():
        beside = [world.render(person, world.sample_scene(rng)) for person in second]
        pairs = [[reader.look(generator, image) for image in pair] for pair in zip(first, beside, strict=True)]
        found[kind] = [reader.two_people(generator, pair) is not None for pair in pairs]
    return found


def _neighbour(person: Person, rng: np.random.Generator) -> Person:
    name = str(rng.choice(list(world.IDENTITY_ATTRIBUTES)))
    words = person.as_dict()
    return Person(**(words | {name: str(rng.choice([w for w in world.IDENTITY_ATTRIBUTES[name] if w != words[name]]))}))


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        replace_file(path, json.dumps(make()))
        print(path.stem, flush=True)
    return json.loads(path.read_text())


def main() -> None:
    import torch

    from smidgen.difflora.generator.generator import SHIPPED, load_generator
    from smidgen.difflora.generator.reading import load_reader

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=PEOPLE)
    photos = Photos(parser.parse_args().people)
    generator = load_generator()
    reader = load_reader(SHIPPED, generator)
    figures: dict[str, Any] = {"people": photos.count}
    lines = [
        "| photos | accepted | words right | of accepted ones | something said | silently wrong people |",
        "|---|---|---|---|---|---|",
    ]
    every: list[list[Any]] = []
    for number, (kind, draw) in enumerate(photos.kinds().items()):
        made = _kept(
            CELLS / f"{kind}.json",
            lambda d=draw, n=number: read_kind(reader, generator, d(np.random.default_rng([SEED, n]))),  # type: ignore[misc]
        )
        told = _figures(kind, made)
        figures |= told
        lines.append(_line(kind, told))
        every += [own for one in made if one["accepted"] and one["words"] for own in one["words"].values()]
    fresh = Photos(photos.count, FRESH)
    made = [
        one
        for kind in HARD
        for one in _kept(
            CELLS / f"fresh {kind}.json",
            lambda k=kind: read_kind(reader, generator, fresh.kinds()[k](np.random.default_rng(FRESH))),  # type: ignore[misc]
        )
    ]
    figures |= {f"fresh: {name.partition(': ')[2]}": value for name, value in _figures("fresh", made).items()}
    for kind, found in _kept(CELLS / "pairs.json", lambda: read_pairs(reader, generator, fresh)).items():
        figures |= {f"pairs: {kind}": float(np.mean(found)), f"pairs: {kind}_interval": interval(found)}
    figures |= _reliability(every)
    write_result("foreign", figures, "python -m benchmarks.foreign")
    between(PAGE, "foreign", "\n".join(lines))


def _figures(kind: str, made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accepted = [float(one["accepted"]) for one in made]
    wrong = [
        float(one["accepted"] and not one["said"] and not all(r for _, r in one["words"].values())) for one in made
    ]
    found: dict[str, Any] = {}
    people = kind not in ("other styles", "logos", "noise alone")
    shares = {"accepted": accepted, "silent": wrong}
    if people:
        words = [float(np.mean([r for _, r in one["words"].values()])) for one in made]
        shares["words"] = words
        shares["accepted_words"] = [share for share, one in zip(words, made, strict=True) if one["accepted"]]
        shares["said"] = [float(one["said"]) for one in made if one["accepted"]]
    for name, values in shares.items():
        if values:
            low, high = interval(values)
            high = max(high, round(3 / len(values), 4)) if not any(values) else high
            found |= {f"{kind}: {name}": round(float(np.mean(values)), 4), f"{kind}: {name}_interval": [low, high]}
    return found | {f"{kind}: silently wrong people": int(sum(wrong)), f"{kind}: photos": len(made)}


def _line(kind: str, told: dict[str, Any]) -> str:
    cells = []
    for name in ("accepted", "words", "accepted_words", "said"):
        key = f"{kind}: {name}"
        cells.append(
            f"{told[key]:.2f} [{told[f'{key}_interval'][0]:.2f}, {told[f'{key}_interval'][1]:.2f}]"
            if key in told
            else ""
        )
    return f"| {kind} | {' | '.join(cells)} | {told[f'{kind}: silently wrong people']} of {told[f'{kind}: photos']} |"


def _reliability(words: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Draws how often words are right against how surely they were read; the expected calibration error."""
    from matplotlib.figure import Figure

    sure, good = np.array([s for s, _ in words]), np.array([float(r) for _, r in words])
    edges = np.array([0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0001])
    places, points = np.digitize(sure, edges) - 1, []
    for place in range(len(edges) - 1):
        own = places == place
        if own.sum() >= 5:
            points.append((sure[own].mean(), good[own].mean(), *interval(good[own].tolist()), own.sum()))
    error = sum(n * abs(s - g) for s, g, _, _, n in points) / sum(n for *_, n in points)
    drawn = Figure(figsize=(4.4, 4), layout="constrained")
    axes = drawn.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", lw=1)
    for s, g, low, high, n in points:
        axes.errorbar(s, g, [[max(0, g - low)], [max(0, high - g)]], fmt="o", color="C0", capsize=3)
        axes.annotate(str(n), (s, g), xytext=(5, -11), textcoords="offset points", fontsize=7, color="#777777")
    axes.set(
        xlabel="how surely a word is read",
        ylabel="share of words that are right",
        title=f"accepted photos, {len(words):,} words",
    )
    axes.set(xlim=(0.3, 1.02), ylim=(0.0, 1.02))
    drawn.savefig(PLOT, dpi=150)
    return {"words": len(words), "calibration error": round(float(error), 4)}


if __name__ == "__main__":
    main()
