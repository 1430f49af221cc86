"""The picture encoders of the embedded base: what a generator of adapters sees of a photo.

`FaceEncoder` (a convolutional network) reads who a person is and whether there is a face at all, `SceneEncoder` (a patch
transformer) reads everything there is to see. They stand where ArcFace and CLIP stand beside a real base. Trained on real
drawings of training people by ``python -m smidgen.lab.embedded_base --stage encoders``; the judge is other
networks, trained apart, and takes no part in them.

Example:
    >>> face = load_encoder("face")
    >>> face.embed([world.render(identity, scene)]).shape
    torch.Size([1, 128])
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from smidgen.bases.embedded import world
from smidgen.bases.embedded.judge import Images, as_tensor, load_weights

FOLDER = Path(__file__).parent / "encoder_weights"


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())


class Encoder(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> features [n, width]; ``heads`` read attributes from them in training."""

    width = 128
    attributes: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({n: nn.Linear(self.width, len(world.ATTRIBUTES[n])) for n in self.attributes})

    def forward(self, pictures: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """Attribute name -> logits [n, words]."""
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Features [n, width] of pictures of any size."""
        return torch.cat([self(batch) for batch in as_tensor(images).split(64)])


class FaceEncoder(Encoder):
    """Who: hair, hair colour, skin, facial hair; and whether a face is there."""

    attributes = tuple(world.IDENTITY_ATTRIBUTES)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(3, 32, 5, 2), _block(32, 48, 3, 2), _block(48, 96, 3, 2), _block(96, 96, 3, 1), _block(96, 128, 3, 2),
            nn.Flatten(), nn.Linear(128 * 16, self.width),
        )  # fmt: skip
        self.there = nn.Linear(self.width, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.trunk(pictures)  # type: ignore[no-any-return]

    @torch.no_grad()
    def faces(self, features: Tensor) -> Tensor:
        """[n]: how likely each picture shows a face, 0 to 1."""
        return self.there(features).squeeze(-1).sigmoid()  # type: ignore[no-any-return]


class SceneEncoder(Encoder):
    """Everything: eyes, mouth, clothes, glasses, background, and the person."""

    attributes = tuple(world.ATTRIBUTES)

    def __init__(self, inner: int = 96, depth: int = 3, patch: int = 8) -> None:
        super().__init__()
        side = world.SIZE // patch
        self.patches = nn.Conv2d(3, inner, patch, patch)
        self.places = nn.Parameter(torch.randn(1, side * side, inner) * 0.02)
        layer = nn.TransformerEncoderLayer(inner, 4, 3 * inner, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(2 * inner), nn.Linear(2 * inner, self.width))

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.layers(self.patches(pictures).flatten(2).mT + self.places)
        return self.out(torch.cat([tokens.mean(1), tokens.amax(1)], -1))  # type: ignore[no-any-return]


KINDS: dict[str, type[Encoder]] = {"face": FaceEncoder, "scene": SceneEncoder}


@cache
def load_encoder(name: str, folder: Path = FOLDER) -> Encoder:
    """The shipped encoder ``face`` or ``scene``, frozen, in fp32 on the CPU; loaded once."""
    network = KINDS[name]()
    load_weights(folder / f"{name}.safetensors", network, " --stage encoders")
    return network
