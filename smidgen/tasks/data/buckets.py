"""Which shapes pictures are trained at: one or several sizes, square or in buckets of like proportions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smidgen.errors import ConfigError, MissingExtraError
from smidgen.tasks.data.tables import counted

if TYPE_CHECKING:
    from smidgen.tasks.data.images import Picture

Shape = tuple[int, int]  # width, height in pixels


def parse_sizes(resolution: int | str | None, usual: int, step: int) -> tuple[int, ...]:
    """The sizes that ``resolution`` means, small ones first: a number, several as in "512,768", or None for ``usual``.

    Raises:
        ConfigError: no numbers, or sides that are no multiples of ``step``.

    Example:
        >>> parse_sizes("96,64", usual=64, step=16)
        (64, 96)
    """
    sizes = numbers(usual if resolution is None else resolution)
    for size in sizes:
        if not step <= size <= 16_384 or size % step:
            near = max(step, min(16_384, size) // step * step)
            raise ConfigError(
                f"resolution {size} does not fit this base, whose images have sides of 16,384 at most and in multiples of {step} "
                f"pixels. {near} and {near + step} are near it."
            )
    return sizes


def numbers(resolution: int | str) -> tuple[int, ...]:
    """A number of pixels, or several with commas, small ones first."""
    words = str(resolution).split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(
            f"resolution must be a number of pixels, or several with commas, such as 512,768, not {resolution!r}."
        )
    return tuple(sorted({int(word) for word in words}))


def parse_shape(text: str, step: int) -> Shape:
    """Width and height of "96x64", or of "64", a square.

    Raises:
        ConfigError: neither, or sides that are no multiples of ``step``.

    Example:
        >>> parse_shape("96x64", step=16)
        (96, 64)
    """
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"preview_size is a width and a height such as 96x64, or the side of a square, not {text!r}.")
    width, height = (int(words[0]), int(words[-1]))
    for side in (width, height):
        if side % step:
            near = side // step * step
            either = f"{near} and {near + step} are near {side}" if near else f"{step} is the least"
            raise ConfigError(
                f"preview_size {text} does not fit this base, whose images have sides in multiples of {step} pixels: {either}."
            )
    return width, height


def shapes_of(
    pictures: Sequence[Picture], sizes: Sequence[int], step: int, bucketing: bool
) -> tuple[dict[Shape, list[int]], list[str]]:
    """Shape -> numbers of the pictures that are trained at it, and warnings.

    A picture is trained at each of ``sizes`` that it fills without being enlarged, and at the smallest at least. With
    ``bucketing`` its shape is the one nearest to its own of those with as many pixels (diffusers' buckets), else a square.
    """
    found: dict[Shape, list[int]] = {}
    small: dict[int, list[str]] = {}
    for size in sizes:
        shapes = _buckets(size, step) if bucketing else [(size, size)]
        for number, picture in enumerate(pictures):
            shape = _nearest(picture.size, shapes) if bucketing else shapes[0]
            if size != sizes[0] and any(own < side for own, side in zip(picture.size, shape, strict=True)):
                small.setdefault(size, []).append(picture.path.name)
                continue
            found.setdefault(shape, []).append(number)
    warnings = [
        counted("picture", names, f"too small for size {size}, not trained at it") for size, names in small.items()
    ]
    return dict(sorted(found.items())), warnings


def describe(shapes: dict[Shape, list[int]]) -> str:
    """What a report says of them, "" for squares of one size."""
    if len(shapes) == 1 and len(set(next(iter(shapes)))) == 1:
        return ""
    told = ", ".join(f"{width}x{height} ({len(own)})" for (width, height), own in shapes.items())
    return f"Pictures at each shape (width x height): {told}."


def _buckets(size: int, step: int) -> list[Shape]:
    try:
        from diffusers.training_utils import generate_aspect_ratio_buckets
    except ImportError as error:
        raise MissingExtraError(
            "--aspect-ratio-bucketing needs a newer diffusers (0.42 has it): pip install -U diffusers"
        ) from error
    return [(width, height) for height, width in generate_aspect_ratio_buckets(size, step)]


def _nearest(size: Shape, shapes: Sequence[Shape]) -> Shape:
    from diffusers.training_utils import find_nearest_bucket

    return shapes[find_nearest_bucket(size[1], size[0], [(height, width) for width, height in shapes])]
