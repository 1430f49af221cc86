"""What a mask is for: people photographed before one and the same odd wall, learnt with and without masks, drawn in new scenes.

    python -m benchmarks.masks            (4 people x 5 ways to learn; about 5 processor minutes; resumable, a file a cell in work/)

Every picture of a person is taken before a wall that is dark on the left and bright on the right, which no caption names. An adapter
learns the pictures whole, with the wall painted grey (what one does without masks), or with the person's mask, what it leaves out
counting nothing or a tenth (``--mask-min-weight``). Then new scenes are drawn, once with captions that say nothing of a background, as
those of training, and once asking for one. ``wall`` is how much of the wall's contrast a drawing has around the true drawing's person
(least squares): 1 the wall itself, 0 any plain background. Intervals: 95 % bootstrap over people, of differences too, which are
taken person by person, the same noise and batches with each way.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks._harness import between, write_result
from benchmarks._portraits import BATCH, PICTURES, ROOT, STEPS, Portraits, figure, keep_strip, kept, said, unstrip

PEOPLE, SCENES = 4, 8
CELLS, PAGE = ROOT / "work" / "masks_bench", ROOT / "docs" / "personalize.md"
SHEET = ROOT / "docs" / "results" / "masks.png"
WAYS = {
    "base": "the base, nothing learnt",
    "whole": "whole",
    "masked_0": "`--masked-loss --mask-min-weight 0`",
    "masked": "`--masked-loss --mask-min-weight 0.1`",
    "painted": "whole, the wall painted grey",
}
PAIRS = (("masked_0", "whole"), ("masked", "whole"), ("masked_0", "painted"))
WALL, GREY = ((29, 52, 97), (255, 243, 160)), (128, 128, 128)
MARGIN = 4  # pixels around the true drawing's person that do not count: hair is drawn wider and narrower
SEEN = 0.2  # of the wall's contrast, from which on it is there again


def cut_out(image: Image.Image) -> np.ndarray:
    """Where the person is [64, 64], true or false: what is not joined to the upper corners by the colour of the background."""
    filled = image.convert("RGB").copy()
    for corner in ((0, 0), (filled.width - 1, 0)):
        ImageDraw.floodfill(filled, corner, (1, 2, 3), thresh=40)
    return (np.asarray(filled) != np.array((1, 2, 3))).any(-1)


def wall(shape: tuple[int, ...]) -> np.ndarray:
    """Dark on the left, bright on the right [height, width, 3]."""
    return np.array(WALL, np.uint8)[np.indices(shape)[1] * 2 // shape[1]]


def contrast(image: Image.Image, person: np.ndarray) -> float:
    """Contrast of the wall in ``image`` where the ``person`` is not, in parts of its own."""
    near = Image.fromarray(person).convert("L").filter(ImageFilter.MaxFilter(2 * MARGIN + 1))
    around = np.asarray(near) == 0
    drawn, wanted = (pixels[around].astype(float) for pixels in (np.asarray(image.convert("RGB")), wall(person.shape)))
    drawn, wanted = drawn - drawn.mean(0), wanted - wanted.mean(0)
    return float((drawn * wanted).sum() / (wanted**2).sum())


class Bench(Portraits):
    """People before a wall, and scenes that nobody was taught."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(11)
        self.scenes = [self.world.sample_scene(rng) for _ in range(SCENES)]
        self.asked = [self.world.caption(scene) for scene in self.scenes]

    def cell(self, way: str, person: int) -> dict[str, float]:
        """Learn a person in the ``way``, draw, score."""
        identity = self.world.sample_identity(np.random.default_rng(5000 + person), "test")
        true = [self.world.render(identity, scene) for scene in self.scenes]
        self.learn(None if way == "base" else self._task(way, identity, person), person)
        figures, shown = {}, []
        for asked, captions in (("unnamed", [unplaced(text) for text in self.asked]), ("asked", self.asked)):
            images = self.draw(captions, person)
            there = [contrast(*pair) for pair in zip(images, map(cut_out, true), strict=True)]
            figures[f"{asked}_wall"] = float(np.mean(there))
            figures[f"{asked}_seen"] = float(np.mean(np.array(there) > SEEN))
            shown += images[: SCENES // 2]
        scores = self.scores(images, self.scenes, true)
        keep_strip(CELLS / f"{way}-{person}.png", shown)
        return figures | {name: scores[name] for name in ("identity", "caption", "background")}

    def _task(self, way: str, identity: Any, person: int) -> Any:
        from smidgen.tasks.data.images import read_folder
        from smidgen.tasks.data.masks import Masks
        from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.world.write_subject(folder, identity, PICTURES, seed=person)
            (folder / "masks").mkdir()
            for path in sorted(folder.glob("*.png")):
                image = Image.open(path).convert("RGB")
                at = cut_out(image)
                behind = np.array(GREY, np.uint8) if way == "painted" else wall(at.shape)
                Image.fromarray(np.where(at[..., None], np.asarray(image), behind)).save(path)
                Image.fromarray(at).convert("L").save(folder / "masks" / path.name)
            found = read_folder(folder, masks=Masks(way.startswith("masked")))
            captions, least = [unplaced(text) for text in found.captions], 0.1 if way == "masked" else 0.0
            encoded = encode_examples(self.base, found.pictures, captions, self.base.resolution, least)
        return PersonalizeTask(encoded, self.base, batch_size=BATCH, seed=person)


def unplaced(caption: str) -> str:
    """A caption that says nothing of the background."""
    return ", ".join(part for part in caption.split(", ") if "background" not in part)


def table(figures: dict[str, Any]) -> str:
    """What the page shows."""
    from smidgen.tasks.cards import table

    names = ("unnamed_wall", "unnamed_seen", "asked_wall", "background", "identity", "caption")
    head = ["learnt", "the wall, none asked", "drawings with it", "the wall, another asked", "background as asked", "identity", "captions"]  # fmt: skip
    rows = [[text, *(said(figures, f"{way}_{name}") for name in names)] for way, text in WAYS.items()]
    rows += [
        [f"{WAYS[one]}, less {WAYS[other]}", *(said(figures, f"{one}_less_{other}_{name}") for name in names)]
        for one, other in PAIRS
    ]
    return table(head, rows)


def sheet() -> None:
    """The first person's drawings, way by way."""
    from smidgen.tasks.contact_sheet import Row, contact_sheet

    rows = [Row(way.replace("_", " "), unstrip(CELLS / f"{way}-0.png")) for way in WAYS]
    half = SCENES // 2
    columns = ["no background asked"] * half + ["another asked"] * half
    contact_sheet("One person, photographed before one wall", rows, columns).save(SHEET, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=PEOPLE)
    people = parser.parse_args(arguments).people
    bench: list[Bench] = []

    def made(way: str, person: int) -> dict[str, float]:
        bench.extend([] if bench else [Bench()])
        return bench[0].cell(way, person)

    found = {
        (way, person): kept(CELLS / f"{way}-{person}.json", lambda way=way, person=person: made(way, person))  # type: ignore[misc]
        for person in range(people)
        for way in WAYS
    }
    figures: dict[str, Any] = {"people": people, "seeds": 1, "steps": STEPS, "scenes": SCENES}
    for name in found["base", 0]:
        own = {way: np.array([found[way, person][name] for person in range(people)]) for way in WAYS}
        for way, values in own.items():
            figures |= figure(f"{way}_{name}", values)
        for one, other in PAIRS:
            figures |= figure(f"{one}_less_{other}_{name}", own[one] - own[other])
    write_result("masks", figures, "python -m benchmarks.masks" + (f" --people {people}" if people != PEOPLE else ""))
    between(PAGE, "masks", table(figures))
    sheet()
    return 0


if __name__ == "__main__":
    sys.exit(main())
