"""The canonical form: the product alone decides it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.difflora.weightspace.canonical import canonical_factors, canonical_rows, refactor

from .helpers import layout, numbers


def factors(rows: int, cols: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(rows, r, seed=seed), numbers(r, cols, seed=seed + 1000)


def mixing(r: int, seed: int) -> torch.Tensor:
    """Any invertible matrix, its singular values between 1/4 and 4."""
    u, _, v = torch.linalg.svd(numbers(r, r, seed=seed).double())
    return u @ torch.diag(4.0 ** (2 * torch.rand(r, generator=torch.Generator().manual_seed(seed)).double() - 1)) @ v


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.integers(0, 10_000), st.sampled_from([1.0, 0.5, 4.0])
)
def test_invariant_to_any_invertible_mixing(r, more_rows, more_cols, seed, scale):
    b, a = (x.double() for x in factors(r + more_rows, r + more_cols, r, seed))
    mix = mixing(r, seed + 7)
    reference = canonical_factors(*factors(r + more_rows, r + more_cols, r, seed + 3))
    new_b, new_a = canonical_factors(b, a, scale, reference)
    torch.testing.assert_close(new_b @ new_a, scale * b @ a, rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(b @ a)[:r] * scale
    gaps = (values[:-1] - values[1:]) / values[0] if r > 1 else torch.ones(1)
    towards = (new_b * reference[0]).sum(0) + (new_a * reference[1]).sum(1)
    if gaps.min() < 1e-3 or towards.abs().min() < 1e-3:
        return  # two directions of equal strength, or one at right angles to the reference, can turn either way
    mixed_b, mixed_a = canonical_factors(b @ mix, mix.inverse() @ a, scale, reference)
    torch.testing.assert_close(mixed_b, new_b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed_a, new_a, rtol=1e-5, atol=1e-5)


def test_both_sides_share_the_singular_values():
    b, a = factors(9, 7, 3, seed=0)
    new_b, new_a = canonical_factors(b, a, 2.0)
    values = torch.linalg.svdvals(2.0 * b @ a)[:3]
    torch.testing.assert_close(new_b.T @ new_b, torch.diag(values), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_a @ new_a.T, torch.diag(values), atol=1e-5, rtol=1e-5)


def test_signs_follow_the_reference_and_not_the_factors():
    b, a = factors(9, 7, 3, seed=0)
    reference = canonical_factors(b, a)
    near = canonical_factors(-b + 0.01 * numbers(9, 3), -a, reference=reference)
    assert ((near[0] * reference[0]).sum(0) > 0).all()


def test_a_rank_above_the_matrix_and_a_zero_adapter():
    b, a = factors(3, 7, 5, seed=0)
    new_b, new_a = canonical_factors(b, a)
    assert new_b.shape == b.shape and new_a.shape == a.shape
    torch.testing.assert_close(new_b @ new_a, b @ a, atol=1e-5, rtol=1e-5)
    new_b, new_a = canonical_factors(torch.zeros_like(b), a)
    assert not new_b.any() and not new_a.any()


def test_rows_keep_their_deltas_and_families_without_factors_their_numbers():
    own = layout(r=2, alpha=6.0)
    rows = numbers(4, own.size)
    reference = canonical_rows(rows[0], own)
    found = own.unpack(canonical_rows(rows, own, reference))
    for key, tensors in own.unpack(rows).items():
        wanted = tensors["residual_b"] @ tensors["residual_a"]
        torch.testing.assert_close(found[key]["residual_b"] @ found[key]["residual_a"], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own.pack(found)[0], reference)
    spectral = layout("svfit", r=4)
    rows = numbers(4, spectral.size)
    assert canonical_rows(rows, spectral, rows[0]) is rows


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_refactoring_states_its_error(r):
    b, a = factors(9, 7, 3, seed=2)
    new_b, new_a, lost = refactor(b, a, 0.5, r)
    assert new_b.shape == (9, r) and new_a.shape == (r, 7)
    wanted = 0.5 * b @ a
    assert float((new_b @ new_a - wanted).norm() / wanted.norm()) == pytest.approx(lost, abs=1e-6)
    best = torch.linalg.svdvals(wanted)[r:].norm() / wanted.norm()
    assert lost == pytest.approx(float(best), abs=1e-6)
