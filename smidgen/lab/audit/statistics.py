"""Intervals over people: bootstrap of means, of paired differences and of ratios. Pure functions.

People are drawn with replacement; whatever was averaged within a person (scenes, seeds) moves with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy

from smidgen.lab.statistics import Interval

DRAWS = 4000


def bootstrap(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over people and its 95 % percentile interval.

    Example:
        >>> bootstrap([0.5, 0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5, n=3)
    """
    return _resampled(lambda column: column[..., 0].mean(-1), draws, seed, values)


def paired(first: Sequence[float], second: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of ``first`` minus ``second``, person by person."""
    return bootstrap([a - b for a, b in zip(first, second, strict=True)], draws, seed)


def ratio(first: Sequence[float], second: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of ``first`` over mean of ``second``, both of the same people."""
    return _resampled(lambda drawn: drawn[..., 0].mean(-1) / drawn[..., 1].mean(-1), draws, seed, first, second)


def _resampled(
    figure: Callable[[numpy.ndarray], numpy.ndarray], draws: int, seed: int, *values: Sequence[float]
) -> Interval:
    """``figure`` of values [..., person, column], and of ``draws`` samples of the people."""
    table = numpy.stack([numpy.asarray(column, float) for column in values], axis=-1)
    people = len(table)
    found = float(figure(table))
    if people < 2:
        return Interval(found, None, None, people)
    chosen = numpy.random.default_rng(seed).integers(people, size=(draws, people))
    low, high = numpy.percentile(figure(table[chosen]), [2.5, 97.5])
    return Interval(found, float(low), float(high), people)
