"""Pictures with their control pictures: read from a folder, or drawn from the embedded base's world.

A folder is an imagefolder whose ``metadata.jsonl`` (or .csv) has ``file_name``, ``control_file_name`` and ``text``, or one
whose folder ``control`` (``conditioning``, ...) holds a control picture of each picture's name. Without control pictures
their edges are found on the fly.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.control.conditions import check, dot_picture, edge_picture
from smidgen.tasks.data import images, metadata
from smidgen.tasks.data.listing import TABLES, drawn_into
from smidgen.tasks.data.pixels import decode, fit

if TYPE_CHECKING:
    from PIL.Image import Image

    from smidgen.bases.embedded.pose import Portrait

CONTROL_FOLDER = "control"


@dataclass(frozen=True)
class ControlPairs:
    """Checked pictures, the control picture of each at the base's resolution, and warnings worth reading."""

    pictures: tuple[images.Picture, ...]
    controls: "tuple[Image, ...]"
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def __str__(self) -> str:
        return str(images.PictureFolder(self.pictures))

    def digests(self) -> list[list[str]]:
        """What decides a training: each picture's digest, caption and control."""
        return [
            [picture.digest[:16], picture.caption, hashlib.sha256(control.tobytes()).hexdigest()[:16]]
            for picture, control in zip(self.pictures, self.controls, strict=True)
        ]

    def split(self, held_out: int) -> "tuple[ControlPairs, ControlPairs]":
        """The last ``held_out`` pairs apart from the others."""
        if not 0 < held_out < len(self):
            raise ConfigError(
                f"num_held_out must lie between 1 and {len(self) - 1} for {len(self)} pairs, not {held_out}."
            )
        cut = len(self) - held_out
        return (
            ControlPairs(self.pictures[:cut], self.controls[:cut]),
            ControlPairs(self.pictures[cut:], self.controls[cut:]),
        )


def read_pairs(folder: Path, control: str, prompt: str | None = None, resolution: int = 64) -> ControlPairs:
    """Read and check the pictures of ``folder`` and their control pictures, in the order of their names.

    ``prompt`` is the caption of pictures that have none. Raises DataError for control pictures that are missing, broken
    or of another size than their picture, and what `images.read_folder` raises.
    """
    check(control)
    found = images.read_folder(folder, prompt, resolution, conditioned=True)
    without = [picture.path for picture in found.pictures if picture.control is None]
    if without and (control != "canny" or len(without) < len(found.pictures)):
        raise DataError(
            f"{len(without)} picture(s) of {folder} have no control picture, for example {without[0].name}: name one "
            f"in the column {metadata.CONTROL} of metadata.jsonl, or put it under the same name into a folder "
            f"{CONTROL_FOLDER}. Only canny is drawn from the pictures themselves, "
            "and only when none has one."
        )
    if without:
        drawn = tuple(edge_picture(images.load_picture(picture.path, resolution)) for picture in found.pictures)
        return ControlPairs(found.pictures, drawn, found.warnings)
    return ControlPairs(found.pictures, _load_controls(found.pictures, resolution), found.warnings)


def load_control(path: Path, resolution: int) -> "Image":
    """A control picture, scaled and cropped as pictures are, but to the nearest pixel: colours have a meaning."""
    return fit(_read_control(path), resolution, Resampling.NEAREST)


def as_controls(controls: "Sequence[Image]") -> Tensor:
    """Control pictures -> [n, 3, height, width] (uint8)."""
    stack = np.stack([np.asarray(control.convert("RGB")) for control in controls])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def control_of(portrait: "Portrait", control: str) -> "Image":
    """The control picture of a portrait of the embedded base's world."""
    from PIL import Image

    from smidgen.bases.embedded import pose, world

    if check(control) == "canny":
        return edge_picture(portrait.picture())
    if control == "segmentation":
        return Image.fromarray(pose.colored(portrait.parts()))
    if control == "landmarks":
        return dot_picture(portrait.landmarks(), world.SIZE)
    raise ConfigError("The embedded base's world draws canny, segmentation and landmarks.")


def write_pairs(folder: Path, control: str, num_pictures: int, seed: int) -> str:
    """Draw ``num_pictures`` people of the embedded base's world, each once, with their control pictures; returns a
    sentence. The last tenth are people the base has never seen."""
    from smidgen.bases.embedded import pose, world

    if num_pictures < 2:
        raise ConfigError(f"num_pictures must be at least 2, not {num_pictures}.")
    rng, lines = np.random.default_rng([seed, 400]), []
    unseen = max(1, num_pictures // 10)
    with drawn_into(folder) as scratch:
        (scratch / CONTROL_FOLDER).mkdir()
        for number in range(num_pictures):
            portrait = pose.sample_portrait(rng, "test" if number >= num_pictures - unseen else "train")
            name = f"{number:05d}.png"
            portrait.picture().save(scratch / name)
            control_of(portrait, control).save(scratch / CONTROL_FOLDER / name)
            row: dict[str, Any] = {"file_name": name, metadata.CONTROL: f"{CONTROL_FOLDER}/{name}"}
            lines.append(json.dumps(row | {"text": world.caption(portrait.scene)}))
        (scratch / TABLES[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (
        f"{folder}: {num_pictures} portraits with {control} controls, the last {unseen} of people the base never saw."
    )


def _read_control(path: Path) -> "Image":
    try:
        found = decode(path)
    except DataError as error:
        raise DataError(f"The control picture {path} cannot be read: {error}.") from error
    if "transparent" in found.odd:
        raise DataError(f"The control picture {path} cannot be used: it is transparent throughout.")
    return found.image


def _load_controls(pictures: Sequence[images.Picture], resolution: int) -> "tuple[Image, ...]":
    missing = [p.control for p in pictures if p.control is not None and not p.control.is_file()]
    if missing:
        raise DataError(f"{len(missing)} control picture(s) are not there, for example {missing[0]}.")
    controls = []
    for picture in pictures:
        path = picture.control
        assert path is not None
        control = _read_control(path)
        if control.size != picture.size:
            raise DataError(
                f"{path.name} is {control.width}x{control.height} pixels, but its picture {picture.path.name} is "
                f"{picture.size[0]}x{picture.size[1]}: a control picture has its picture's size."
            )
        controls.append(fit(control, resolution, Resampling.NEAREST))
    return tuple(controls)
