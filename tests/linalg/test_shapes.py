"""Mode shapes."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.adapters.linalg.shapes import FACTOR_TABLE, factorize, smooth_width
from smidgen.errors import ConfigError


@pytest.mark.parametrize(("width", "shape"), FACTOR_TABLE.items())
def test_table_of_the_released_code(width, shape):
    assert factorize(width) == shape
    assert math.prod(shape) == width


def test_320_is_not_the_least_squares_shape():
    """The table is needed: by the rule alone 320 would be (5, 8, 8)."""
    assert factorize(320) == (4, 8, 10)
    assert sum(n * n for n in (5, 8, 8)) < sum(n * n for n in factorize(320))


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 400), order=st.integers(1, 4))
def test_factors_are_ascending_and_least(width, order):
    shape = factorize(width, order)
    assert len(shape) == order and math.prod(shape) == width and list(shape) == sorted(shape)
    if width == 320 and order == 3:
        return
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    every = [c for c in itertools.combinations_with_replacement(divisors, order) if math.prod(c) == width]
    assert sum(n * n for n in shape) == min(sum(n * n for n in c) for c in every)


def test_padding_is_least_and_below_three_percent():
    for width in range(1, 5001):
        padded = smooth_width(width)
        assert width <= padded
        assert max(factorize(padded)) <= 4 * padded ** (1 / 3)
        if width >= 100:
            assert padded <= 1.03 * width
    assert smooth_width(1280) == 1280 and smooth_width(769) == 770


@pytest.mark.parametrize(("width", "order"), [(0, 3), (8, 0), (-4, 2)])
def test_refuses(width, order):
    with pytest.raises(ConfigError, match="width >= 1"):
        factorize(width, order)
    with pytest.raises(ConfigError):
        smooth_width(width, order)
