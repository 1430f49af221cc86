"""Draw with control pictures, and score how far what was drawn follows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat, no_grad

from smidgen.bases.stable_diffusion import EMBEDDED, Base, Prompts, decode, draw, draw_latents
from smidgen.tasks.contact_sheet import Row, contact_sheet, save_image
from smidgen.tasks.control import metrics
from smidgen.tasks.control.conditions import edges, points_of
from smidgen.tasks.control.hint import steering
from smidgen.tasks.diffusion.gallery import answer

if TYPE_CHECKING:
    from PIL.Image import Image

BETTER = {"iou": "up", "f1": "up", "f1_1px": "up", "miou": "up", "aacc": "up", "landmarks": "down"}


def draw_controlled(
    base: Base,
    prompts: Prompts,
    seeds: Sequence[int],
    controls: Tensor,
    *,
    scale: float = 1.0,
    batch: int = 16,
    **options: Any,
) -> "list[Image]":
    """One picture for each prompt, seed and control picture [n, 3, height, width] (uint8); other options as for
    ``pipelines.draw_latents``."""
    found = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        with steering(base.unet, controls[rows].float().to(base.device) / 255, scale):
            found.append(draw_latents(base, prompts[rows], seeds[rows], batch=batch, **options))
    return decode(base, cat(found))


@dataclass(frozen=True)
class Scenes:
    """Controls to draw, each with its prompt and from noise of its own; ``options`` as for ``draw_latents``."""

    prompts: Prompts
    controls: Tensor
    seeds: Sequence[int]
    options: Mapping[str, Any]

    def draw(self, base: Base, steer: bool = True, most: int | None = None) -> "list[Image]":
        """A picture for each of the first ``most`` controls, or for their prompts alone."""
        prompts, seeds = self.prompts[slice(most)], self.seeds[:most]
        if steer:
            return draw_controlled(base, prompts, seeds, self.controls[:most], **self.options)
        return draw(base, prompts, seeds, **self.options)

    def answer(self, base: Base) -> Tensor:
        """The UNet's answer to fixed noise, steered by the first control."""
        with no_grad(), steering(base.unet, self.controls[:1].float().to(base.device) / 255):
            return answer(base, self.prompts, self.options["size"])

    def preview(self, base: Base, controls: "Sequence[Image]", step: int, folder: Path, most: int = 4) -> None:
        """Draw the first controls as ``preview-<step>.png``."""
        was_training = base.unet.training
        base.unet.eval()
        rows = [Row("control", controls[:most]), Row(f"step {step}", self.draw(base, most=most))]
        save_image(contact_sheet(f"after step {step}", rows), folder / f"preview-{step}.png")
        base.unet.train(was_training)


def can_score(control: str, base_name: str) -> bool:
    """Edges are found in any picture; parts and landmarks need a reader, and there is one for the embedded base."""
    return control == "canny" or (base_name == EMBEDDED and control in ("segmentation", "landmarks"))


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
