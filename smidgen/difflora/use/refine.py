"""Refinement: a few steps of the denoising loss on a person's photos, from a predicted adapter.

Rank-relaxed as in HyperDreamBooth (Ruiz et al. 2023, arXiv 2307.06949): low-rank factors get ``extra_rank`` more, whose A is
random and whose B is zero, so that step 0 is the prediction to the bit. Families without factors (SVFit, LoLDU, TLoRA) are
refined as they are. Many people are refined at once through the bank, each as if alone.

    rows, layout = refine_rows(pipeline, generator.predict([photo]), [[photo]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smidgen.adapters.bank import Bank
from smidgen.adapters.methods import member_rates
from smidgen.bases.families import learning_kind
from smidgen.bases.protocol import ImageBase
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.weightspace.canonical import canonical_rows, refactor
from smidgen.difflora.weightspace.layout import Entry, Layout
from smidgen.difflora.zoo.task import GroupTask
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data.pixels import fit, upright
from smidgen.tasks.diffusion.task import PersonalizeTask
from smidgen.training.interrupts import scratch_folder
from smidgen.training.loop import LoopConfig, train

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTION = "a portrait of a person"  # of a photo that nobody described
SHARE = 0.3  # of the rate at which an adapter of the method is trained from nothing


@dataclass(frozen=True)
class Refine:
    """How a prediction is refined; few and careful steps, as one photo is soon learnt by heart."""

    steps: int = 25  # optimizer steps; 0 leaves the prediction as it is
    extra_rank: int = 1  # rank added to low-rank factors
    keep_rank: bool = False  # bring the result back to the prediction's rank by SVD
    train_prediction: bool = True  # False: the prediction stays frozen and the extra rank alone is trained
    learning_rate: float | None = None  # None: three tenths of personalize's own for the method and base
    anchor: float = 0.0  # weight of the squared distance to the prediction
    batch_size: int = 4  # noised copies of a person's photos in a step
    timesteps: tuple[float, float] = (0.4, 1.0)  # share of the noise schedule that is trained on, from clean to noise
    group_size: int = 16  # people at once
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 0, "extra_rank": 0, "batch_size": 1, "group_size": 1, "anchor": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, not {getattr(self, name)}.")
        low, high = self.timesteps
        if not 0 <= low < high <= 1:
            raise ConfigError(f"timesteps is a range inside 0 to 1, such as (0.2, 1.0), not {self.timesteps}.")


def refine_rows(
    pipeline: AdaptedPipeline,
    rows: Tensor,
    people: Sequence[Sequence[Image]],
    config: Refine | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    progress: bool = False,
) -> tuple[Tensor, Layout]:
    """Refined adapters [people, numbers] of the predictions ``rows`` [people, size], and the layout of the result.

    Args:
        people: the photos of each person, RGB, of any size; refinement sees nothing else.
        captions: of each photo; ``CAPTION`` for all when left out.

    Raises:
        DataError: rows, people and captions do not match.
        TrainingError: the loss of everybody is not finite.
    """
    config = config or Refine()
    _check(rows, people, captions, pipeline.layout)
    if not config.steps:
        return rows.clone(), pipeline.layout
    layout = widened(pipeline.layout, config.extra_rank)
    parts = []
    for at in range(0, len(rows), config.group_size):
        group = slice(at, at + config.group_size)
        texts = captions[group] if captions is not None else [[CAPTION] * len(photos) for photos in people[group]]
        tasks = [
            photo_task(pipeline, photos, own, config.batch_size, config.seed)
            for photos, own in zip(people[group], texts, strict=True)
        ]
        parts.append(_refined(pipeline, layout, rows[group], tasks, config, progress))
    return _finished(torch.cat(parts), layout, pipeline.layout, config)


def captions_of(encoder: PictureEncoder, photos: Sequence[Image], caption: str | None = None) -> list[str]:
    """A caption of each photo: ``caption`` if it is given, else what the generator's image encoder reads in the scene if it
    can (the embedded one does), else ``CAPTION``.

    What a caption leaves unsaid is learnt as the person: refinement gains little without a true one.
    """
    if caption is not None:
        return [caption] * len(photos)
    read = getattr(encoder, "captions", None)
    return list(read(photos)) if read else [CAPTION] * len(photos)


def widened(layout: Layout, extra: int) -> Layout:
    """The layout of the same family with ``extra`` more rank in its low-rank factors; itself where there are none."""
    r = layout.config.get("r")
    if not extra or not list(layout.factor_pairs()):
        return layout
    if not isinstance(r, int):
        raise ConfigError(f"Adapters of rank {r!r} cannot be widened; refine them with extra_rank 0.")
    entries: list[Entry] = []
    for entry in layout.entries:
        rank = {"residual_a": 0, "residual_b": 1}.get(entry.side)
        shape = tuple(size + extra * (axis == rank) for axis, size in enumerate(entry.shape))
        entries.append(replace(entry, shape=shape, offset=entries[-1].columns.stop if entries else 0))
    config = layout.config | {"r": r + extra}
    if pattern := config.get("rank_pattern"):
        config["rank_pattern"] = {name: rank + extra for name, rank in pattern.items()}
    options = dict(config.get("residual_options") or {})
    if options.get("alpha") is not None:  # the factor in front of the product stays
        power = 0.5 if options.get("scaling") == "rslora" else 1.0
        config["residual_options"] = options | {"alpha": options["alpha"] * ((r + extra) / r) ** power}
    return replace(layout, entries=tuple(entries), config=config)


class PhotoTask(GroupTask):
    """Each person's photos under that person's own row; satisfies ``training.loop.Task`` for a model that answers rows
    [people, numbers] of ``layout`` and how far they are from their start.

    Args:
        pipeline: carries ``bank``, which is of ``layout``.
        anchor: weight of the squared distance from the start.
        timesteps: share of the noise schedule, from clean to noise.
    """

    def __init__(
        self, pipeline: AdaptedPipeline, bank: Bank, layout: Layout, people: Sequence[PersonalizeTask], anchor: float = 0.0,
        timesteps: tuple[float, float] = (0.0, 1.0),
    ) -> None:  # fmt: skip
        super().__init__(people)
        self.unet, self.bank, self.layout, self.anchor, self.timesteps = pipeline.model, bank, layout, anchor, timesteps
        self.owners = [row for row in range(len(self.people)) for _ in range(self.batch_size)]
        self._held = ExitStack()

    def batch(self, index: int) -> dict[str, Any]:
        batch, (low, high) = super().batch(index), self.timesteps
        batch["levels"] = low + batch["levels"] * (high - low)
        return batch

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        self.release()
        self._held.enter_context(self.bank.holding(self.layout.unpack(model()), self.owners))
        losses = super().losses(self.unet, batch)
        return losses + self.anchor * model.distances() if self.anchor else losses  # type: ignore[operator]

    def release(self) -> None:
        """Lets the last batch's rows go. They stay until here, as gradient checkpointing runs layers in backward."""
        self._held.close()


class Moving(nn.Module):
    """rows = start + pace * change [people, size]: ``change`` starts at 0; ``pace`` [size] is 0 for a frozen number and
    otherwise its learning rate over the residual's."""

    start: Tensor
    pace: Tensor

    def __init__(self, start: Tensor, pace: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start)
        self.register_buffer("pace", pace)

    def forward(self) -> Tensor:
        return self.start + self.pace * self.change

    def distances(self) -> Tensor:
        """Squared distance of each row from its start [people]."""
        return (self.pace * self.change).square().sum(1)


def _refined(
    pipeline: AdaptedPipeline,
    layout: Layout,
    rows: Tensor,
    tasks: list[PersonalizeTask],
    config: Refine,
    progress: bool,
) -> Tensor:
    """One group, trained by the one loop."""
    with pipeline.banked(layout) as bank:
        rate, transform_pace = _rates(pipeline.base, layout, config)
        start, pace = _start(rows, pipeline.layout, layout, bank, config, transform_pace)
        model = Moving(start.to(pipeline.base.device), pace.to(pipeline.base.device))
        task = PhotoTask(pipeline, bank, layout, tasks, config.anchor, config.timesteps)
        descend(task, model, rate, config.steps, config.seed, progress)
        return model().detach().cpu()


def descend(task: PhotoTask, model: nn.Module, rate: float, steps: int, seed: int, progress: bool) -> None:
    """Trains ``model.change`` by the one loop at a steady rate."""
    groups = [{"params": [model.change], "lr": rate, "weight_decay": 0.0}]
    loop = LoopConfig(
        max_train_steps=steps,
        lr_scheduler="constant",
        lr_warmup_steps=min(3, steps),
        checkpointing_steps=steps,
        seed=seed,
    )
    with scratch_folder() as scratch:
        try:
            train(task, model, groups, loop, scratch, progress=progress)
        finally:
            task.release()


def _start(
    rows: Tensor, narrow: Layout, wide: Layout, bank: Bank, config: Refine, transform_pace: float
) -> tuple[Tensor, Tensor]:
    """Predictions [people, size] in the wide layout, whose extra rank is a fresh adapter's; and the pace [size]."""
    start = wide.pack(bank.get("row")).cpu().float().expand(len(rows), -1).clone()
    pace = torch.ones(wide.size)
    for old, new in zip(narrow.entries, wide.entries, strict=True):
        part = start[:, new.columns].reshape(-1, *new.shape).clone()
        part[tuple(slice(size) for size in (len(rows), *old.shape))] = (
            rows[:, old.columns].float().reshape(-1, *old.shape)
        )
        start[:, new.columns] = part.flatten(1)
        own = torch.full(new.shape, transform_pace if new.side.startswith("transform") else 1.0)
        if not config.train_prediction and wide is not narrow:
            own[tuple(slice(size) for size in old.shape)] = 0.0
        pace[new.columns] = own.flatten()
    return start, pace


def _finished(rows: Tensor, wide: Layout, narrow: Layout, config: Refine) -> tuple[Tensor, Layout]:
    """The factors by SVD: the same product in as much rank as it has, or the nearest of the prediction's rank."""
    if wide is narrow:
        return rows, narrow
    if not config.keep_rank:
        return canonical_rows(rows, wide), wide
    kept = rows.new_zeros(len(rows), narrow.size)
    for old, new in zip(narrow.entries, wide.entries, strict=True):
        if old.shape == new.shape:
            kept[:, old.columns] = rows[:, new.columns]
    for (a, b), (wide_a, wide_b) in zip(narrow.factor_pairs(), wide.factor_pairs(), strict=True):
        old_b, old_a = (rows[:, entry.columns].reshape(-1, *entry.shape) for entry in (wide_b, wide_a))
        new_b, new_a, _ = refactor(old_b, old_a, a.scale, a.shape[0])
        kept[:, a.columns], kept[:, b.columns] = new_a.flatten(1), (new_b / a.scale).flatten(1)
    return kept, narrow


def photo_task(
    pipeline: AdaptedPipeline, photos: Sequence[Image], captions: Sequence[str], batch_size: int, seed: int
) -> PersonalizeTask:
    """Denoising of one person's photos, ``batch_size`` noised copies at a time."""
    pictures = [fit(upright(photo), pipeline.base.resolution) for photo in photos]
    return PersonalizeTask(pipeline.encode(pictures, captions, "photo"), pipeline.base, batch_size, seed)


def _rates(base: ImageBase, layout: Layout, config: Refine) -> tuple[float, float]:
    """Learning rate of the residual, and that of the transform over it."""
    transform, residual, output = (layout.config.get(side) for side in ("transform", "residual", "output"))
    usual = member_rates(transform, residual, learning_kind(base.name), output)
    return config.learning_rate or SHARE * usual.residual, usual.transform / usual.residual


def _check(
    rows: Tensor, people: Sequence[Sequence[Image]], captions: Sequence[Sequence[str]] | None, layout: Layout
) -> None:
    layout.check_width(rows)
    if len(rows) != len(people) or not all(people):
        raise DataError(
            f"{len(rows)} adapters are to be refined on the photos of {len(people)} people, at least one each."
        )
    counts = [len(photos) for photos in people]
    if captions is not None and [len(own) for own in captions] != counts:
        raise DataError(f"Each photo needs one caption: {counts} photos, {[len(own) for own in captions]} captions.")
