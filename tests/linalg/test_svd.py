"""The truncated SVD against LAPACK in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.adapters.linalg import svd as module
from smidgen.adapters.linalg.svd import energy_rank, truncated_svd
from smidgen.errors import ConfigError


def spectrum(m, n, values, seed=0):
    """A matrix [m, n] with the given singular values."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64))[0]
    return ((u * values) @ v.T).float()


def kept_error(w, r, got):
    """|U S Vh - best rank-r| / |best rank-r|, the best from LAPACK in float64."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    best = (u[:, :r] * s[:r]) @ vh[:r]
    return ((got[0].double() * got[1].double()) @ got[2].double() - best).norm() / best.norm()


def check_orthonormal(u, s, vh):
    r = len(s)
    torch.testing.assert_close(u.mT @ u, torch.eye(r), atol=2e-5, rtol=0)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(r), atol=2e-5, rtol=0)
    assert (s[:-1] >= s[1:] - 1e-6 * s[0]).all() and (s >= 0).all()


FLAT = torch.linspace(2.0, 0.2, 220, dtype=torch.float64)
STEEP = torch.arange(1, 221, dtype=torch.float64) ** -1.0
OUTLIER = torch.cat([torch.tensor([60.0, 20.0], dtype=torch.float64), FLAT[2:]])


@pytest.mark.parametrize("values", [FLAT, STEEP, OUTLIER], ids=["flat", "steep", "outlier"])
@pytest.mark.parametrize("shape", [(220, 220), (220, 500), (500, 220)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("r", [1, 8, 40, 220])
def test_kept_part(values, shape, r):
    w = spectrum(*shape, values)
    got = truncated_svd(w, r)
    assert [tuple(t.shape) for t in got] == [(shape[0], r), (r,), (r, shape[1])]
    check_orthonormal(*got)
    assert kept_error(w, r, got) < 1e-3


def test_small_rank_takes_the_iterative_way(monkeypatch):
    monkeypatch.setattr(module, "_exact", None)
    w = spectrum(300, 400, torch.linspace(2.0, 0.2, 300, dtype=torch.float64))
    assert kept_error(w, 8, truncated_svd(w, 8)) < 1e-3


def test_a_tighter_tolerance_is_kept():
    w = spectrum(300, 400, torch.linspace(2.0, 0.2, 300, dtype=torch.float64))
    assert kept_error(w, 8, truncated_svd(w, 8, tolerance=1e-5)) < 1e-5


def test_the_error_estimate_is_honest():
    """Every loose tolerance is met too, over many spectra: the stop is by the estimate, not by luck of iteration."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        values = torch.rand(200, generator=g, dtype=torch.float64).sort(descending=True).values + 0.1
        w = spectrum(200, 240, values, seed)
        for tolerance in (3e-2, 1e-3):
            assert kept_error(w, 6, truncated_svd(w, 6, tolerance=tolerance)) < tolerance


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 30), n=st.integers(1, 30), data=st.data())
def test_small_matrices(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    true_rank = data.draw(st.integers(0, min(m, n)))
    g = torch.Generator().manual_seed(m * 31 + n)
    w = torch.randn(m, true_rank, generator=g) @ torch.randn(true_rank, n, generator=g)
    u, s, vh = truncated_svd(w, r)
    check_orthonormal(u, s, vh)
    top = torch.linalg.svdvals(w)[:r]
    torch.testing.assert_close(s, top, atol=1e-4 * (1 + float(top[0])), rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (300, 200), (200, 300)])
def test_zero_matrix(shape):
    u, s, vh = truncated_svd(torch.zeros(shape), 5)
    assert not s.any()
    check_orthonormal(u, s, vh)


def test_rank_below_r_in_the_iterative_range():
    w = spectrum(300, 400, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    got = truncated_svd(w, 8)
    check_orthonormal(*got)
    assert kept_error(w, 8, got) < 1e-3
    assert got[1][3:].max() < 1e-5


def test_ties_at_the_cut_end_in_a_best_approximation():
    values = torch.ones(300, dtype=torch.float64)
    values[:4] = 3.0
    w = spectrum(300, 400, values)
    u, s, vh = truncated_svd(w, 8)
    torch.testing.assert_close(s, torch.tensor([3.0] * 4 + [1.0] * 4), atol=1e-3, rtol=0)
    missing = (w - (u * s) @ vh).norm()
    assert missing == pytest.approx(296**0.5 * (1 - 4 / 296) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scale(scale):
    w = spectrum(200, 220, FLAT[:200])
    s = truncated_svd(w * scale, 5)[1]
    torch.testing.assert_close(s / scale, truncated_svd(w, 5)[1], rtol=1e-4, atol=0)


def test_seed_and_global_state():
    w = spectrum(300, 400, torch.linspace(2.0, 0.2, 300, dtype=torch.float64))
    state = torch.random.get_rng_state()
    a = truncated_svd(w, 8, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    b = truncated_svd(w, 8, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    c = truncated_svd(w, 8, seed=2)
    assert not torch.equal(a[0], c[0])
    torch.testing.assert_close(a[0], c[0], atol=2e-2, rtol=0)  # same signs


def test_signs_are_canonical():
    w = spectrum(40, 30, torch.linspace(3.0, 1.0, 30, dtype=torch.float64))
    u, _, vh = truncated_svd(w, 4)
    v, _, uh = truncated_svd(-w, 4)
    torch.testing.assert_close(u, v, atol=1e-4, rtol=0)
    torch.testing.assert_close(vh, -uh, atol=1e-4, rtol=0)


def test_bfloat16_weight():
    w = spectrum(50, 40, torch.linspace(3.0, 1.0, 40, dtype=torch.float64)).bfloat16()
    u, s, vh = truncated_svd(w, 40)
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    torch.testing.assert_close((u * s) @ vh, w.float(), atol=1e-4, rtol=0)


def test_refuses():
    with pytest.raises(ConfigError, match=r"1\.\.min\(m, n\) = 3, got 4"):
        truncated_svd(torch.zeros(3, 5), 4)
    with pytest.raises(ConfigError, match="got 0"):
        truncated_svd(torch.zeros(3, 5), 0)
    with pytest.raises(ConfigError, match="matrix"):
        truncated_svd(torch.zeros(3, 5, 2), 1)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            truncated_svd(torch.full((3, 5), bad), 1)


@pytest.mark.parametrize("norm", ["sigma", "sigma2"])
def test_energy_rank_is_the_least_and_monotone(norm):
    s = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.01
    power = (s.double() ** (2 if norm == "sigma2" else 1)).sort(descending=True).values
    ranks = [energy_rank(s, e, norm) for e in (0.01, 0.3, 0.9, 0.99, 1.0)]
    assert ranks == sorted(ranks) and ranks[0] == 1 and ranks[-1] == 50
    r = ranks[2]
    assert power[:r].sum() >= 0.9 * power.sum() > power[: r - 1].sum()


def test_energy_rank_of_an_exponential_spectrum():
    """exp(-i/96) at d = 768: 222 singular values hold 99 % of sigma^2, 439 hold 99 % of sigma."""
    s = torch.exp(-torch.arange(768, dtype=torch.float64) / 96)
    assert energy_rank(s, 0.99) == 222
    assert abs(energy_rank(s, 0.99, "sigma") - 439) <= 1


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_energy_rank_refuses(energy):
    with pytest.raises(ConfigError):
        energy_rank(torch.ones(3), energy)
    with pytest.raises(ConfigError, match="'sigma2' or 'sigma'"):
        energy_rank(torch.ones(3), 0.9, "nuclear")
