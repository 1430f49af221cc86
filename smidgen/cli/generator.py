"""The commands around a generator: predict, edit, blend, invert, sample, and ``generator train | directions | calibrate |
inspect``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro import conf

from smidgen.cli.build import Section
from smidgen.errors import DataError

Output = Annotated[Any, Section("difflora.use.sampler:Output")]


def train(
    settings: Annotated[
        Any, Section("difflora.generator.settings:GeneratorConfig", "difflora.generator.settings", prefixed=True)
    ],
) -> None:
    """Train a generator. Run it again to go on where it stopped. The preset default is trained end to end, two-stage in the paper's
    two stages inside one basis, paper in those to the letter, on a zoo: its people are nobody in particular (identity .04).

    Args:
        settings: all that decides the generator.
    """
    from smidgen.difflora.generator.card import told
    from smidgen.difflora.generator.fit import fit
    from smidgen.training.processes import is_main

    generator = fit(settings)
    if is_main():
        print(told(generator, settings.out))


def directions(
    generator: Path, /, people: Path, base: str | None = None, most: int = 1000, calibrate: bool = True
) -> None:
    """Learn attribute directions for GENERATOR from its latents of training people, and keep them in its folder.

    Args:
        generator: the generator's folder.
        people: a zoo, or the folder people/ of a generator's training: a table with attributes, and pictures.
        base: embedded, a pipeline folder, or a hub name (none: as the generator says).
        most: people to learn from.
        calibrate: draw pictures and set the length of each slider by what the face encoder reads in them.
    """
    from smidgen.difflora.adapted_pipeline import AdaptedPipeline
    from smidgen.difflora.generator.directions import save_directions
    from smidgen.difflora.generator.generator import load_generator
    from smidgen.difflora.use.sliders import learn, table

    made = load_generator(generator)
    found = learn(made, AdaptedPipeline.load(base or made.base, made.layout), people, most, calibrate)
    print(table(found.directions))
    print(f"\n{save_directions(found, generator, made)}: {len(found.directions)} sliders")


def calibrate(generator: Path, /, people: Path, most: int = 1500) -> None:
    """Learn what photos GENERATOR can read, how surely it reads each attribute and what is below its floor; keep it in its folder.

    Args:
        generator: the generator's folder.
        people: a zoo, or the folder people/ of a generator's training: a table of training people and held-out ones, and pictures.
        most: training people to learn from.
    """
    from smidgen.bases.families import load_base
    from smidgen.difflora.generator.generator import load_generator
    from smidgen.difflora.generator.reading import save_reader
    from smidgen.difflora.use.calibration import calibrate as run
    from smidgen.difflora.use.calibration import table

    made = load_generator(generator)
    found = run(made, load_base(made.base).resolution, people, most)
    print(table(found))
    print(f"\n{save_reader(found, generator, made)}")


def inspect(generator: Path | None = None, /) -> None:
    """Say what GENERATOR is: base, adapters, encoders, sizes, bytes, sliders.

    Args:
        generator: the generator's folder (none: the one that comes with the package).
    """
    from smidgen.difflora.generator.card import told
    from smidgen.difflora.generator.generator import SHIPPED, load_generator

    print(told(load_generator(generator), generator or SHIPPED))


def predict(
    photos: list[Path],
    /,
    output: Output,
    seeds: str = "0",
    refine: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    caption: str | None = None,
    extra_rank: int = 1,
    keep_rank: bool = False,
    refine_rate: float | None = None,
    each: bool = False,
    recipe: bool = False,
) -> None:
    """Predict the adapter of the person in PHOTOS, without training; one adapter for each seed. Says what it read of each photo and
    how surely; a photo that the generator cannot read, and photos of different people, are refused.

    Args:
        photos: photos of one person, or a folder of them; for the generator that ships, portraits as the embedded base draws them
            (invented people, 64 x 64 pixels).
        output: where results go, and what makes them.
        seeds: 0..7 for 0 to 7, or 0,3,5; with several, each goes into OUT/seed-N.
        refine: steps of training on the photos afterwards, such as 25.
        steps: steps of the generator's sampler (none: its own default).
        guidance: guidance of the generator's sampler (none: its own default).
        caption: what the photos show, for --refine (none: what the image encoder reads, or a neutral caption).
        extra_rank: rank that --refine adds to low-rank factors.
        keep_rank: bring a refined adapter back to the prediction's rank.
        refine_rate: learning rate of --refine (none: three tenths of personalize's).
        each: PHOTOS are people: each photo and each folder another one, whose adapter goes into OUT/NAME.
        recipe: write OUT/NAME.recipe, 256 bytes (1,280 with embedded-wide) that stand for the adapter wherever the generator is at
            hand, in place of a folder.
    """
    from smidgen.difflora.use.commands import parse_seeds
    from smidgen.difflora.use.commands import predict as run
    from smidgen.difflora.use.refine import Refine

    chosen = Refine(steps=refine, extra_rank=extra_rank, keep_rank=keep_rank, learning_rate=refine_rate)
    found = run(photos, output, parse_seeds(seeds), steps, guidance, caption, chosen, each, recipe)
    print(found)
    if found.refused:
        raise DataError(f"{len(found.refused)} of those people could not be read; the others are in {output.out}.")


def load(recipe: Path, /, output: Output) -> None:
    """Write the adapter folder of RECIPE, which --recipe wrote. Its generator is looked for in the package and in the folders
    that SMIDGEN_GENERATORS names.

    Args:
        recipe: a file NAME.recipe.
        output: where results go.
    """
    from smidgen.difflora.use.commands import load as run

    print(run(recipe, output))


def edit(
    sources: list[Path],
    /,
    output: Output,
    sliders: Annotated[list[str], conf.UseAppendAction, conf.arg(name="set")],
    seed: int = 0,
) -> None:
    """Edit the person in SOURCES (photos of one person, or an adapter that predict wrote) along attributes.

    Args:
        sources: photos, or one adapter folder.
        output: where results go, and what makes them.
        sliders: ATTRIBUTE=WORD:NUMBER, such as skin=dark:1.0; may be given several times. 0 changes nothing, 1 is as people
            with the word are, less than 0 leads away from it.
        seed: of the prediction from photos.
    """
    from smidgen.difflora.generator.directions import parse_sliders
    from smidgen.difflora.use.commands import edit as run

    print(run(sources, output, parse_sliders(sliders), seed))


def blend(first: Path, second: Path, /, output: Output, share: float = 0.5, seed: int = 0) -> None:
    """Make the adapter of somebody between FIRST and SECOND, each a photo or an adapter that predict wrote.

    Args:
        first: share 0.
        second: share 1.
        output: where results go, and what makes them.
        share: how much of the second.
        seed: of the prediction from photos.
    """
    from smidgen.difflora.use.commands import blend as run

    print(run(first, second, output, share, seed))


def sample(
    output: Output, seeds: str = "0", by: Literal["gaussian", "diffusion"] = "gaussian", steps: int = 50
) -> None:
    """Make adapters of people who do not exist.

    Args:
        output: where results go, and what makes them.
        seeds: 0..7 for 0 to 7, or 0,3,5; with several, each goes into OUT/seed-N.
        by: gaussian draws a latent as those of the training people are spread (needs `smidgen generator directions`), diffusion
            asks the generator's sampler without a photo.
        steps: steps of the generator's sampler.
    """
    from smidgen.difflora.use.commands import parse_seeds
    from smidgen.difflora.use.commands import sample as run

    print(run(output, parse_seeds(seeds), by, steps))


def invert(
    photos: list[Path],
    /,
    output: Output,
    settings: Annotated[Any, Section("difflora.use.invert:Invert")],
    from_prediction: bool = True,
    caption: str | None = None,
    recipe: bool = False,
) -> None:
    """Find the adapter that draws PHOTOS best among those that the generator can make: its latent alone is trained.

    Args:
        photos: one or more photos of one person; for the generator that ships, portraits as the embedded base draws them
            (invented people, 64 x 64 pixels).
        output: where results go, and what makes them.
        settings: how it is sought.
        from_prediction: start from the prediction (otherwise from the mean adapter).
        caption: what the photos show (none: what the image encoder reads, or a neutral caption).
        recipe: write OUT/NAME.recipe in place of a folder, as predict does.
    """
    from smidgen.difflora.use.commands import invert_photos as run

    print(run(photos, output, settings, from_prediction, caption, recipe))
