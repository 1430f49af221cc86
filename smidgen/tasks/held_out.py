"""Inputs that an adapter was not trained on, to judge an export by or to weigh it with (``training.truncation``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.bases.protocol import ImageBase
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import read_folder
from smidgen.tasks.diffusion.task import encode_examples
from smidgen.tasks.finetune.course import Prepared
from smidgen.tasks.image_classification import recipe as image_classification
from smidgen.tasks.image_classification.settings import ImageClassificationConfig
from smidgen.tasks.instruction import recipe as instruction
from smidgen.tasks.instruction.settings import InstructionConfig
from smidgen.tasks.instruction.task import InstructionTask
from smidgen.tasks.personalize.settings import Data, PersonalizeConfig
from smidgen.tasks.text_classification import recipe as text_classification
from smidgen.tasks.text_classification.settings import TextClassificationConfig
from smidgen.tasks.text_classification.task import Encoded
from smidgen.training.randomness import derive, stream
from smidgen.training.settings import load_yaml
from smidgen.training.truncation import Run

SCENES, ROWS = 64, 256  # prompts that are drawn to judge by, and noisy latents of them
FEW_SCENES, FEW = 8, 64  # the same to weigh with; so many rows of those to judge by are searched by
FEW_READ = 256  # rows of data to weigh with, and of those to judge by to search by
# settings, what prepares them, and rows to judge by: as many as take seconds
RECIPES: dict[str, tuple[type[Any], Callable[[Any], Prepared], int]] = {
    "text-classification": (TextClassificationConfig, text_classification.prepare, 1024),
    "image-classification": (ImageClassificationConfig, image_classification.prepare, 256),
    "instruction": (InstructionConfig, instruction.prepare, 256),
}


@dataclass(frozen=True)
class HeldOut:
    """Passes over rows, words for them, passes over some of the rows, to search by, and how many sources take turns in them."""

    run: Run
    words: str
    few: Run
    groups: int | None = None


def image_rows(base: ImageBase, folder: Path, pictures: str | None, weighs: bool) -> tuple[HeldOut, HeldOut | None]:
    """Rows to judge an adapter by that is on ``base`` and lies in ``folder``, and others to weigh it with: of the ``pictures`` in a
    folder, unless that is None; none unless it ``weighs``. Where nothing was given the base draws them with the adapter.

    Raises:
        DataError: no usable pictures.
    """
    scenes = _subject(base.scenes(SCENES + FEW_SCENES, 0), folder)
    others = scenes[1 :: max(2, len(scenes) // FEW_SCENES)]
    judging = [scene for scene in scenes if scene not in others]
    judged = noisy_latents(base, judging, drawn_latents(base, judging, 0, -(-ROWS // len(judging))), 0)
    if not weighs:
        return judged, None
    if pictures is None:
        return judged, noisy_latents(base, others, drawn_latents(base, others, 1, -(-FEW // len(others))), 1)
    found = read_folder(pictures, instance_prompt=others[0])
    encoded = encode_examples(base, found.pictures, found.captions, base.resolution)
    latents = torch.cat([encoded.mean] * -(-FEW // len(encoded)))
    weighing = noisy_latents(base, found.captions, latents, 1)
    return judged, replace(weighing, words=f"{len(latents)} noisy latents of the pictures in {Path(pictures).name}")


def task_rows(
    task: str, model: Any, folder: Path, base: str, given: str | None, weighs: bool
) -> tuple[HeldOut, HeldOut | None]:
    """Rows to judge an adapter by that lies in ``folder`` and was trained by the recipe ``task``, and others to weigh it with: the
    validation and the train split of the data ``given``, or of those that it was trained on.

    Raises:
        SmidgenError: there are none.
    """
    settings, prepare, rows = RECIPES[task]
    told = folder / "config.yaml"
    config = load_yaml(settings, told) if told.is_file() else settings()
    if given is None and config.data.path is None:
        raise ConfigError(f"{folder} does not say what it was trained on: name such data with --calibration.")
    config = replace(config, model=base, data=replace(config.data, path=given or config.data.path))
    read = prepare(config).task
    return answers(read, model, "validation", rows), answers(read, model, "train", FEW_READ) if weighs else None


def _subject(scenes: Sequence[str], folder: Path) -> list[str]:
    """Scenes of a person as scenes of the subject that an adapter's training named, if its folder still says."""
    try:
        data = load_yaml(PersonalizeConfig, folder / "config.yaml").data
    except ConfigError:  # none, or of another recipe
        data = Data()
    word = f"{data.placeholder_token} {data.class_word}" if data.placeholder_token else data.class_word
    return [scene.replace("person", word) for scene in scenes]


def noisy_latents(base: ImageBase, prompts: Sequence[str], latents: Tensor, seed: int, batch: int = 8) -> HeldOut:
    """What the denoiser says of ``latents`` [n, ...] at n noise levels from end to end, each row with one of the ``prompts`` in
    turn. All of it follows from the ``seed``."""
    count = len(latents)
    encoded = base.encode_prompts(prompts)
    picks = [row % len(prompts) for row in range(count)]
    order = torch.randperm(count, generator=stream(seed, "levels"))
    quantiles = (order + torch.rand(count, generator=stream(seed, "within"))).double() / count
    times = base.schedule.timesteps(base.schedule.levels(quantiles))
    noisy, _ = base.schedule.add_noise(latents, torch.randn(latents.shape, generator=stream(seed, "noise")), times)

    def run(most: int = count) -> list[Tensor]:
        found = []
        for at in range(0, min(most, count), batch):
            rows = slice(at, at + batch)
            given = noisy[rows].to(base.device), times[rows].to(base.device), encoded[picks[rows]].to(base.device)
            found.append(base.predict(base.model, *given).float().cpu())
        return found

    return HeldOut(run, f"{count} noisy latents of {len(prompts)} prompts", lambda: run(FEW), len(prompts))


def drawn_latents(base: ImageBase, prompts: Sequence[str], seed: int, copies: int) -> Tensor:
    """Latents [prompts * copies, ...] that ``base`` with its adapter draws of the ``prompts``, each ``copies`` times over."""
    seeds = [derive(seed, "drawn", number) for number in range(len(prompts))]
    options: dict[str, Any] = base.sampling.chosen(None, None) | {"negative": base.encode_prompts([""])}
    drawn = base.draw_latents(base.encode_prompts(prompts), seeds, **options)
    return torch.cat([drawn] * copies)


def answers(task: Any, model: Any, split: str, most: int) -> HeldOut:
    """What a model says of the first ``most`` rows of a split of its task: logits of classes, log-likelihoods of an answer's tokens."""
    whole = task.splits[split]

    def first(most: int) -> Any:
        if isinstance(whole, Encoded):
            return replace(whole, rows=whole.rows[:most], labels=whole.labels[:most], names=whole.names[:most])
        return whole[:most]

    own = replace(task, splits={"all": first(most), "few": first(min(most, FEW_READ))})
    likelihoods = slice(1) if isinstance(task, InstructionTask) else slice(None)

    def run(part: str = "all") -> Tensor:
        return own.predict(model, part)[:, likelihoods]

    return HeldOut(run, f"{len(own.splits['all'])} rows of {split}", lambda: run("few"))
