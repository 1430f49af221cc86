"""The network that sees a photo of the wide world for a generator of adapters: who is there, in what scene, in which colours.

One trunk, read in two ways: ``who`` of a person (hair, facial hair, eyebrows; colours of hair and skin in Lab as they are in normal
light, with how sure it is of them) and the ``scene``. Trained on drawings of training people in any light, 0.8 to 1.25 times as large
and moved by a tenth of the picture, by ``python -m smidgen.lab.embedded_base --stage encoders --world wide``; the
judge is other networks, trained apart, and takes no part in it.

Example:
    >>> seen = load_wide_encoder().see([wide.render(person, scene)])
    >>> seen.who.shape, seen.scene.shape
    (torch.Size([1, 104]), torch.Size([1, 96]))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from smidgen.bases.embedded import wide
from smidgen.bases.embedded.judge import Images, as_tensor, block, load_weights
from smidgen.bases.embedded.wide_judge import looked_at

FILE = Path(__file__).parent / "encoder_weights" / "wide.safetensors"
WIDTH = 96
FREE = [wide.COLORS.index(name) for name in wide.FREE]


@dataclass(frozen=True)
class Seen:
    """What is seen of n pictures: word logits of each attribute; `wide.COLORS` in Lab [n, 5, 3] with the log of their doubt [n, 5];
    and as features ``who`` [n, 104] and ``scene`` [n, 96], and whether a face is there [n], 0 to 1."""

    words: dict[str, Tensor]
    colors: Tensor
    doubt: Tensor
    who: Tensor
    scene: Tensor
    face: Tensor


class WideEncoder(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> :class:`Seen`. Colours are the mean of the cells that it chooses to look at, divided by the light."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 32, 5, 2), block(32, 64, 3, 2)
        self.third = nn.Sequential(block(64, 112, 3, 2), block(112, 112, 3, 1))
        self.trunk = nn.Sequential(block(112, 112, 3, 2), nn.Flatten(), nn.Linear(112 * 16, 224), nn.ReLU())
        self.who, self.scene = nn.Linear(224, WIDTH), nn.Linear(224, WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(words)) for name, words in wide.ATTRIBUTES.items()})
        self.looks = nn.ModuleList([nn.Conv2d(width, len(wide.COLORS), 1) for width in (32, 64, 112)])
        self.doubt, self.there = nn.Linear(224, len(wide.COLORS)), nn.Linear(224, 1)

    def forward(self, pictures: Tensor) -> Seen:
        first = self.first(pictures)
        second = self.second(first)
        third = self.third(second)
        features = self.trunk(third)
        who, scene = self.who(features).float(), self.scene(features).float()
        words = {
            name: head(who if name in wide.IDENTITY_ATTRIBUTES else scene).float() for name, head in self.heads.items()
        }
        colors = looked_at(self.looks, (first, second, third), pictures, words["light"])
        doubt, there = self.doubt(features).float(), self.there(features).float().squeeze(-1).sigmoid()
        seen = torch.cat([who, colors[:, FREE].flatten(1) / 30, doubt[:, FREE]], 1)
        return Seen(words, colors, doubt, seen, scene, there)

    @torch.no_grad()
    def see(self, images: Images) -> Seen:
        """What it sees of pictures of any size."""
        parts = [self(batch) for batch in as_tensor(images).split(64)]
        words = {name: torch.cat([part.words[name] for part in parts]) for name in wide.ATTRIBUTES}
        return Seen(
            words, *(torch.cat([getattr(part, name) for part in parts]) for name in list(Seen.__annotations__)[1:])
        )


@cache
def load_wide_encoder(file: Path = FILE) -> WideEncoder:
    """The shipped encoder, frozen, in fp32 on the CPU; loaded once.

    Raises:
        SmidgenError: its file is not there.
    """
    network = WideEncoder()
    load_weights(file, network, " --stage encoders --world wide")
    return network
