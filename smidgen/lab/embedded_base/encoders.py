"""Stage `encoders`: train the face and the scene encoder on real drawings, mildly spoilt as for the judge.

The face encoder also learns what is no face: drawings with their patches shuffled, bits of clothes and background, plain
colours, smooth and rough noise.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import world
from smidgen.bases.embedded.encoders import KINDS, Encoder, FaceEncoder
from smidgen.lab.embedded_base import draw
from smidgen.lab.embedded_base.autoencoder import to_tensor
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.judge import spoil
from smidgen.lab.embedded_base.run import PARTS, Run, save_weights

log = logging.getLogger(__name__)
FACELESS = 0.25  # pictures without a face, as a share of those with one


def train(config: Config, folder: Path, out: Path) -> None:
    """Train both encoders, measure them on held-out identities, and write them to `out` in fp16."""
    pictures, codes = draw.load(folder, "train")
    for offset, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(config.seed + 40 + offset)
        network = kind()
        run = Run(folder / f"encoder_{name}.safetensors", network, config.encoders, weight_decay=1e-2)
        run.train(
            lambda g, model=network: _loss(model, pictures, codes, config.encoders.batch // PARTS, g),  # type: ignore[misc]
            config.seed + 42 + offset,
        )
        found = measure(run.average.eval(), folder, config.seed)  # type: ignore[arg-type]
        log.info("%s: %s", name, json.dumps(found))
        save_weights(out / f"{name}.safetensors", run.average, found)


def _loss(model: Encoder, pictures: np.ndarray, codes: np.ndarray, n: int, generator: torch.Generator) -> Tensor:
    """Cross-entropy summed over the attributes, and for the face encoder that of face or none."""
    index = torch.randint(len(pictures), (n,), generator=generator)
    faces = spoil(to_tensor(pictures[index.numpy()]), generator)
    strange = faceless(faces[: max(1, int(n * FACELESS))], generator) if isinstance(model, FaceEncoder) else faces[:0]
    features = model(torch.cat([faces, strange]))
    wanted = torch.from_numpy(codes[index.numpy()])
    columns = list(world.ATTRIBUTES)
    losses = [
        nn.functional.cross_entropy(logits, wanted[:, columns.index(name)])
        for name, logits in model.read(features[:n]).items()
    ]
    if isinstance(model, FaceEncoder):
        there = (torch.arange(len(features)) < n).float()
        losses.append(nn.functional.binary_cross_entropy_with_logits(model.there(features).squeeze(-1), there))
    return torch.stack(losses).sum()


def faceless(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """As many pictures [n, 3, 64, 64] in -1..1 that show no face, made from portraits and noise."""
    kinds = torch.randint(5, (len(pictures),), generator=generator).tolist()
    return torch.stack([_strange(p, kind, generator) for p, kind in zip(pictures, kinds, strict=True)])


def _strange(picture: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    if kind == 0:  # patches shuffled
        side = (8, 16)[int(torch.randint(2, (), generator=generator))]
        patches = nn.functional.unfold(picture[None], side, stride=side)
        order = torch.randperm(patches.shape[-1], generator=generator)
        return nn.functional.fold(patches[..., order], world.SIZE, side, stride=side)[0]
    if kind == 1:  # a bit of clothes or background
        top, left = (int(t) for t in torch.randint(2, (2,), generator=generator))
        corner = picture[:, 46:, 24 * left : 24 * left + 40] if top else picture[:, :14, 50 * left : 50 * left + 14]
        return nn.functional.interpolate(corner[None], (world.SIZE, world.SIZE), mode="bilinear")[0]
    if kind == 2:  # one colour, a little rough
        return (uniform(3, 1, 1) + uniform(3, world.SIZE, world.SIZE) * 0.1).clamp(-1, 1)
    cells = 64 if kind == 3 else int(2 ** torch.randint(1, 5, (), generator=generator))
    return nn.functional.interpolate(uniform(1, 3, cells, cells), (world.SIZE, world.SIZE), mode="bilinear")[0]


@torch.no_grad()
def measure(model: Encoder, folder: Path, seed: int) -> dict[str, float]:
    """Share of held-out drawings in which each attribute is read right (eyes where they can be seen); for the face
    encoder also the shares of pictures with and without a face that are taken for what they are."""
    pictures, codes = draw.load(folder, "test")
    features = torch.cat([model(to_tensor(pictures[at : at + 256])) for at in range(0, len(pictures), 256)])
    columns, found = list(world.ATTRIBUTES), {}
    seen = torch.from_numpy(codes[:, columns.index("eyes")] != list(world.EYES).index("hidden"))
    for name, logits in model.read(features).items():
        right = logits.argmax(-1) == torch.from_numpy(codes[:, columns.index(name)])
        found[name] = float((right[seen] if name == "eyes" else right).float().mean())
    if isinstance(model, FaceEncoder):
        strange = faceless(to_tensor(pictures[:256]), torch.Generator().manual_seed(seed))
        found["face"] = float((model.faces(features) > 0.5).float().mean())
        found["no_face"] = float((model.faces(model(strange)) <= 0.5).float().mean())
    return found
