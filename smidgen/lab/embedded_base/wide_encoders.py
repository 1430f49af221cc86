"""Stage `encoders` in the wide world: the network that sees the photo, on real drawings in any light, size and place.

Drawings are made in normal light, half of them larger, smaller or off the middle; light, and an affine change of the picture
itself with its edge carried on, are drawn anew for each step, so that no photo is seen twice.
"""

import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import colors, wide, world
from smidgen.bases.embedded.wide_encoders import WideEncoder
from smidgen.bases.embedded.wide_judge import TINTS, lab_tensor
from smidgen.bases.embedded.wide_words import LIGHT
from smidgen.lab.embedded_base import draw
from smidgen.lab.embedded_base.autoencoder import to_tensor
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.encoders import faceless
from smidgen.lab.embedded_base.judge import blur
from smidgen.lab.embedded_base.run import PARTS, Run, save_weights
from smidgen.lab.embedded_base.wide_judge import NAMES, seen_of
from smidgen.training.quick import mixed

log = logging.getLogger(__name__)
ZOOM, SHIFT = math.log(1.25), 10.0  # of a drawing: 0.8 to 1.25 times its size, a tenth of the picture to each side
PLACED = 0.5  # share of drawings that are not where their framing has them, and of steps' pictures that are moved
LIGHTS = (0.56, 0.08, 0.12, 0.12, 0.12)  # shares of the words of LIGHT
WEIGHTS = {"hair": 3.0, "facial_hair": 3.0, "brows": 1.0}  # of words in the loss, beside 0.5: who a person is counts
FACELESS = 0.125  # pictures without a face, as a share of those with one
COLORED = [NAMES.index(name) for name in ("hair_color", "skin", "clothes_color", "background", "hat_color")]


def drawn(config: Config, folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures [n, 64, 64, 3] in normal light, codes [n, attributes] and colours [n, COLORS, 3], each of another person; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{what}_{split}.npy" for what in ("encoder_pictures", "encoder_codes", "encoder_colors")]
    if not all(path.exists() for path in paths) or len(np.load(paths[1])) != count:
        found = [_drawing(config.seed, split, number) for number in range(count)]
        for path, column in zip(paths, zip(*found, strict=True), strict=True):
            draw.save_array(path, np.stack(column))
    return tuple(np.load(path) for path in paths)  # type: ignore[return-value]


def _drawing(seed: int, split: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, draw.SPLITS.index(split), number, 2])
    person = wide.sample_identity(rng, split)  # type: ignore[arg-type]
    scene = wide.sample_scene(rng, person)
    scene = wide.Scene(**(scene.as_dict() | {"light": "normal"}))
    place = None
    if rng.random() < PLACED:
        place = wide.placement(scene, math.exp(rng.uniform(-ZOOM, ZOOM)), *rng.uniform(-SHIFT, SHIFT, 2).tolist())
    codes = wide.attribute_codes(person) | wide.attribute_codes(scene)
    shades = [wide.color_of(person if hasattr(person, name) else scene, name) for name in wide.COLORS]
    return (
        np.asarray(world.rasterize(wide.drawing(person, scene, place))),
        np.array([codes[name] for name in NAMES]),
        np.array([(0, 0, 0) if shade is None else colors.rgb(shade) for shade in shades], np.uint8),
    )


class Drawings:
    """The drawings of one split; ``seen`` [n, attributes] says what each tells in normal light."""

    def __init__(self, config: Config, folder: Path, split: str, count: int) -> None:
        self.pictures, codes, shades = drawn(config, folder, split, count)
        self.codes, self.seen = torch.from_numpy(codes), torch.from_numpy(seen_of(codes))
        self.lab = lab_tensor(torch.from_numpy(shades).float() / 255)

    def take(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in -1..1 in a light of their own, their codes, and what they tell there."""
        pictures = to_tensor(self.pictures[index.numpy()])
        codes, seen = self.codes[index].clone(), self.seen[index].clone()
        light = torch.multinomial(torch.tensor(LIGHTS), len(index), replacement=True, generator=generator)
        codes[:, NAMES.index("light")] = light
        grey = light == list(LIGHT).index("grey")
        seen[:, COLORED] &= ~grey[:, None]
        luma = (pictures * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
        pictures = torch.where(grey[:, None, None, None], luma, pictures)
        return (pictures + 1) * TINTS[light][:, :, None, None] - 1, codes, seen


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures [n, 3, 64, 64] larger or smaller, turned a little and moved; their edges are carried on."""
    n = len(pictures)

    def uniform(most: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * most

    there = torch.rand(n, generator=generator) < PLACED
    zoom, turn = torch.exp(uniform(ZOOM) * there), uniform(0.1) * there
    right, down = (uniform(2 * SHIFT / 100) * there for _ in range(2))
    rows = [zoom * turn.cos(), -zoom * turn.sin(), right, zoom * turn.sin(), zoom * turn.cos(), down]
    grid = nn.functional.affine_grid(torch.stack(rows, 1).reshape(n, 2, 3), list(pictures.shape), align_corners=False)
    return nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def train(config: Config, folder: Path, out: Path) -> None:
    """Train it, measure it on held-out people, and write it to ``out`` in int8."""
    torch.manual_seed(config.seed + 50)
    drawings = Drawings(config, folder, "train", config.encoder_pictures)
    network = WideEncoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(folder / "wide_encoder.safetensors", network, config.wide_encoder, ema=0.998, weight_decay=1e-2)
    run.train(lambda g: loss(network, drawings, config.wide_encoder.batch // PARTS, g), config.seed + 51)
    found = measure(run.average.eval(), config, folder)  # type: ignore[arg-type]
    log.info("wide encoder: %s", json.dumps(found))
    save_weights(out / "wide.safetensors", run.average, found, int8=True)


def loss(model: nn.Module, drawings: Drawings, n: int, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the words that are seen, that of face or none, and the Gaussian likelihood of the colours, in tens of Lab."""
    index = torch.randint(len(drawings.codes), (n,), generator=generator)
    pictures, wanted, seen = drawings.take(index, generator)
    pictures = blur(moved(pictures, generator), generator)
    strange = faceless(pictures[: max(1, int(n * FACELESS))], generator)
    with mixed():
        found = model(torch.cat([pictures, strange]).contiguous(memory_format=torch.channels_last))
    total = torch.zeros(())
    for i, name in enumerate(NAMES):
        each = nn.functional.cross_entropy(found.words[name][:n], wanted[:, i], reduction="none")
        total = total + WEIGHTS.get(name, 0.5) * (each * seen[:, i]).sum() / seen[:, i].sum().clamp_min(1)
    there = (torch.arange(len(found.face)) < n).float()
    total = total + nn.functional.binary_cross_entropy(found.face, there)
    error, doubt = (found.colors[:n] - drawings.lab[index]).square().sum(-1) / 100, found.doubt[:n].clamp(-4, 2)
    exists = torch.ones_like(error)
    exists[:, wide.COLORS.index("hat_color")] = (wanted[:, NAMES.index("hat")] != 0).float()
    return total + (exists * (3 * doubt + error * (-2 * doubt).exp() / 2)).sum() / n * 0.3


@torch.no_grad()
def measure(model: WideEncoder, config: Config, folder: Path) -> dict[str, float]:
    """Shares of words read right where seen, and distances in Lab, of held-out people in normal light; shares of pictures with a face
    and without one that are taken for what they are."""
    test = Drawings(config, folder, "test", config.test_pictures)
    seen = [model(to_tensor(test.pictures[start : start + 250])) for start in range(0, len(test.codes), 250)]
    found = {}
    for i, name in enumerate(NAMES):
        right = torch.cat([part.words[name] for part in seen]).argmax(-1) == test.codes[:, i]
        found[name] = right[test.seen[:, i]].float().mean().item()
    lab = torch.cat([part.colors for part in seen])
    for name in wide.FREE:
        k = wide.COLORS.index(name)
        found[f"{name}_lab"] = (lab - test.lab)[:, k].norm(dim=-1)[test.seen[:, NAMES.index(name)]].mean().item()
    strange = faceless(to_tensor(test.pictures[:256]), torch.Generator().manual_seed(config.seed))
    found["face"] = float((torch.cat([part.face for part in seen]) > 0.5).float().mean())
    found["no_face"] = float((model(strange).face <= 0.5).float().mean())
    return found
