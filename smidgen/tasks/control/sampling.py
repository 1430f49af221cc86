"""Draw with control pictures, and score how far what was drawn follows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat, no_grad

from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.tasks.contact_sheet import Row
from smidgen.tasks.control import metrics
from smidgen.tasks.control.conditions import edges, points_of
from smidgen.tasks.control.hint import steering
from smidgen.tasks.diffusion.gallery import answer, save_preview

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_controlled(
    base: ImageBase,
    prompts: Prompts,
    seeds: Sequence[int],
    controls: Tensor,
    *,
    scale: float = 1.0,
    batch: int = 16,
    **options: Any,
) -> "list[Image]":
    """One picture for each prompt, seed and control picture [n, 3, height, width] (uint8); other options as for
    ``base.draw_latents``."""
    found = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        with steering(base.model, controls[rows].float().to(base.device) / 255, scale):
            found.append(base.draw_latents(prompts[rows], seeds[rows], batch=batch, **options))
    return base.decode(cat(found))


@dataclass(frozen=True)
class Scenes:
    """Controls to draw, each with its prompt and from noise of its own; ``options`` as for ``draw_latents``."""

    prompts: Prompts
    controls: Tensor
    seeds: Sequence[int]
    options: Mapping[str, Any]

    def draw(self, base: ImageBase, steer: bool = True, most: int | None = None) -> "list[Image]":
        """A picture for each of the first ``most`` controls, or for their prompts alone."""
        prompts, seeds = self.prompts[slice(most)], self.seeds[:most]
        if steer:
            return draw_controlled(base, prompts, seeds, self.controls[:most], **self.options)
        return base.draw(prompts, seeds, **self.options)

    def answer(self, base: ImageBase) -> Tensor:
        """The UNet's answer to fixed noise, steered by the first control."""
        with no_grad(), steering(base.model, self.controls[:1].float().to(base.device) / 255):
            return answer(base, self.prompts, self.options["size"])

    def preview(self, base: ImageBase, controls: "Sequence[Image]", step: int, folder: Path, most: int = 4) -> None:
        """Draw the first controls as ``preview-<step>.png``."""
        shown = Row("control", controls[:most])
        save_preview(base.model, step, folder, lambda: [shown, Row(f"step {step}", self.draw(base, most=most))])


def can_score(control: str, base: ImageBase) -> bool:
    """Edges are found in any picture; parts and landmarks need a reader of what the base draws."""
    return control == "canny" or (base.parts_reader is not None and control in ("segmentation", "landmarks"))


def wanted(control: str, controls: "Sequence[Image]") -> NDArray:
    """What control pictures ask for: edges, labels of parts, or landmarks (NaN where a dot is out of sight)."""
    if control == "canny":
        return np.stack([np.asarray(picture.convert("L")) > 127 for picture in controls])
    if control == "segmentation":
        from smidgen.bases.embedded.pose import labels_of

        return np.stack([labels_of(np.asarray(picture.convert("RGB"))) for picture in controls])
    from smidgen.bases.embedded.pose import LANDMARKS

    return np.stack([points_of(picture, len(LANDMARKS)) for picture in controls])


def scores(control: str, drawn: "Sequence[Image]", asked: NDArray) -> dict[str, float]:
    """How far ``drawn`` follows what was ``asked``, see `metrics`."""
    if control == "canny":
        return metrics.edge_scores(np.stack([edges(picture) for picture in drawn]), asked)
    from smidgen.bases.embedded.parts_reader import load_parts_reader
    from smidgen.bases.embedded.pose import PARTS

    labels, points = load_parts_reader().read(list(drawn))
    if control == "segmentation":
        return {"miou": metrics.miou(labels, asked, len(PARTS)), "aacc": metrics.aacc(labels, asked)}
    seen = ~np.isnan(asked).any(-1)
    return {"landmarks": metrics.landmark_error(points[seen], asked[seen])}
