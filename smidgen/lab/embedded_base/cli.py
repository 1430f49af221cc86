"""``python -m smidgen.lab.embedded_base``: the stages by name."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

import smidgen.bases.embedded as embedded
from smidgen.bases.embedded.worlds import WORLDS
from smidgen.lab.embedded_base import (
    autoencoder,
    card,
    diffusion,
    draw,
    encoders,
    flow,
    judge,
    wide_encoders,
    wide_judge,
)
from smidgen.lab.embedded_base import export as exporting
from smidgen.lab.embedded_base.config import PRESETS, Config, preset
from smidgen.training.alone import alone

STAGES = ("render", "judge", "encoders", "autoencoder", "latents", "diffusion", "decoder", "export", "card")
APART = ("flow",)  # a base of its own, on parts of the other


def judge_of(config: Config, folder: Path, out: Path) -> None:
    """The judge of the world that is drawn."""
    if config.world == "wide":
        wide_judge.train(config, folder, out / "wide_judge_weights")
    else:
        judge.train(config, folder, out / "judge_weights")


def encoders_of(config: Config, folder: Path, out: Path) -> None:
    """What sees photos of the world that is drawn."""
    if config.world == "wide":
        wide_encoders.train(config, folder, out)
    else:
        encoders.train(config, folder, out)


def run(stage: str, config: Config, folder: Path, out: Path) -> None:
    """One stage, or ``"all"`` of those that make what is shipped, in order. `folder` holds drawings and checkpoints and what
    is not shipped, `out` gets what is."""
    torch.set_num_threads(1)
    actions = {
        "render": lambda: draw.render(config, folder),
        "judge": lambda: judge_of(config, folder, out),
        "encoders": lambda: encoders_of(config, folder, out / "encoder_weights"),
        "autoencoder": lambda: autoencoder.autoencode(config, folder, out),
        "latents": lambda: autoencoder.freeze(config, folder),
        "diffusion": lambda: diffusion.train(config, folder),
        "decoder": lambda: autoencoder.fine_tune_decoder(config, folder),
        "export": lambda: exporting.export(config, folder, out / "pipeline"),
        "card": lambda: card.write(config, folder, out / "pipeline"),
        "flow": lambda: flow.make(config, folder, out),
    }
    for name in STAGES if stage == "all" else (stage,):
        actions[name]()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m smidgen.lab.embedded_base", description=__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "all", *APART), default="all")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    parser.add_argument("--work", type=Path, default=Path("work/embedded_base"), help="drawings, caches, checkpoints")
    parser.add_argument("--out", type=Path, default=Path(embedded.__file__).parent, help="where the shipped folders go")
    parser.add_argument(
        "--world", choices=tuple(WORLDS), default="embedded", help="what is drawn; each has its own --work"
    )
    choice = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with alone(choice.work):
        run(choice.stage, preset(choice.preset, world=choice.world), choice.work, choice.out)
    return 0
