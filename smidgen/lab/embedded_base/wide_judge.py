"""Stage `judge` in the wide world: the reader of words and colours, and the identity embedder, on real drawings, mildly spoilt.

A word that cannot be seen takes no part in the loss. Colours are learnt by the likelihood of a Gaussian whose width is read too, so
that a hidden one teaches doubt; afterwards one factor a colour makes the doubt fit half of the held-out drawings, and the other half
tells how well.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import wide
from smidgen.bases.embedded.judge import IdentityEmbedder
from smidgen.bases.embedded.wide_judge import UNSURE, WideReader, lab_tensor
from smidgen.lab.embedded_base import draw
from smidgen.lab.embedded_base.autoencoder import to_tensor
from smidgen.lab.embedded_base.config import Config
from smidgen.lab.embedded_base.judge import spoil
from smidgen.lab.embedded_base.run import PARTS, Run, save_weights

log = logging.getLogger(__name__)
NAMES = list(wide.ATTRIBUTES)


class Drawings:
    """The drawings of one split with what is known of them; ``seen`` [n, attributes] says what a picture tells."""

    def __init__(self, folder: Path, split: str):
        self.pictures, self.codes = draw.load(folder, split)
        shades = np.load(folder / f"colors_{split}.npy")
        self.lab = lab_tensor(torch.from_numpy(shades).float() / 255)
        self.seen = torch.from_numpy(seen_of(self.codes))

    def take(self, index: Tensor) -> Tensor:
        """Pictures in -1..1."""
        return to_tensor(self.pictures[index.numpy()])


def seen_of(codes: np.ndarray) -> np.ndarray:
    """`wide.seen` for rows of attribute codes, as [n, attributes] of bool."""
    rows = []
    for row in codes:
        words = {name: list(wide.ATTRIBUTES[name])[code] for name, code in zip(NAMES, row, strict=True)}
        person = wide.Identity(**{n: words[n] for n in wide.IDENTITY_ATTRIBUTES})
        rows.append(list(wide.seen(person, wide.Scene(**{n: words[n] for n in wide.SCENE_ATTRIBUTES})).values()))
    return np.array(rows)


def train(config: Config, folder: Path, out: Path) -> None:
    """Train both networks, measure them on held-out people, and write them to `out` in fp16."""
    torch.manual_seed(config.seed + 40)
    drawings = Drawings(folder, "train")
    reader, embedder = WideReader(), IdentityEmbedder()
    run = Run(folder / "wide_reader.safetensors", reader, config.wide_reader, ema=0.995, weight_decay=1e-2)
    run.train(lambda g: reading_loss(reader, drawings, config.wide_reader.batch // PARTS, g), config.seed + 41)
    accuracy = measure(run.average.eval(), folder)
    log.info("judge: %s", json.dumps(accuracy))
    save_weights(out / "reader.safetensors", run.average, accuracy)
    run = Run(folder / "wide_identity.safetensors", embedder, config.wide_likeness, ema=0.995, weight_decay=1e-2)
    run.train(
        lambda g: likeness_loss(embedder, drawings, config.wide_likeness.batch // PARTS // 2, g), config.seed + 42
    )
    calibration = likeness(run.average.eval(), Drawings(folder, "test"))
    log.info("identity: %s", json.dumps(calibration))
    save_weights(out / "identity.safetensors", run.average, calibration)


def reading_loss(model: nn.Module, drawings: Drawings, n: int, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the words that are seen, and the Gaussian likelihood of the colours that exist (in tens of Lab)."""
    index = torch.randint(len(drawings.codes), (n,), generator=generator)
    words, values, doubt = model(spoil(drawings.take(index), generator))
    wanted, seen = torch.from_numpy(drawings.codes[index.numpy()]), drawings.seen[index]
    total = torch.zeros(())
    for i, name in enumerate(NAMES):
        each = nn.functional.cross_entropy(words[name], wanted[:, i], reduction="none")
        total = total + (each * seen[:, i]).sum() / seen[:, i].sum().clamp_min(1)
    error = (values - drawings.lab[index]).square().sum(-1) / 100
    doubt = doubt.clamp(-4, 2)
    exists = torch.ones_like(error)
    exists[:, wide.COLORS.index("hat_color")] = (wanted[:, NAMES.index("hat")] != 0).float()
    return total + (exists * (3 * doubt + error * (-2 * doubt).exp() / 2)).sum() / n * 0.3


def likeness_loss(model: nn.Module, drawings: Drawings, n: int, generator: torch.Generator) -> Tensor:
    """Two pictures each of `n` people: the cosine of every two pictures shall be how much of what both show is alike."""
    people = torch.randint(len(drawings.codes) // 2, (n,), generator=generator)
    index = torch.stack([2 * people, 2 * people + 1], 1).flatten()
    vectors = model(spoil(drawings.take(index), generator))
    alike, weight = likeness_of(drawings, index)
    error = (vectors @ vectors.T - alike).square() * weight
    who = index // 2
    same = who[:, None] == who[None]
    return error[same].mean() + error[~same].mean() if (~same).any() else error.mean()


def likeness_of(drawings: Drawings, index: Tensor) -> tuple[Tensor, Tensor]:
    """[n, n] likeness of people, 0 to 1, and the share of it that both pictures show. Words are alike or not; colours by
    exp(-distance / 20)."""
    codes, lab, seen = torch.from_numpy(drawings.codes[index.numpy()]), drawings.lab[index], drawings.seen[index]
    total, weight = torch.zeros(()), torch.zeros(())
    for name in wide.IDENTITY_ATTRIBUTES:
        column = NAMES.index(name)
        if name in wide.FREE:
            alike = (-torch.cdist(lab[:, wide.COLORS.index(name)], lab[:, wide.COLORS.index(name)]) / 20).exp()
        else:
            alike = (codes[:, None, column] == codes[None, :, column]).float()
        shown = (seen[:, None, column] & seen[None, :, column]).float() * (0.4 if name == "brows" else 1)
        total, weight = total + alike * shown, weight + shown
    return total / weight.clamp_min(1e-6), weight / 4.4


@torch.no_grad()
def readings(model: nn.Module, drawings: Drawings) -> tuple[Tensor, Tensor, Tensor]:
    """Words read [n, attributes], colours [n, 5, 3], sigma [n, 5] before calibration, of all drawings."""
    parts = []
    for start in range(0, len(drawings.codes), 256):
        words, values, doubt = model(to_tensor(drawings.pictures[start : start + 256]))
        parts.append((torch.stack([words[n].argmax(-1) for n in NAMES], -1), values, doubt.exp() * 10))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


def measure(model: nn.Module, folder: Path) -> dict[str, float]:
    """Shares right where seen; mean distance in Lab where seen, for unseen ranges too; the factor that calibrates doubt, from
    the first half of the held-out drawings, and the share of errors within two calibrated sigmas (.74 for a Gaussian of three numbers) on the second."""
    test = Drawings(folder, "test")
    words, values, sigma = readings(model, test)
    right = words == torch.from_numpy(test.codes)
    found = {name: right[test.seen[:, i], i].float().mean().item() for i, name in enumerate(NAMES)}
    half = len(values) // 2
    for k, name in enumerate(wide.COLORS):
        seen = visible(test, name)
        error = (values[:, k] - test.lab[:, k]).norm(dim=-1)
        found[f"{name}_lab"] = error[seen].mean().item()
        ratio = (error / sigma[:, k]).square() / 3
        first, second = seen.clone(), seen.clone()
        first[half:], second[:half] = False, False
        spread = ratio[first].mean().sqrt().item()
        found[f"{name}_spread"] = spread
        found[f"{name}_within_two"] = (ratio[second].mul(3).sqrt() < 2 * spread).float().mean().item()
        doubted = sigma[:, k] * spread > UNSURE
        found[f"{name}_unsure_when_seen"] = doubted[seen].float().mean().item()
        if (~seen).any() and name != "hat_color":
            found[f"{name}_unsure_when_hidden"] = doubted[~seen].float().mean().item()
    away = Drawings(folder, "range")
    _, values, _ = readings(model, away)
    for name in wide.FREE:
        k, seen = wide.COLORS.index(name), visible(away, name)
        found[f"{name}_lab_in_held_ranges"] = (values[:, k] - away.lab[:, k]).norm(dim=-1)[seen].mean().item()
    return found


def visible(drawings: Drawings, name: str) -> Tensor:
    """[n] of bool: the colour `name` is there and can be told."""
    seen = drawings.seen[:, NAMES.index(name)]
    if name == "hat_color":
        seen = seen & torch.from_numpy(drawings.codes[:, NAMES.index("hat")] != 0)
    return seen


@torch.no_grad()
def likeness(model: nn.Module, drawings: Drawings) -> dict[str, float]:
    """Mean cosine of the same person in two scenes and of two people, and how often the same person's is the higher (AUC)."""
    vectors = torch.cat([model(to_tensor(drawings.pictures[s : s + 256])) for s in range(0, len(drawings.codes), 256)])
    cosine = vectors[0::2] @ vectors[1::2].T
    same, other = cosine.diagonal(), cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    auc = (same[:, None] > other[None]).float().mean().item()
    rank = (cosine.argmax(1) == torch.arange(len(cosine))).float().mean().item()
    return {"one": same.mean().item(), "zero": other.mean().item(), "auc": auc, "rank_one": rank}
