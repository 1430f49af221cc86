"""Tensor rings against explicit loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.adapters.linalg import tensor_ring as tr
from smidgen.errors import ConfigError

SHAPES = [(5,), (3, 4), (2, 3, 4), (2, 2, 3, 2)]


def matrix_cores(shape, rank, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rank, rank, n, n, generator=g, dtype=torch.float64).to(dtype) for n in shape]


def loop_matrix(cores):
    """T entry by entry: the trace of a product of R x R matrices, core 0 slowest."""
    shape = [core.shape[-1] for core in cores]
    t = torch.zeros(math.prod(shape), math.prod(shape), dtype=cores[0].dtype)
    for row, i in enumerate(itertools.product(*map(range, shape))):
        for column, j in enumerate(itertools.product(*map(range, shape))):
            chain = torch.eye(cores[0].shape[0], dtype=cores[0].dtype)
            for d, core in enumerate(cores):
                chain = chain @ core[:, :, i[d], j[d]]
            t[row, column] = chain.trace()
    return t


def loop_vector(cores):
    shape = [core.shape[-1] for core in cores]
    v = torch.zeros(math.prod(shape), dtype=cores[0].dtype)
    for row, i in enumerate(itertools.product(*map(range, shape))):
        chain = torch.eye(cores[0].shape[0], dtype=cores[0].dtype)
        for d, core in enumerate(cores):
            chain = chain @ core[:, :, i[d]]
        v[row] = chain.trace()
    return v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrix_and_apply_equal_the_loops(shape, rank):
    cores = matrix_cores(shape, rank)
    t = loop_matrix(cores)
    torch.testing.assert_close(tr.ring_matrix(cores), t)
    for lead in [(), (1,), (400,), (2, 3)]:  # few tokens take one way at R > 1, many the other
        x = torch.randn(*lead, t.shape[0], dtype=torch.float64)
        torch.testing.assert_close(tr.ring_apply(cores, x), x @ t.T)


@pytest.mark.parametrize("dense", [False, True])
def test_both_ways_of_a_ring_agree(monkeypatch, dense):
    monkeypatch.setattr(tr, "_dense_is_cheaper", lambda *a: dense)
    cores = matrix_cores((2, 3, 4), 2)
    x = torch.randn(7, 24, dtype=torch.float64)
    torch.testing.assert_close(tr.ring_apply(cores, x), x @ loop_matrix(cores).T)


def test_rank_one_is_the_kronecker_product():
    a, b, c = matrix_cores((2, 3, 4), 1)
    torch.testing.assert_close(tr.ring_matrix([a, b, c]), torch.kron(torch.kron(a[0, 0], b[0, 0]), c[0, 0]))


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_triangular_start_is_the_identity_bit_for_bit(shape, rank, seed, dtype):
    cores = tr.identity_cores(shape, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    width = math.prod(shape)
    assert torch.equal(tr.ring_matrix(cores), torch.eye(width, dtype=dtype))
    x = torch.randn(9, width).to(dtype)
    assert torch.equal(tr.ring_apply(cores, x), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_paper_start_is_the_identity(shape, rank):
    t = tr.ring_matrix(tr.identity_cores(shape, rank, "paper"))
    torch.testing.assert_close(t, torch.eye(math.prod(shape)), atol=2e-7, rtol=0)


def test_triangular_slices_have_the_documented_zeros_and_spread():
    first, second = tr.identity_cores((40, 50), 4, generator=torch.Generator().manual_seed(3))
    assert not first[1:].any() and not second[1:, 0].any()
    assert first[0, 1:].std().item() == pytest.approx(0.5 / math.sqrt(40), rel=0.05)
    assert second[1:, 1:].std().item() == pytest.approx(1 / math.sqrt(50 * 3), rel=0.05)


def test_start_repeats_with_its_generator_and_leaves_the_global_state():
    before = torch.random.get_rng_state()
    a, b = (tr.identity_cores((3, 4), 2, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def schmidt_rank(t, shape):
    """Rank of T seen as a matrix between mode 0 and the others: 1 for a Kronecker product."""
    a, b = shape[0], math.prod(shape[1:])
    seen = t.reshape(a, b, a, b).permute(0, 2, 1, 3).reshape(a * a, b * b)
    return int(torch.linalg.matrix_rank(seen, rtol=1e-4))


@pytest.mark.parametrize(("init", "rank"), [("triangular", 4), ("paper", 1)])
def test_only_the_triangular_start_leaves_bond_rank_one(init, rank):
    torch.manual_seed(0)
    cores = [c.requires_grad_() for c in tr.identity_cores((4, 4), 2, init)]
    target = torch.randn(16, 16) * 0.3 + torch.eye(16)
    optimiser = torch.optim.Adam(cores, lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (tr.ring_matrix(cores) - target).square().sum().backward()
        optimiser.step()
    assert schmidt_rank(tr.ring_matrix(cores).detach(), (4, 4)) == rank


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 3), (3, 2)])
def test_product_rule(ranks):
    a, b = matrix_cores((2, 3), ranks[0], seed=1), matrix_cores((2, 3), ranks[1], seed=2)
    product = tr.ring_product(a, b)
    assert product[0].shape[:2] == (ranks[0] * ranks[1],) * 2
    torch.testing.assert_close(loop_matrix(product), loop_matrix(a) @ loop_matrix(b).T)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_vector_factors_are_exact(rank):
    out = [torch.randn(rank, rank, n, dtype=torch.float64) for n in (2, 3)]
    into = [torch.randn(rank, rank, n, dtype=torch.float64) for n in (4, 2)]
    dense = loop_vector(out + into)
    torch.testing.assert_close(tr.ring_vector_dense(out + into), dense)
    p, q = tr.ring_vector_factors(out, into)
    assert p.shape == (6, rank**2) and q.shape == (rank**2, 8)
    torch.testing.assert_close(p @ q, dense.view(6, 8))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_gradients(monkeypatch, rank, dense):
    monkeypatch.setattr(tr, "_dense_is_cheaper", lambda *a: dense)
    cores = [c.requires_grad_() for c in matrix_cores((2, 3, 2), rank)]
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *cores: tr.ring_apply(cores, x), (x, *cores))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_bank_of_rings_by_vmap(rank):
    banks = [torch.stack(c) for c in zip(*(matrix_cores((2, 3, 2), rank, seed=k) for k in range(3)), strict=True)]
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    y = torch.func.vmap(lambda x, *cores: tr.ring_apply(cores, x))(x, *banks)
    for k in range(3):
        torch.testing.assert_close(y[k], tr.ring_apply([bank[k] for bank in banks], x[k]))


def test_no_tokens():
    assert tr.ring_apply(matrix_cores((2, 3), 2), torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 6)


def test_refuses():
    good = matrix_cores((2, 3), 2)
    with pytest.raises(ConfigError, match="last axis of 6"):
        tr.ring_apply(good, torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="one square bond"):
        tr.ring_matrix([good[0], torch.zeros(3, 3, 3, 3)])
    with pytest.raises(ConfigError, match="shape"):
        tr.ring_matrix([torch.zeros(2, 2, 3)])
    with pytest.raises(ConfigError, match="'triangular' or 'paper'"):
        tr.identity_cores((2,), 1, "random")
    with pytest.raises(ConfigError, match="R >= 1"):
        tr.identity_cores((2,), 0)
    with pytest.raises(ConfigError, match="equal modes"):
        tr.ring_product(good, matrix_cores((3, 2), 2))
