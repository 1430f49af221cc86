"""Tensor rings against explicit loops."""

import itertools
import math

import pytest
import torch

from smidgen.adapters.linalg import tensor_ring as tr
from smidgen.adapters.transforms.tensor_ring import TensorRingTransform
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
def test_matrix_equals_the_loops(shape, rank):
    cores = matrix_cores(shape, rank)
    torch.testing.assert_close(tr.ring_matrix(cores), loop_matrix(cores))


def test_rank_one_is_the_kronecker_product():
    a, b, c = matrix_cores((2, 3, 4), 1)
    torch.testing.assert_close(tr.ring_matrix([a, b, c]), torch.kron(torch.kron(a[0, 0], b[0, 0]), c[0, 0]))


def schmidt_rank(t, shape):
    """Rank of T seen as a matrix between mode 0 and the others: 1 for a Kronecker product."""
    a, b = shape[0], math.prod(shape[1:])
    seen = t.reshape(a, b, a, b).permute(0, 2, 1, 3).reshape(a * a, b * b)
    return int(torch.linalg.matrix_rank(seen, rtol=1e-4))


@pytest.mark.parametrize(("init", "rank"), [("triangular", 4), ("paper", 1)])
def test_only_the_triangular_start_leaves_bond_rank_one(init, rank):
    torch.manual_seed(0)
    ring = TensorRingTransform(16, rank=2, init=init, mode_shape=(4, 4))
    numbers = {name: value.requires_grad_() for name, value in ring.start("seed").items()}
    constants = ring.constants("seed")
    target = torch.randn(16, 16) * 0.3 + torch.eye(16)
    optimiser = torch.optim.Adam(numbers.values(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (ring.matrix(constants | numbers) - target).square().sum().backward()
        optimiser.step()
    assert schmidt_rank(ring.matrix(constants | numbers).detach(), (4, 4)) == rank


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_vector_factors_are_exact(rank):
    out = [torch.randn(rank, rank, n, dtype=torch.float64) for n in (2, 3)]
    into = [torch.randn(rank, rank, n, dtype=torch.float64) for n in (4, 2)]
    dense = loop_vector(out + into)
    p, q = tr.ring_vector_factors(out, into)
    assert p.shape == (6, rank**2) and q.shape == (rank**2, 8)
    torch.testing.assert_close(p @ q, dense.view(6, 8))


def test_refuses():
    good = matrix_cores((2, 3), 2)
    with pytest.raises(ConfigError, match="one square bond"):
        tr.ring_matrix([good[0], torch.zeros(3, 3, 3, 3)])
    with pytest.raises(ConfigError, match="shape"):
        tr.ring_matrix([torch.zeros(2, 2, 3)])
