"""The formulas of docs/methods.md, as properties of every member and of smidgen.count over any shape."""

from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import smidgen
from smidgen.adapters.residuals import LowRank, Spectral, TensorRingResidual, Triangular
from smidgen.adapters.transforms import Diagonal, Rotation, TensorRingTransform

widths, ranks = st.integers(1, 400), st.integers(1, 9)


def count_linear(rows: int, cols: int, *args, **options) -> int:
    """smidgen.count of one linear layer without storage."""
    layer = nn.Linear(cols, rows, device="meta")
    return smidgen.count(nn.Sequential(layer), smidgen.config(*args, target_modules=["0"], **options))


def modes_of(width: int) -> tuple[int, ...]:
    return TensorRingTransform(width).modes


@given(widths, ranks)
@settings(deadline=None)
def test_ring_transform(width, rank):
    member = TensorRingTransform(width, rank)
    assert member.count() == rank**2 * sum(n * n for n in member.modes)
    assert prod(member.modes) == member.padded >= width
    assert member.count() == sum(e.numel() for e in member.start("seed").values())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), ranks)
@settings(deadline=None)
def test_ring_transform_with_given_modes(modes, rank):
    member = TensorRingTransform(prod(modes), rank, mode_shape=modes)
    assert member.count() == rank**2 * sum(n * n for n in modes)


@given(widths, widths, ranks)
@settings(deadline=None)
def test_ring_residual(rows, cols, rank):
    member = TensorRingResidual(rows, cols, rank)
    assert member.count() == rank**2 * (sum(member.out_modes) + sum(member.in_modes))
    assert prod(member.out_modes) >= rows and prod(member.in_modes) >= cols


@given(widths, widths, st.integers(1, 500))
@settings(deadline=None)
def test_diagonals_in_a_basis_and_low_rank(rows, cols, r):
    for member in (Spectral, Triangular):
        assert member(rows, cols, r).count() == min(r, rows, cols)
        assert member(rows, cols, "full").count() == min(rows, cols)
    assert LowRank(rows, cols, r).count() == r * (rows + cols)


@given(st.integers(1, 40), st.integers(2, 40))
@settings(deadline=None)
def test_rotation_and_diagonal(blocks, b):
    assert Rotation(blocks * b, blocks=blocks).count() == blocks * b * (b - 1) // 2
    assert Diagonal(blocks * b).count() == blocks * b


@given(widths, st.integers(2, 64))
@settings(deadline=None)
def test_rotation_by_block_size_takes_the_largest_divisor(width, block_size):
    b = max(n for n in range(1, block_size + 1) if width % n == 0)
    assume(b > 1)  # one feature cannot turn
    assert Rotation(width, block_size=block_size).count() == (width // b) * b * (b - 1) // 2


@given(widths, widths, st.integers(1, 4), ranks)
@settings(deadline=None, max_examples=40)
def test_a_pair_counts_the_sum_of_both(rows, cols, R_T, r):
    ring = R_T**2 * sum(n * n for n in modes_of(cols))
    assert count_linear(rows, cols, "tlora_star", transform_rank=R_T, r=r) == ring + r * (rows + cols)
    assert count_linear(rows, cols, "svfit", r=r) == min(r, rows, cols)
    both = r**2 * (sum(modes_of(rows)) + sum(modes_of(cols)))
    assert count_linear(rows, cols, f"tlora({R_T},{r})") == ring + both
    assert count_linear(rows, cols, transform="diagonal", residual="triangular", r=r) == cols + min(r, rows, cols)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), ranks)
@settings(deadline=None, max_examples=40)
def test_grouped_convolutions_have_a_transform_a_group(out, channels, groups, kernel, r):
    assume(channels > 1)
    layer = nn.Conv2d(groups * channels, groups * out, kernel, groups=groups, device="meta")
    config = smidgen.config(transform="tensor_ring", residual="low_rank", r=r, target_modules=["0"])
    ring = sum(n * n for n in modes_of(channels))
    wanted = groups * ring + r * (groups * out + channels * kernel**2)
    assert smidgen.count(nn.Sequential(layer), config) == wanted


def test_the_parts_of_the_published_counts():
    def ring(model, rank):
        return smidgen.count(model, smidgen.config(transform="tensor_ring", transform_rank=rank))

    def residual(model, rank):
        return smidgen.count(model, smidgen.config(residual="tensor_ring", r=rank))

    assert (ring("sd15", 2), residual("sd15", 6)) == (144_256, 256_032)
    assert (ring("sdxl", 1), residual("sdxl", 2)) == (245_520, 151_200)


def test_nothing_is_allocated():
    huge = nn.Sequential(nn.Linear(1_000_000, 1_000_000, bias=False, device="meta"))  # 4 TB
    assert smidgen.count(huge, "svfit", r="full", target_modules=["0"]) == 1_000_000
    assert smidgen.count(huge, "lora", r=1, target_modules=["0"]) == 2_000_000


@pytest.mark.parametrize("r", [0, -1, 2.5, "all"])
def test_bad_ranks_are_refused(r):
    with pytest.raises(smidgen.ConfigError, match=repr(r)):
        smidgen.count("roberta-base", "svfit", r=r)
