"""The judge of the wide world: words, colours in Lab with how sure they are, likeness of people, and a measure without networks.

`WideReader` reads every attribute's word, and five colours (hair, skin, clothes, background, hat) as they are in normal
light: it chooses where to look, takes the mean colour there, undoes the light it has read, and says how far off it may
be. Where a colour cannot be seen (hair under a hat, anything in grey light) that number is large, and a reader of it abstains. `nearest_person` compares with true drawings and knows no network.

Trained on real drawings of training people only, by ``python -m smidgen.lab.embedded_base --stage judge --world wide``.

Example:
    >>> judge = load_wide_judge()
    >>> lab, sigma = judge.colors([wide.render(person, scene)])
    >>> lab.shape, sigma.shape
    (torch.Size([1, 5, 3]), torch.Size([1, 5]))
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import colors, wide
from smidgen.bases.embedded.judge import IdentityEmbedder, Images, as_tensor, block, load_weights
from smidgen.bases.embedded.wide_words import LIGHT
from smidgen.errors import DataError

FOLDER = Path(__file__).parent / "wide_judge_weights"
UNSURE = 15.0
"""Sigma in Lab from which a colour counts as not seen."""
_XYZ = torch.tensor(colors.XYZ / colors.WHITE[:, None], dtype=torch.float32)
TINTS = torch.tensor([tint or (1, 1, 1) for tint in LIGHT.values()], dtype=torch.float32)


def lab_tensor(channels: Tensor) -> Tensor:
    """sRGB [..., 3] in 0..1 -> L*, a*, b* [..., 3], with gradients; as `smidgen.bases.embedded.colors.lab_of`."""
    linear = torch.where(channels > 0.04045, ((channels.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4, channels / 12.92)
    ratio = linear @ _XYZ.T
    edge = colors.EDGE
    f = torch.where(ratio > edge**3, ratio.clamp_min(edge**3) ** (1 / 3), ratio / (3 * edge**2) + 4 / 29)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def looked_at(looks: nn.ModuleList, found: Sequence[Tensor], pictures: Tensor, light: Tensor) -> Tensor:
    """Colours [n, colours, 3] in Lab: the mean of the cells that ``looks`` choose by what was ``found`` at three sizes, divided by the
    tint of the ``light`` whose logits are given."""
    maps = looks[0](found[0])
    for look, coarse in zip(list(looks)[1:], found[1:], strict=True):
        maps = maps + nn.functional.interpolate(look(coarse), maps.shape[-2:], mode="bilinear")
    with torch.autocast(pictures.device.type, enabled=False):  # a colour needs all its digits
        where = maps.float().flatten(2).softmax(-1)
        cells = nn.functional.avg_pool2d(pictures.float(), 2).flatten(2).mT / 2 + 0.5
        tint = light.float().softmax(-1) @ TINTS.to(pictures.device)
        return lab_tensor(((where @ cells) / tint[:, None]).clamp(0, 1))


class WideReader(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> word logits per attribute, colours [n, 5, 3] in Lab and their log sigma [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 24, 5, 2), block(24, 48, 3, 2)
        self.third = nn.Sequential(block(48, 96, 3, 2), block(96, 96, 3, 1))
        self.trunk = nn.Sequential(
            block(96, 96, 3, 2), nn.Flatten(), nn.Linear(96 * 16, 192), nn.ReLU(), nn.Dropout(0.1)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(words)) for name, words in wide.ATTRIBUTES.items()})
        self.looks = nn.ModuleList([nn.Conv2d(width, len(wide.COLORS), 1) for width in (24, 48, 96)])
        self.doubt = nn.Linear(192, len(wide.COLORS))

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        first = self.first(pictures)
        second = self.second(first)
        third = self.third(second)
        features = self.trunk(third)
        words = {name: head(features) for name, head in self.heads.items()}
        colors = looked_at(self.looks, (first, second, third), pictures, words["light"])
        return words, colors, self.doubt(features)


class WideJudge:
    """Reads pictures. ``accuracy`` on real drawings of held-out people: an attribute's share of words read right where it is
    seen, and for each colour the mean distance in Lab, as ``"hair_color_lab"``."""

    def __init__(
        self, reader: WideReader, embedder: IdentityEmbedder, accuracy: dict[str, float], likeness: dict[str, float]
    ):
        self.reader, self.embedder = reader.eval(), embedder.eval()
        self.accuracy, self.likeness = accuracy, likeness

    @torch.no_grad()
    def _all(self, images: Images) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        parts = [self.reader(batch) for batch in as_tensor(images).split(64)]
        words = {name: torch.cat([part[0][name] for part in parts]) for name in wide.ATTRIBUTES}
        return words, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])

    def read(self, images: Images) -> dict[str, list[str]]:
        """Attribute name -> the word read in each picture, also where it is a guess."""
        words = self._all(images)[0]
        return {name: [list(wide.ATTRIBUTES[name])[i] for i in words[name].argmax(-1)] for name in wide.ATTRIBUTES}

    def colors(self, images: Images) -> tuple[Tensor, Tensor]:
        """L*, a*, b* [n, 5, 3] of `wide.COLORS` in normal light, and sigma [n, 5]: a calibrated error of each of the three.
        From `UNSURE` on the colour is not seen."""
        _, values, doubt = self._all(images)
        spread = torch.tensor([self.accuracy.get(f"{name}_spread", 1.0) for name in wide.COLORS])
        return values, doubt.exp() * 10 * spread

    def caption_score(self, images: Images, scenes: Sequence[wide.Scene]) -> dict[str, float]:
        """Scene attribute -> share of pictures in which it reads as asked, and ``"mean"``; what cannot be seen is not
        counted."""
        read = self.read(images)
        if len(read["eyes"]) != len(scenes):
            raise DataError(f"{len(read['eyes'])} pictures for {len(scenes)} scenes: give one scene for each picture.")
        anyone = wide.Identity("long", "black", "pale", "none")
        scores = {}
        for name in wide.SCENE_ATTRIBUTES:
            asked = [
                getattr(s, name) == word
                for s, word in zip(scenes, read[name], strict=True)
                if wide.seen(anyone, s)[name]
            ]
            if asked:
                scores[name] = sum(asked) / len(asked)
        return {**scores, "mean": sum(scores.values()) / len(scores)}

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Unit identity vectors [n, 64]."""
        return torch.cat([self.embedder(batch) for batch in as_tensor(images).split(64)])

    def identity_score(self, images: Images, references: Images) -> Tensor:
        """[n]: likeness of each picture's person to the references'; 1 for the same person, 0 for another, on average."""
        cosine = (self.embed(images) @ self.embed(references).T).mean(-1)
        return (cosine - self.likeness["zero"]) / (self.likeness["one"] - self.likeness["zero"])


def nearest_person(images: Images, scenes: Sequence[wide.Scene], people: Sequence[wide.Identity]) -> Tensor:
    """Distances [n, people]: mean absolute difference in grey levels of each picture from the true drawing of each person in that
    picture's scene. The smallest says who was drawn; no network takes part. People whom a scene's style cannot draw are infinitely
    far."""
    pictures = as_tensor(images)
    if len(pictures) != len(scenes):
        raise DataError(f"{len(pictures)} pictures for {len(scenes)} scenes: give one scene for each picture.")
    distances = torch.full((len(pictures), len(people)), math.inf)
    for row, scene in enumerate(scenes):
        able = [k for k, person in enumerate(people) if scene.style in wide.styles_for(person)]
        if able:
            drawn = np.stack([np.asarray(wide.render(people[k], scene), np.float32) for k in able])
            true = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
            distances[row, able] = (true - pictures[row]).abs().mean((1, 2, 3)) * 127.5
    return distances


@cache
def load_wide_judge(folder: Path = FOLDER) -> WideJudge:
    """The shipped judge of the wide world, in fp32 on the CPU; loaded once."""
    reader, embedder = WideReader(), IdentityEmbedder()
    stage = " --stage judge --world wide"
    accuracy = load_weights(Path(folder) / "reader.safetensors", reader, stage)
    likeness = load_weights(Path(folder) / "identity.safetensors", embedder, stage)
    return WideJudge(
        reader, embedder, {n: float(v) for n, v in accuracy.items()}, {n: float(v) for n, v in likeness.items()}
    )
