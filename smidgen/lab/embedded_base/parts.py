"""Train the parts reader of `smidgen.bases.embedded.parts_reader`: ``python -m
smidgen.lab.embedded_base.parts`` (about six minutes on one core).

Real drawings of training people in random poses, blurred and noisy as a decoder's output may be; measured on held-out
people.
"""

import argparse
import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.bases.embedded import pose
from smidgen.bases.embedded.parts_reader import FILE, PartsNetwork, PartsReader
from smidgen.lab.embedded_base.judge import blur
from smidgen.lab.embedded_base.run import save_weights
from smidgen.tasks.control.metrics import aacc, landmark_error, miou
from smidgen.tasks.data.images import to_tensor
from smidgen.training.randomness import stream

log = logging.getLogger(__name__)
RATE, WARMUP, POINTS_WEIGHT = 4e-3, 20, 0.05  # of a squared pixel of the landmarks beside the parts' cross-entropy


def drawn(count: int, split: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [n, 3, 64, 64] in -1..1, labels [n, 64, 64] and landmarks [n, 9, 2] of ``count`` random portraits."""
    rng = np.random.default_rng([seed, 300])
    portraits = [pose.sample_portrait(rng, split) for _ in range(count)]  # type: ignore[arg-type]
    labels = np.stack([portrait.parts() for portrait in portraits])
    points = np.stack([portrait.landmarks() for portrait in portraits])
    pictures = to_tensor([portrait.picture() for portrait in portraits])
    return pictures, torch.from_numpy(labels).long(), torch.from_numpy(points).float()


def train(steps: int, batch: int, count: int, seed: int = 0) -> PartsNetwork:
    """A network trained for ``steps`` of ``batch`` of ``count`` drawings."""
    torch.manual_seed(seed)
    pictures, labels, points = drawn(count, "train", seed)
    network = PartsNetwork().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        generator = stream(seed, "parts", step)
        rows = torch.randint(count, (batch,), generator=generator)
        logits, found = network(blur(pictures[rows], generator))
        distance = (found - points[rows]).square().mean()
        loss = nn.functional.cross_entropy(logits, labels[rows]) + POINTS_WEIGHT * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("step %d: loss %.3f, landmarks %.2f", step + 1, loss.item(), distance.item())
    return network


def measure(network: PartsNetwork, count: int, seed: int = 1) -> dict[str, float]:
    """What ``network`` reads right on drawings of held-out people."""
    pictures, labels, points = drawn(count, "test", seed)
    read, found = PartsReader(network, {}).read((pictures + 1) / 2)
    wanted = labels.numpy()
    scores = {"miou": miou(read, wanted, len(pose.PARTS)), "pixels": aacc(read, wanted)}
    return scores | {"landmarks": landmark_error(found, points.numpy())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--drawings", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    network = train(options.steps, options.batch, options.drawings)
    accuracy = measure(network, 500)
    log.info("on held-out people: %s", accuracy)
    save_weights(options.out, network, accuracy)


if __name__ == "__main__":
    main()
