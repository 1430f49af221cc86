"""What the commands do: predict, edit, blend, sample and invert, each one function from files to adapter folders.

    print(predict([Path("ann.jpg")], Work(out=Path("ann"))))

Nothing is written when one of them fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from smidgen.difflora.generator.directions import load_directions
from smidgen.difflora.use.desk import Desk, Made, Outcome, Work, finish
from smidgen.difflora.use.folders import new_folder, read_photos
from smidgen.difflora.use.invert import Invert, invert
from smidgen.difflora.use.refine import Refine, captions_of, refine_rows
from smidgen.difflora.use.sources import Source, latent_of
from smidgen.errors import ConfigError

TIMES = (-1.0, 0.0, 1.0, 2.0)  # of the sliders, on the sheet of an edit
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second, on the sheet of a blend


def predict(
    photos: Sequence[Path],
    work: Work,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    caption: str | None = None,
    refine: Refine | None = None,
    progress: bool = True,
) -> Outcome:
    """Adapters of the person in ``photos``, one for each seed: in ``work.out`` itself, or in ``work.out/seed-3`` of several.

    Args:
        steps, guidance: of the generator's sampler; None: its own defaults.
        caption: of the photos, for refinement; None: what the image encoder reads, or a neutral one.
        refine: how to refine; None: not at all.

    Raises:
        DataError: a photo that cannot be read or shows no face, an ``out`` that is not empty, no generator.
        BaseLockError: another base.
    """
    with new_folder(work.out, work.overwrite) as scratch:
        found = read_photos(photos)
        desk = Desk(work)
        images = desk.fitted(found)
        with desk.timed("prediction"):
            condition = desk.generator.condition(images, [str(photo.path) for photo in found])
            latents = [desk.generator.latents(condition, [seed], steps, guidance)[0] for seed in seeds]
        model = desk.generator.model
        told = {
            "command": "predict", "photos": [photo.digest for photo in found],
            "steps": model.inference_steps if steps is None else steps,
            "guidance": model.guidance_scale if guidance is None else guidance,
        }  # fmt: skip
        many = len(seeds) > 1
        with desk.timed("prediction"):
            made = [
                desk.made(latent, f"seed {seed}", f"seed-{seed}" if many else "", **told, seed=seed)
                for seed, latent in zip(seeds, latents, strict=True)
            ]
        if refine is not None and refine.steps:
            made = _refined(desk, made, images, captions_of(desk.generator.image, images, caption), refine, progress)
        return finish(work, desk, scratch, made, images)


def edit(sources: Sequence[Path], work: Work, wanted: Mapping[str, float], seed: int = 0) -> Outcome:
    """The adapter of ``sources`` (photos of one person, or one adapter folder) with each slider of ``wanted`` at its value.

    Raises:
        ConfigError: no slider, or one that there is not.
        DataError: as :func:`predict`; the generator has no directions; an adapter of another generator.
    """
    if not wanted:
        raise ConfigError("Which sliders? Give --set ATTRIBUTE=WORD:NUMBER, such as --set skin=dark:1.0.")
    with new_folder(work.out, work.overwrite) as scratch:
        desk, source = _open(work, sources, seed)
        space = load_directions(desk.folder, desk.generator)
        with desk.timed("prediction"):
            told = {"command": "edit", "set": dict(wanted), "from": source.told}
            made = []
            for times in TIMES:
                latent = space.edited(source.latent, wanted, times)
                label = ", ".join(f"{name} {times * value + 0.0:g}" for name, value in wanted.items())
                made.append(desk.made(latent, label, "" if times == 1 else None, **told))
        return finish(work, desk, scratch, made, source.images, source.notes)


def blend(first: Path, second: Path, work: Work, share: float = 0.5, seed: int = 0) -> Outcome:
    """The adapter between ``first`` and ``second`` (each a photo or an adapter folder): ``share`` of the second's latent.

    Raises:
        ConfigError: the share is no finite number.
        DataError: as :func:`edit`.
    """
    if not abs(share) < float("inf"):
        raise ConfigError(f"--share is a number, 0 for the first and 1 for the second, not {share}.")
    with new_folder(work.out, work.overwrite) as scratch:
        desk, one = _open(work, [first], seed)
        two = latent_of(desk, [second], seed)
        with desk.timed("prediction"):
            made = []
            for part in sorted({*SHARES, share}):
                told = {"command": "blend", "share": part, "from": one.told, "and": two.told}
                latent = (1 - part) * one.latent + part * two.latent
                made.append(desk.made(latent, f"share {part:g}", "" if part == share else None, **told))
        return finish(work, desk, scratch, made, [*one.images, *two.images], (*one.notes, *two.notes))


def sample(
    work: Work,
    seeds: Sequence[int],
    by: Literal["gaussian", "diffusion"] = "gaussian",
    steps: int = 50,
) -> Outcome:
    """Adapters of people who do not exist, one for each seed.

    Args:
        by: ``gaussian`` draws latents as those of the training people are spread, ``diffusion`` by ``steps`` of the generator's
            sampler without a photo.

    Raises:
        DataError: ``gaussian``, and the generator's folder does not tell how its people are spread.
    """
    with new_folder(work.out, work.overwrite) as scratch:
        desk = Desk(work)
        space = load_directions(desk.folder, desk.generator) if by == "gaussian" else None
        with desk.timed("prediction"):
            made = []
            for seed in seeds:
                latent = space.sample(seed) if space else desk.generator.latents(None, [seed], steps)[0]
                told = {"command": "sample", "by": by, "seed": seed} | ({} if space else {"steps": steps})
                made.append(desk.made(latent, f"seed {seed}", f"seed-{seed}" if len(seeds) > 1 else "", **told))
        return finish(work, desk, scratch, made, [])


def invert_photos(
    photos: Sequence[Path],
    work: Work,
    config: Invert | None = None,
    from_prediction: bool = False,
    caption: str | None = None,
    progress: bool = True,
) -> Outcome:
    """The adapter whose latent draws ``photos`` best, sought from the mean or from the prediction; see :mod:`invert`."""
    config = config or Invert()
    with new_folder(work.out, work.overwrite) as scratch:
        found = read_photos(photos)
        desk = Desk(work)
        images, start = desk.fitted(found), None
        if from_prediction:
            with desk.timed("prediction"):
                start = latent_of(desk, photos, config.seed).latent
        captions = captions_of(desk.generator.image, images, caption)
        with desk.timed("inversion"):
            latent = invert(desk.generator, desk.carrier, images, config, captions, start, progress)
        told = {
            "command": "invert", "photos": [photo.digest for photo in found], "captions": captions,
            "from_prediction": from_prediction, **asdict(config),
        }  # fmt: skip
        begun = torch.zeros_like(latent) if start is None else start
        made = [
            desk.made(begun, "the prediction" if from_prediction else "the mean"),
            desk.made(latent, "inverted", "", **told),
        ]
        return finish(work, desk, scratch, made, images)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0..7"`` -> 0 to 7 with both ends, ``"0,3,5"``, ``"0..3,8"``.

    Raises:
        ConfigError: none of these, or a seed twice.

    Example:
        >>> parse_seeds("0..2,8")
        (0, 1, 2, 8)
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dots, last = part.partition("..")
            seeds += range(int(first), int(last) + 1) if dots else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or len(seeds) > 1000:
        raise ConfigError(f"--seeds takes different numbers from 0 as in 0..7 or 0,3,5, at most 1,000; not {text!r}.")
    return tuple(seeds)


def _open(work: Work, sources: Sequence[Path], seed: int) -> tuple[Desk, Source]:
    """The desk, and where an edit or a blend starts; photos are looked at before anything is loaded."""
    if not any(path.is_dir() for path in sources):
        read_photos(sources)
    desk = Desk(work)
    return desk, latent_of(desk, sources, seed)


def _refined(
    desk: Desk, made: Sequence[Made], images: list[Image.Image], captions: list[str], config: Refine, progress: bool
) -> list[Made]:
    with desk.timed("refinement"):
        rows, layout = refine_rows(
            desk.carrier,
            torch.stack([one.row for one in made]),
            [images] * len(made),
            config,
            [captions] * len(made),
            progress,
        )
    told = {"refine": asdict(config), "captions": captions}
    note = f"refined, {config.steps} steps"
    found = []
    for row, one in zip(rows, made, strict=True):
        found.append(replace(one, name=None))  # on the sheet alone
        found.append(Made(row, layout, one.label, one.name, {**told, **one.recipe}, note))
    return found
