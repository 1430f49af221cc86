"""What the commands do: predict, edit, blend, sample and invert, each one function from files to adapter folders.

    print(predict([Path("ann.jpg")], Output(out=Path("ann"))))

Nothing is written when one of them fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from smidgen.adapters.checkpoint.files import is_recipe
from smidgen.difflora.generator.directions import load_directions
from smidgen.difflora.generator.generator import POSSIBLE_GUIDANCE, POSSIBLE_STEPS, Generator
from smidgen.difflora.use.folders import Photo, new_folder, people_in, photos_in, read_photos
from smidgen.difflora.use.invert import Invert, invert
from smidgen.difflora.use.recipes import open_recipe
from smidgen.difflora.use.refine import Refine, captions_of, refine_rows
from smidgen.difflora.use.sampler import Adapter, Looked, Output, Result, Sampler
from smidgen.difflora.use.sources import Source, base_of, latent_of
from smidgen.errors import ConfigError, DataError

FARTHEST = 10  # that a slider or a share goes: beyond it nothing is drawn but noise
TIMES = (-1.0, 0.0, 1.0, 2.0)  # of the sliders, on the sheet of an edit
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second, on the sheet of a blend


def predict(
    photos: Sequence[Path],
    output: Output,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    caption: str | None = None,
    refine: Refine | None = None,
    each: bool = False,
    recipe: bool = False,
    progress: bool = True,
    sampler: Sampler | None = None,
) -> Result:
    """Adapters of the person in ``photos``, one for each seed: in ``output.out`` itself, or in ``output.out/seed-3`` of several.

    Args:
        photos: photos of one person, or folders of them.
        steps, guidance: of the generator's sampler; None: its own defaults.
        caption: of the photos, for refinement; None: what the image encoder reads, or a neutral one.
        refine: how to refine; None: not at all.
        each: every photo is another person, and so is every folder: adapters go into ``output.out/NAME``. Whoever cannot be
            read is left out and named in the result.
        recipe: write small files that stand for the adapters (see :mod:`recipes`) in place of their folders.
        sampler: a generator that is loaded already; None: that of ``output``.

    Raises:
        DataError: a photo that cannot be read or shows no face, an ``out`` that is not empty, no generator.
        BaseLockError: another base.
    """
    if recipe and refine is not None and refine.steps:
        raise ConfigError("A recipe says what the generator makes, and --refine changes that: leave out one of them.")
    with new_folder(output.out, output.overwrite) as scratch:
        people = people_in(photos) if each else {"": photos_in(photos)}
        first = (
            {} if each else {"": read_photos(people[""])}
        )  # before anything is loaded; of many people, one at a time
        sampler = sampler.at(output) if sampler else Sampler(output)
        adapters: list[Adapter] = []
        shown: list[Image.Image] = []
        notes: list[str] = []
        refused: dict[str, str] = {}
        for name, paths in people.items():
            try:
                found = first.get(name) or read_photos(paths)
                looked = sampler.look(found)
                own = _predicted(sampler, name, found, looked, seeds, steps, guidance)
            except DataError as error:
                if not each:
                    raise
                refused[name] = str(error)
                continue
            if refine is not None and refine.steps:
                captions = captions_of(sampler.generator.image, looked.images, caption)
                own = _refined(sampler, own, looked.images, captions, refine, progress)
            adapters += own
            shown += looked.images[: 1 if each else None]
            notes += looked.notes
        if not adapters:
            raise DataError(f"Nobody could be read: {' '.join(refused.values())}")
        return sampler.finish(scratch, adapters, shown, notes, refused, recipe)


def _predicted(
    sampler: Sampler, name: str, photos: Sequence[Photo], looked: Looked, seeds: Sequence[int], steps: int | None,
    guidance: float | None,
) -> list[Adapter]:  # fmt: skip
    """The adapters of one person, one for each seed, in the folder ``name``."""
    generator, many = sampler.generator, len(seeds) > 1
    model, names = generator.model, [str(photo) for photo in photos]
    usual = (POSSIBLE_STEPS, POSSIBLE_GUIDANCE) if looked.hiding else (model.inference_steps, model.guidance_scale)
    steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
    info = {
        "command": "predict", "photos": [photo.digest for photo in photos], "read": looked.facts, "steps": steps,
        "guidance": guidance,
    } | ({"by": "one of the people whom the photos may show"} if looked.hiding else {})  # fmt: skip
    with sampler.timed("prediction"):
        if looked.hiding and generator.possible is not None:
            features = generator.features(looked.images, names)
            latents = {seed: generator.possible.latents(features, [seed], steps, guidance)[0] for seed in seeds}
        else:
            condition = generator.condition(looked.images, names)
            latents = {seed: generator.latents(condition, [seed], steps, guidance)[0] for seed in seeds}
        return [
            sampler.adapter(
                latent,
                f"{name} seed {seed}".strip(),
                "/".join(filter(None, [name, f"seed-{seed}" if many else ""])),
                **info,
                seed=seed,
            )
            for seed, latent in latents.items()
        ]


def load(recipe: Path, output: Output) -> Result:
    """The adapter that a recipe stands for, as a folder.

    Raises:
        AdapterFileError: it is damaged.
        DataError: its generator is not at hand.
    """
    with new_folder(output.out, output.overwrite) as scratch:
        generator, latent = open_recipe(recipe)
        sampler = Sampler(output, generator)
        adapter = sampler.adapter(latent, recipe.stem, "", command="load", recipe=recipe.name)
        return sampler.finish(scratch, [adapter], [])


def edit(sources: Sequence[Path], output: Output, wanted: Mapping[str, float], seed: int = 0) -> Result:
    """The adapter of ``sources`` (photos of one person, or one adapter folder) with each slider of ``wanted`` at its value.

    Raises:
        ConfigError: no slider, or one that there is not.
        DataError: as :func:`predict`; the generator has no directions; an adapter of another generator.
    """
    if not wanted:
        raise ConfigError("Which sliders? Give --set ATTRIBUTE=WORD:NUMBER, such as --set skin=dark:1.0.")
    for name, value in wanted.items():
        if not abs(value) <= FARTHEST:
            raise ConfigError(
                f"--set {name}:{value:g} is too far: a slider goes from -{FARTHEST} to {FARTHEST}, and 1 is enough."
            )
    with new_folder(output.out, output.overwrite) as scratch:
        sampler, source = _open(output, sources, seed)
        space = load_directions(sampler.folder, sampler.generator)
        with sampler.timed("prediction"):
            info = {"command": "edit", "set": dict(wanted), "from": source.info}
            adapters = []
            for times in TIMES:
                latent = space.edited(source.latent, wanted, times)
                label = ", ".join(f"{name} {times * value + 0.0:g}" for name, value in wanted.items())
                adapters.append(sampler.adapter(latent, label, "" if times == 1 else None, **info))
        return sampler.finish(scratch, adapters, source.images, source.notes)


def blend(first: Path, second: Path, output: Output, share: float = 0.5, seed: int = 0) -> Result:
    """The adapter between ``first`` and ``second`` (each a photo or an adapter folder): ``share`` of the second's latent.

    Raises:
        ConfigError: the share is no finite number.
        DataError: as :func:`edit`.
    """
    if not abs(share) <= FARTHEST:
        raise ConfigError(
            f"--share is a number from -{FARTHEST} to {FARTHEST}, 0 for the first and 1 for the second, not {share}."
        )
    with new_folder(output.out, output.overwrite) as scratch:
        sampler, one = _open(output, [first], seed)
        two = latent_of(sampler, [second], seed)
        with sampler.timed("prediction"):
            adapters = []
            for part in sorted({*SHARES, share}):
                info = {"command": "blend", "share": part, "from": one.info, "and": two.info}
                latent = (1 - part) * one.latent + part * two.latent
                adapters.append(sampler.adapter(latent, f"share {part:g}", "" if part == share else None, **info))
        return sampler.finish(scratch, adapters, [*one.images, *two.images], (*one.notes, *two.notes))


def sample(
    output: Output,
    seeds: Sequence[int],
    by: Literal["gaussian", "diffusion"] = "gaussian",
    steps: int = 50,
) -> Result:
    """Adapters of people who do not exist, one for each seed.

    Args:
        by: ``gaussian`` draws latents as those of the training people are spread, ``diffusion`` by ``steps`` of the generator's
            sampler without a photo.

    Raises:
        DataError: ``gaussian``, and the generator's folder does not tell how its people are spread.
    """
    with new_folder(output.out, output.overwrite) as scratch:
        sampler = Sampler(output)
        space = load_directions(sampler.folder, sampler.generator) if by == "gaussian" else None
        with sampler.timed("prediction"):
            adapters = []
            for seed in seeds:
                latent = space.sample(seed) if space else _nobody(sampler.generator, seed, steps)
                info = {"command": "sample", "by": by, "seed": seed} | ({} if space else {"steps": steps})
                adapters.append(
                    sampler.adapter(latent, f"seed {seed}", f"seed-{seed}" if len(seeds) > 1 else "", **info)
                )
        return sampler.finish(scratch, adapters, [])


def _nobody(generator: Generator, seed: int, steps: int) -> torch.Tensor:
    """The latent [size] of somebody whom no photo shows, by the generator's diffusion."""
    if generator.possible is not None:
        return generator.possible.latents(None, [seed], steps)[0]
    return generator.latents(None, [seed], steps)[0]


def invert_photos(
    photos: Sequence[Path],
    output: Output,
    config: Invert | None = None,
    from_prediction: bool = True,
    caption: str | None = None,
    recipe: bool = False,
    progress: bool = True,
) -> Result:
    """The adapter whose latent draws ``photos`` best, sought from the mean or from the prediction; see :mod:`invert`."""
    config = config or Invert()
    with new_folder(output.out, output.overwrite) as scratch:
        found = read_photos(photos_in(photos))
        sampler = Sampler(output)
        looked = sampler.look(found)
        images = looked.images
        captions = captions_of(sampler.generator.image, images, caption)
        with sampler.timed("inversion"):
            latent, start = invert(
                sampler.generator, sampler.pipeline, images, config, captions, from_prediction, progress,
                [str(photo) for photo in found],
            )  # fmt: skip
        info = {
            "command": "invert", "photos": [photo.digest for photo in found], "read": looked.facts, "captions": captions,
            "from_prediction": from_prediction, **asdict(config),
        }  # fmt: skip
        adapters = [
            sampler.adapter(start, "the prediction" if from_prediction else "the mean"),
            sampler.adapter(latent, "inverted", "", **info),
        ]
        return sampler.finish(scratch, adapters, images, looked.notes, recipe=recipe)


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
            seeds += range(int(first), min(int(last), int(first) + 1000) + 1) if dots else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63 or len(seeds) > 1000:
        raise ConfigError(f"--seeds takes different numbers from 0 as in 0..7 or 0,3,5, at most 1,000; not {text!r}.")
    return tuple(seeds)


def _open(output: Output, sources: Sequence[Path], seed: int) -> tuple[Sampler, Source]:
    """The generator with its base, and where an edit or a blend starts; photos are looked at before anything is loaded."""
    made = next((path for path in sources if path.is_dir() or is_recipe(path)), None)
    if made is None:
        read_photos(sources)
    elif output.generator is None and output.base is None:
        output = replace(output, base=base_of(made))
    sampler = Sampler(output)
    return sampler, latent_of(sampler, sources, seed)


def _refined(
    sampler: Sampler,
    adapters: Sequence[Adapter],
    images: list[Image.Image],
    captions: list[str],
    config: Refine,
    progress: bool,
) -> list[Adapter]:
    with sampler.timed("refinement"):
        rows, layout = refine_rows(
            sampler.pipeline,
            torch.stack([one.row for one in adapters]),
            [images] * len(adapters),
            config,
            [captions] * len(adapters),
            progress,
        )
    info = {"refine": asdict(config), "captions": captions}
    note = f"refined, {config.steps} steps"
    found = []
    for row, one in zip(rows, adapters, strict=True):
        found.append(replace(one, name=None))  # on the sheet alone
        found.append(Adapter(row, layout, one.label, one.name, {**info, **one.recipe}, note))
    return found
