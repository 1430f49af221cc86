"""The judge: small networks, trained on real drawings only, that score what a model has drawn.

`AttributeReader` reads every attribute of a picture; `IdentityEmbedder`, another architecture trained apart, says how
alike two people are. Both saw only training identities. Neither takes part in any model's training, so their scores
are independent; print the reader's own accuracy on held-out drawings (`Judge.accuracy`) beside every score.

Example:
    >>> judge = load_judge()
    >>> judge.read([world.render(identity, scene)])["background"]
    ['teal']
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from smidgen.bases.embedded import world
from smidgen.bases.embedded.layers import tensors_of
from smidgen.errors import DataError, SmidgenError

FOLDER = Path(__file__).parent / "judge_weights"
Images = Tensor | Sequence[Any]
"""A float tensor [n, 3, 64, 64] in 0..1, or a list of PIL images."""


def block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class AttributeReader(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> attribute name -> logits [n, words]. 0.6 M numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            block(3, 24, 5, 2), block(24, 48, 3, 2), block(48, 96, 3, 2), block(96, 96, 3, 1), block(96, 96, 3, 2),
            nn.Flatten(), nn.Linear(96 * 16, 192), nn.ReLU(), nn.Dropout(0.1),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(words)) for name, words in world.ATTRIBUTES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        return {name: head(features) for name, head in self.heads.items()}


class IdentityEmbedder(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> unit vectors [n, 64]: near for the same person, whatever the scene. 0.4 M numbers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(4)]
        for inputs, outputs, stride in ((48, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, width))

    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.normalize(self.trunk(pictures), dim=-1)


def as_tensor(images: Images) -> Tensor:
    """Images -> float [n, 3, 64, 64] in -1..1; other sizes are resized (area)."""
    if not isinstance(images, Tensor):
        arrays = [np.asarray(image.convert("RGB"), np.float32) for image in images]
        if not arrays:
            raise DataError("No images to judge: give at least one.")
        images = torch.stack([torch.from_numpy(a) for a in arrays]).permute(0, 3, 1, 2) / 255
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"The judge reads [n, 3, height, width] tensors in 0..1, not {tuple(images.shape)}.")
    if images.shape[2:] != (world.SIZE, world.SIZE):
        images = nn.functional.interpolate(images.float(), (world.SIZE, world.SIZE), mode="area")
    return images.float() * 2 - 1


class Judge:
    """Reads pictures. `accuracy`: the reader's own share right per attribute, on drawings of held-out identities."""

    def __init__(
        self, reader: AttributeReader, embedder: IdentityEmbedder, accuracy: dict[str, float], zero: float, one: float
    ):
        self.reader, self.embedder = reader.eval(), embedder.eval()
        self.accuracy, self._zero, self._one = accuracy, zero, one

    @torch.no_grad()
    def read(self, images: Images) -> dict[str, list[str]]:
        """Attribute name -> the word read in each picture."""
        logits = self.reader(as_tensor(images))
        return {name: [list(world.ATTRIBUTES[name])[i] for i in logits[name].argmax(-1)] for name in world.ATTRIBUTES}

    def caption_score(self, images: Images, scenes: Sequence[world.Scene]) -> dict[str, float]:
        """Scene attribute -> share of pictures in which it reads as asked, and ``"mean"`` over the attributes.

        Hidden eyes are not counted; an attribute nowhere to be seen is left out.
        """
        words = self.read(images)
        if len(words["eyes"]) != len(scenes):
            raise DataError(f"{len(words['eyes'])} pictures for {len(scenes)} scenes: give one scene for each picture.")
        scores = {}
        for name in world.SCENE_ATTRIBUTES:
            asked = [
                (getattr(s, name), w) for s, w in zip(scenes, words[name], strict=True) if getattr(s, name) != "hidden"
            ]
            if asked:
                scores[name] = sum(a == w for a, w in asked) / len(asked)
        return {**scores, "mean": sum(scores.values()) / len(scores)}

    def identity_score(self, images: Images, references: Images) -> Tensor:
        """[n]: mean likeness of each picture's person to the reference pictures' person.

        Cosine of the embeddings, shifted and scaled so that on held-out people the same person in another scene
        averages 1 and another person averages 0 (people who share some attributes lie between).
        """
        cosine = self.embed(images) @ self.embed(references).T
        return (cosine.mean(-1) - self._zero) / (self._one - self._zero)

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Unit identity vectors [n, 64]."""
        return self.embedder(as_tensor(images))


def load_weights(path: Path, module: nn.Module, stage: str) -> dict[str, str]:
    """Fills ``module``, frozen and in fp32, from a file that ships; returns the file's metadata.

    Raises:
        SmidgenError: it is not there; ``stage`` of the recipe makes it.
    """
    try:
        module.load_state_dict({name: value.float() for name, value in tensors_of(path).items()})
        module.requires_grad_(False).eval()
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except OSError as error:
        raise SmidgenError(
            f"{path} is missing: reinstall smidgen, or train it with `python -m smidgen.lab.embedded_base{stage}` (minutes)."
        ) from error


@cache
def load_judge(folder: Path = FOLDER) -> Judge:
    """The shipped judge, in fp32 on the CPU; loaded once."""
    reader, embedder = AttributeReader(), IdentityEmbedder()
    accuracy = load_weights(Path(folder) / "reader.safetensors", reader, " --stage judge")
    calibration = load_weights(Path(folder) / "identity.safetensors", embedder, " --stage judge")
    return Judge(
        reader,
        embedder,
        {n: float(accuracy[n]) for n in world.ATTRIBUTES},
        float(calibration["zero"]),
        float(calibration["one"]),
    )
