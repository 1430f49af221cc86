"""Stage `judge`: train the attribute reader and the identity embedder on real drawings, mildly spoilt.

Spoiling (noise, blur, a shift of a pixel, a change of light) makes them read a decoder's output as fairly as a
drawing.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import world
from smidgen.bases.embedded.judge import AttributeReader, IdentityEmbedder
from smidgen.lab.embedded_base import draw
from smidgen.lab.embedded_base.autoencoder import to_tensor
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.run import PARTS, Run, save_weights

log = logging.getLogger(__name__)
IDENTITY_COLUMNS = [list(world.ATTRIBUTES).index(name) for name in world.IDENTITY_ATTRIBUTES]


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n, 3, 64, 64] in -1..1 with a random shift, blur, light and noise, each mild and drawn per picture."""
    dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return blur(pictures.roll((dy, dx), (2, 3)), generator)


def blur(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, light and noise, but nothing moved."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1, 1, 1)), generator=generator)

    padded = nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    blurred = nn.functional.avg_pool2d(padded, 3, 1)
    pictures = torch.lerp(pictures, blurred, uniform(-0.3, 0.9))
    pictures = pictures * uniform(0.95, 1.05) + uniform(-0.04, 0.04, 3, 1, 1)
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + noise * uniform(0, 0.12)).clamp(-1, 1)


def train(config: Config, folder: Path, out: Path) -> None:
    """Train both networks, measure them on held-out identities, and write them to `out` in fp16."""
    torch.manual_seed(config.seed + 10)
    pictures, codes = draw.load(folder, "train")
    reader, embedder = AttributeReader(), IdentityEmbedder()
    reader_run = Run(folder / "judge_reader.safetensors", reader, config.judge, weight_decay=1e-2)
    reader_run.train(lambda g: _reading_loss(reader, pictures, codes, config.judge.batch // PARTS, g), config.seed + 11)
    identity_run = Run(folder / "judge_identity.safetensors", embedder, config.judge, weight_decay=1e-2)
    pairs = _people(codes)
    identity_run.train(
        lambda g: _likeness_loss(embedder, pictures, codes, pairs, config.judge.batch // PARTS // 2, g),
        config.seed + 12,
    )
    accuracy = measure_reader(reader_run.average.eval(), folder)
    log.info("judge: %s", json.dumps(accuracy))
    save_weights(out / "reader.safetensors", reader_run.average, accuracy)
    calibration = measure_likeness(identity_run.average.eval(), config.seed)
    log.info("identity: %s", json.dumps(calibration))
    save_weights(out / "identity.safetensors", identity_run.average, calibration)


def _take(pictures: np.ndarray, index: Tensor, generator: torch.Generator) -> Tensor:
    return spoil(to_tensor(pictures[index.numpy()]), generator)


def _reading_loss(
    model: nn.Module, pictures: np.ndarray, codes: np.ndarray, n: int, generator: torch.Generator
) -> Tensor:
    """Cross-entropy summed over the attributes."""
    index = torch.randint(len(pictures), (n,), generator=generator)
    logits = model(_take(pictures, index, generator))
    wanted = torch.from_numpy(codes[index.numpy()])
    return torch.stack([nn.functional.cross_entropy(logits[a], wanted[:, i]) for i, a in enumerate(logits)]).sum()


def _people(codes: np.ndarray) -> list[np.ndarray]:
    """The picture numbers of each identity drawn at least twice."""
    _, person = np.unique(codes[:, IDENTITY_COLUMNS], axis=0, return_inverse=True)
    order = np.argsort(person.ravel(), kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(person.ravel()[order])) + 1)
    return [group for group in groups if len(group) > 1] or groups


def _likeness_loss(
    model: nn.Module,
    pictures: np.ndarray,
    codes: np.ndarray,
    people: list[np.ndarray],
    n: int,
    generator: torch.Generator,
) -> Tensor:
    """Two pictures each of `n` people: the cosine of every two pictures shall be their share of equal identity
    attributes."""
    chosen = torch.randint(len(people), (n,), generator=generator).tolist()
    two = torch.rand(n, 2, generator=generator)
    index = torch.tensor(
        [[int(people[p][int(u * len(people[p]))]) for u in us] for p, us in zip(chosen, two.tolist(), strict=True)]
    )
    vectors = model(_take(pictures, index.flatten(), generator))
    words = torch.from_numpy(codes[index.flatten().numpy()][:, IDENTITY_COLUMNS])
    share = (words[:, None] == words[None]).float().mean(-1)
    error = (vectors @ vectors.T - share).square()
    same = share == 1
    return error[same].mean() + error[~same].mean() if (~same).any() else error.mean()


@torch.no_grad()
def measure_reader(model: nn.Module, folder: Path) -> dict[str, float]:
    """Share of held-out drawings in which each attribute is read right; eyes only where they can be seen."""
    pictures, codes = draw.load(folder, "test")
    right = []
    for start in range(0, len(pictures), 256):
        logits = model(to_tensor(pictures[start : start + 256]))
        right.append(torch.stack([logits[name].argmax(-1) for name in world.ATTRIBUTES], -1))
    equal = torch.cat(right).numpy() == codes
    hidden = codes[:, list(world.ATTRIBUTES).index("eyes")] == list(world.EYES).index("hidden")
    return {
        name: float(equal[~hidden, i].mean() if name == "eyes" else equal[:, i].mean())
        for i, name in enumerate(world.ATTRIBUTES)
    }


@torch.no_grad()
def measure_likeness(model: nn.Module, seed: int, people: int = 150) -> dict[str, float]:
    """Mean cosine of held-out people with themselves in another scene ("one") and with others ("zero"), and how well
    the two kinds of pair are told apart ("auc")."""
    rng = np.random.default_rng([seed, 77])
    everyone = list(world.identities("test"))
    chosen = [everyone[i] for i in rng.choice(len(everyone), people, replace=False)]
    drawn = [[np.asarray(world.render(p, world.sample_scene(rng))) for p in chosen] for _ in range(2)]
    first, second = (model(to_tensor(np.stack(d))) for d in drawn)
    cosine = first @ second.T
    same, other = cosine.diagonal(), cosine[~torch.eye(people, dtype=torch.bool)]
    auc = (same[:, None] > other[None]).float().mean().item()
    return {"one": same.mean().item(), "zero": other.mean().item(), "auc": auc}
