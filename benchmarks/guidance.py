"""Which guidance the embedded bases draw best at: the base alone, and with predicted adapters.

    python -m benchmarks.guidance    (about 12 processor minutes)

People are training people, as the default of both bases is chosen here and everything else is scored on held-out ones. Captions of the base
alone say how well it follows; identity, hard set and colours in Lab (``_true_drawings``) what guidance does to the person. ``halo`` is how
far backgrounds are off in Lab. Intervals: 95 % bootstrap over people. Writes the table of docs/embedded_base.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks._harness import between, write_result
from benchmarks._portraits import ROOT, figure, said
from benchmarks._true_drawings import halos, hard_set, lab_errors
from smidgen.bases.embedded import EMBEDDED, EMBEDDED_WIDE, wide, world
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.generator import load_generator, shipped
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.training.randomness import derive

GUIDANCE, PEOPLE, SCENES, ALONE = (1.5, 2.0, 3.0, 4.0), 48, 3, 96  # scenes of everybody; and of the base alone
WORLDS: dict[str, Any] = {EMBEDDED: world, EMBEDDED_WIDE: wide}
MEASURES = {"caption": "captions", "identity": "identity", "hard set": "hard set", "hair Lab": "hair, Lab", "skin Lab": "skin, Lab", "halo": "halo, Lab"}  # fmt: skip
PAGE = ROOT / "docs" / "embedded_base.md"


class People:
    """Training people of a base's world, a photo of each, and scenes for all that hide nothing."""

    def __init__(self, drawn: Any) -> None:
        self.drawn, self.rng = drawn, np.random.default_rng(derive(0, "guidance"))
        self.people = [drawn.sample_identity(self.rng, "train") for _ in range(PEOPLE)]
        self.scenes = [self.plain() for _ in range(SCENES)]
        self.photos = [drawn.render(person, self.plain()) for person in self.people]
        self.any = [drawn.sample_scene(self.rng) for _ in range(ALONE)]
        self.others = [[drawn.render(person, self.plain()) for _ in range(3)] for person in self.people]

    def plain(self) -> Any:
        while True:
            scene = self.drawn.sample_scene(self.rng)
            words = scene.as_dict()
            if scene.glasses != "sunglasses" and all(
                words.get(name, usual) == usual
                for name, usual in (("hat", "none"), ("light", "normal"), ("style", "plain"))
            ):
                return scene

    def scores(self, judge: Any, pictures: list[list[Any]]) -> dict[str, list[float]]:
        """Every measure of each person."""
        arguments = (pictures, self.people, self.scenes)
        pairs = list(zip(pictures, self.others, strict=True))
        found = {"identity": [float(judge.identity_score(row, others).mean()) for row, others in pairs]}
        found["caption"] = [float(judge.caption_score(row, self.scenes)["mean"]) for row in pictures]
        found |= {"hard set": hard_set(*arguments), "halo": halos(*arguments)}
        found |= {f"{n} Lab": lab_errors(*arguments, a) for n, a in (("hair", "hair_color"), ("skin", "skin"))}
        return {name: [value for value in values if value == value] for name, values in found.items()}


def measured(name: str) -> dict[str, Any]:
    """The figures of one base."""
    generator = load_generator(shipped(name))
    pipeline = AdaptedPipeline.load(name, generator.layout)
    everybody = People(WORLDS[name])
    judge: Any = pipeline.base.judge()._judge
    rows = torch.cat([generator.predict([photo]) for photo in everybody.photos])
    steps, captions = pipeline.base.sampling.steps, WORLDS[name].caption
    shown, unnamed = (
        Scenes(tuple(map(captions, scenes)), tuple(derive(0, "guidance", n) for n in range(len(scenes))), steps, 0.0)
        for scenes in (everybody.scenes, everybody.any)
    )
    figures: dict[str, Any] = {}
    for guidance in GUIDANCE:
        alone = pipeline.draw(rows[:0], replace(unnamed, guidance=guidance), with_base=True)[0]
        followed = [
            float(judge.caption_score([one], [scene])["mean"]) for one, scene in zip(alone, everybody.any, strict=True)
        ]
        found = figure("alone: caption", followed)
        drawn = pipeline.draw(rows, replace(shown, guidance=guidance))
        for measure, values in everybody.scores(judge, drawn).items():
            found |= figure(f"predicted: {measure}", values)
        print(name, guidance, {key: value for key, value in found.items() if not key.endswith("interval")}, flush=True)
        figures |= {f"{name}, guidance {guidance:g}, {key}": value for key, value in found.items()}
    return figures


def table(figures: dict[str, Any]) -> str:
    """A row for each guidance of each base."""
    lines = [
        "| base | guidance | captions without an adapter | " + " | ".join(MEASURES.values()) + " |",
        "|---" * 9 + "|",
    ]
    for name in WORLDS:
        for guidance in GUIDANCE:
            own = f"{name}, guidance {guidance:g}, predicted: "
            cells = [
                f"{figures[own + m]:.1f}" if "Lab" in m or m == "halo" else said(figures, own + m) for m in MEASURES
            ]
            alone = figures[f"{name}, guidance {guidance:g}, alone: caption"]
            lines.append(f"| `{name}` | {guidance:g} | {alone:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"people": PEOPLE, "scenes": SCENES, "scenes of the base alone": ALONE}
    for name in WORLDS:
        figures |= measured(name)
    write_result("guidance", figures, "python -m benchmarks.guidance")
    between(PAGE, "guidance", table(figures))


if __name__ == "__main__":
    main()
