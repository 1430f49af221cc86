"""Every member against its maths written as explicit loops, and what rings and diagonals of full rank can reach."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

import smidgen
from smidgen import testing
from smidgen.adapters.member import build
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.residuals.spectral import Spectral
from smidgen.adapters.residuals.tensor_ring import TensorRingResidual
from smidgen.adapters.residuals.triangular import Triangular
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.adapters.transforms.rotation import Rotation
from smidgen.adapters.transforms.tensor_ring import TensorRingTransform
from smidgen.adapters.tuner.compose import ComposedLinear

from .helpers import inputs, trained


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(member, seed: str = "s") -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Constants and perturbed trained numbers of a member in float64."""
    start = {n: t.double() for n, t in member.start(seed).items()}
    moved = {n: t + 0.3 * noise(*t.shape, seed=i) for i, (n, t) in enumerate(start.items())}
    return {n: t.double() for n, t in member.constants(seed).items()} | moved


# ---- transforms ------------------------------------------------------------------------------------------------------


def ring_by_loops(cores: list[Tensor], width: int) -> Tensor:
    """T[(i..),(j..)] = trace(A^1[i1,j1] ... A^D[iD,jD]), core 0 slowest, cut to the real width."""
    modes = [c.shape[-1] for c in cores]
    index = list(product(*map(range, modes)))
    t = torch.zeros(prod(modes), prod(modes), dtype=torch.float64)
    for a, i in enumerate(index):
        for b, j in enumerate(index):
            chain = torch.eye(cores[0].shape[0], dtype=torch.float64)
            for core, id_, jd in zip(cores, i, j, strict=True):
                chain = chain @ core[:, :, id_, jd]
            t[a, b] = chain.trace()
    return t[:width, :width]


@pytest.mark.parametrize("init", ["triangular", "paper"])
@pytest.mark.parametrize(
    ("width", "order", "rank"), [(12, 3, 1), (12, 3, 2), (12, 2, 3), (7, 3, 1), (7, 3, 2), (5, 1, 2)]
)
def test_tensor_ring_transform(width: int, order: int, rank: int, init: str) -> None:
    t = TensorRingTransform(width, rank=rank, init=init, order=order)
    own = numbers(t)
    cores = [own[f"start{d}"] + own[f"e{d}"] for d in range(len(t.modes))]
    # the paper's start, I / R in every slice, is the identity only up to the rounding of 1 / R
    dtype = torch.float32 if init == "paper" else torch.float64
    testing.close(t.matrix(own), ring_by_loops(cores, width), "T", dtype)
    x = noise(4, width, seed=9)
    testing.close(t.apply(x, own), x @ ring_by_loops(cores, width).T, "T x", dtype)
    assert t.count() == rank**2 * sum(n * n for n in t.modes)


def test_a_ring_of_rank_one_is_a_kronecker_product() -> None:
    t = TensorRingTransform(12, mode_shape=[2, 6])
    own = numbers(t)
    a, b = (own[f"start{d}"][0, 0] + own[f"e{d}"][0, 0] for d in range(2))
    testing.close(t.matrix(own), torch.kron(a, b), "kron")


def test_a_ring_of_maximal_rank_reproduces_any_matrix() -> None:
    t = TensorRingTransform(6, rank=2, mode_shape=[2, 3])  # R^2 = 4 = min(2^2, 3^2) Kronecker terms
    wanted = noise(6, 6, seed=4)
    pairs = wanted.reshape(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9)
    u, s, vh = torch.linalg.svd(pairs, full_matrices=False)
    left, right = (u * s).reshape(2, 2, 2, 2), vh.reshape(2, 2, 3, 3)  # [i, j, r, s] and [r, s, k, l]
    cores = [left.permute(2, 3, 0, 1), right.permute(1, 0, 2, 3)]
    own = numbers(t)
    own |= {f"e{d}": core - own[f"start{d}"] for d, core in enumerate(cores)}
    testing.close(t.matrix(own), wanted, "any 6 x 6 matrix as a ring of rank 2")


@pytest.mark.parametrize(("width", "options"), [(12, {"block_size": 4}), (12, {"blocks": 2}), (7, {"blocks": 1})])
def test_rotation(width: int, options: dict[str, int]) -> None:
    t = Rotation(width, **options)
    own = numbers(t)
    wanted = torch.zeros(width, width, dtype=torch.float64)
    for k in range(t.blocks):
        q = torch.zeros(t.block, t.block, dtype=torch.float64)
        at = 0
        for i in range(t.block):
            for j in range(i):
                q[i, j], q[j, i] = own["q"][k, at], -own["q"][k, at]
                at += 1
        eye = torch.eye(t.block, dtype=torch.float64)
        block = slice(k * t.block, (k + 1) * t.block)
        wanted[block, block] = torch.linalg.inv(eye - q) @ (eye + q)
    testing.close(t.matrix(own), wanted, "Cayley")
    testing.close(wanted @ wanted.T, torch.eye(width, dtype=torch.float64), "orthogonal")
    assert t.count() == t.blocks * t.block * (t.block - 1) // 2


def test_diagonal() -> None:
    t = build(TRANSFORMS, "transform", "diagonal", 5)
    own = numbers(t)
    testing.close(t.matrix(own), torch.diag(1 + own["e"]), "I + diag(e)")
    assert t.count() == 5


@pytest.mark.parametrize(
    ("name", "width", "options"),
    [
        ("diagonal", 6, {}),
        ("rotation", 12, {"block_size": 4}),
        ("tensor_ring", 24, {}),
        ("tensor_ring", 29, {"rank": 1}),  # padded
        ("tensor_ring", 12, {"rank": 2}),  # by the dense T, which costs less here
        ("tensor_ring", 400, {"rank": 2, "mode_shape": [20, 20]}),  # by halves of the ring
        ("tensor_ring", 399, {"rank": 2, "init": "paper", "mode_shape": [4, 5, 20]}),
        ("tensor_ring", 5, {"rank": 1, "order": 1}),
    ],
)
def test_what_a_transform_does_to_the_rows_of_a_weight(name: str, width: int, options: dict[str, object]) -> None:
    t = build(TRANSFORMS, "transform", name, width, **options)
    own, rows = numbers(t), noise(2, 3, width, seed=8)
    excess = t.matrix(own) - torch.eye(width, dtype=torch.float64)
    testing.close(t.row_shift(rows, own), rows @ excess, "rows (T - I)", torch.float32)  # the paper's start has 1 / R
    start = {n: value.float() for n, value in t.start("s").items()} | t.constants("s")
    assert not t.row_shift(rows.float(), start).any()


# ---- residuals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "r", "order"), [(6, 8, 2, 2), (12, 5, 1, 3), (7, 11, 2, 3)])
def test_tensor_ring_residual(rows: int, cols: int, r: int, order: int) -> None:
    d = TensorRingResidual(rows, cols, r=r, order=order, alpha=2.0)
    own = numbers(d)
    b, c = [own[f"b{i}"] for i in range(len(d.out_modes))], [own[f"c{i}"] for i in range(len(d.in_modes))]
    wanted = torch.zeros(prod(d.out_modes), prod(d.in_modes), dtype=torch.float64)
    for o, out in enumerate(product(*map(range, d.out_modes))):
        for i, into in enumerate(product(*map(range, d.in_modes))):
            chain = torch.eye(r, dtype=torch.float64)
            for core, n in zip([*b, *c], [*out, *into], strict=True):
                chain = chain @ core[:, :, n]
            wanted[o, i] = 2.0 / r**0.5 * chain.trace()
    testing.close(d.factors(own).dense(), wanted[:rows, :cols], "trace of the chain")
    assert d.count() == r**2 * (sum(d.out_modes) + sum(d.in_modes))
    assert d.factors(own).down.shape[0] == r**2, "a ring residual is a low-rank product of rank R^2"


@pytest.mark.parametrize(("scaling", "s"), [("plain", 5.0 / 3), ("rslora", 5.0 / 3**0.5)])
def test_low_rank(scaling: str, s: float) -> None:
    d = build(RESIDUALS, "residual", "low_rank", 6, 4, r=3, alpha=5.0, scaling=scaling)
    own = numbers(d)
    wanted = sum(s * torch.outer(own["b"][:, k], own["a"][k]) for k in range(3))
    testing.close(d.factors(own).dense(), wanted, "s B A")
    assert d.count() == 3 * (6 + 4)


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"relative": True}, {"nonneg": True}])
def test_spectral_is_the_paper_form(options: dict[str, object]) -> None:
    """W - W_r + U_r diag(s) V_r^T with trained s, the form SVFit publishes."""
    w = noise(8, 6)
    d = Spectral(8, 6, r=3, **options)  # type: ignore[arg-type]
    factors, pins = d.decompose(w.float(), None)
    assert not pins
    delta = 3 * noise(3, seed=2)
    u, s, vh = torch.linalg.svd(w)
    moved = delta * (2.0 if "alpha" in options else 1.0)
    moved = delta * s[:3] if "relative" in options else moved
    new = (s[:3] + moved).clamp(min=0) if "nonneg" in options else s[:3] + moved
    paper = w.clone()
    for k in range(3):
        paper += (new[k] - s[k]) * torch.outer(u[:, k], vh[k])
    own = {"delta": delta} | {n: t.double() for n, t in factors.items()}
    testing.close(w + d.factors(own).dense(), paper, "the paper's form", torch.float32)


def test_svfit_of_full_rank_reaches_any_spectrum() -> None:
    for shape in ((6, 6), (8, 5), (5, 8)):
        w, d = noise(*shape), Spectral(*shape, r="full")
        factors, _ = d.decompose(w.float(), None)
        wanted = noise(min(shape), seed=5)
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        delta = wanted - factors["values"].double()
        own = {"delta": delta} | {n: t.double() for n, t in factors.items()}
        testing.close(w + d.factors(own).dense(), u * wanted @ vh, "U diag(any) V^T", torch.float32)


def ldu_by_loops(w: Tensor, r: int, pivots: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """r steps of elimination with partial pivoting (or along given rows): P L_r [m, r], D [r], U_r [r, n], pivots."""
    rest, used = w.clone(), []
    lower, upper = torch.zeros(w.shape[0], r, dtype=w.dtype), torch.zeros(r, w.shape[1], dtype=w.dtype)
    diagonal = torch.zeros(r, dtype=w.dtype)
    for k in range(r):
        free = [i for i in range(w.shape[0]) if i not in used]
        row = pivots[k] if pivots is not None else max(free, key=lambda i: abs(float(rest[i, k])))
        diagonal[k] = rest[row, k]
        lower[:, k], upper[k] = rest[:, k] / rest[row, k], rest[row] / rest[row, k]
        rest = rest - diagonal[k] * torch.outer(lower[:, k], upper[k])
        used.append(row)
    return lower, diagonal, upper, used


@pytest.mark.parametrize("given", [None, [3, 0, 5, 1]])
def test_triangular_is_the_paper_form(given: list[int] | None) -> None:
    w, delta = noise(7, 6, seed=8), noise(4, seed=2)
    lower, _, upper, used = ldu_by_loops(w, 4, given)
    pins = None if given is None else {"pivots": torch.tensor(given, dtype=torch.uint16)}
    for atoms in ("raw", "unit"):
        d = Triangular(7, 6, r=4, atoms=atoms)
        factors, found = d.decompose(w.float(), pins)
        assert found["pivots"].tolist() == used
        wanted = torch.zeros_like(w)
        for k in range(4):
            b, a = lower[:, k], upper[k]
            wanted += delta[k] * torch.outer(b, a) / (b.norm() * a.norm() if atoms == "unit" else 1.0)
        own = {"delta": delta} | {n: t.double() for n, t in factors.items()}
        testing.close(d.factors(own).dense(), wanted, f"P L diag(delta) U, {atoms} atoms", torch.float32)


def test_a_zero_column_and_equal_rows_give_finite_atoms() -> None:
    w = noise(6, 6)
    w[:, 1], w[4] = 0, w[2]
    for atoms in ("raw", "unit"):
        factors, _ = Triangular(6, 6, r="full", atoms=atoms).decompose(w.float(), None)
        assert all(bool(torch.isfinite(t).all()) for t in factors.values())


# ---- the composed form ---------------------------------------------------------------------------------------------------


def test_composed_linear_equals_the_activation_form_and_its_gradients() -> None:
    x, w, up, down = noise(2, 5, 6).requires_grad_(), noise(4, 6, seed=1), noise(4, 3, seed=2), noise(3, 6, seed=3)
    d = noise(3, seed=4).requires_grad_()
    for bias in (None, noise(4, seed=5)):
        composed = ComposedLinear.apply(x, w, bias, up, d, down)
        plain = torch.nn.functional.linear(x, w, bias) + ((x @ down.T) * d) @ up.T
        testing.close(composed, plain, "composed")
        for a, b in zip(
            torch.autograd.grad(composed.square().sum(), (x, d)),
            torch.autograd.grad(plain.square().sum(), (x, d)),
            strict=True,
        ):
            testing.close(a, b, "gradient of the composed form")
        torch.autograd.gradcheck(lambda x, d, b=bias: ComposedLinear.apply(x, w, b, up, d, down), (x, d))


@pytest.mark.parametrize("method", ["svfit", "loldu"])
def test_many_tokens_take_the_composed_form_and_agree(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from smidgen.adapters.tuner import compose

    x = inputs(rows=4).repeat(64, 1)
    calls = []
    right = ComposedLinear.apply
    monkeypatch.setattr(compose.ComposedLinear, "apply", lambda *a: calls.append(1) or right(*a))
    net = trained(method, r="full")
    composed = net(x)
    assert calls, "many tokens at full rank did not take the composed form"
    composed.square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    net.zero_grad()
    monkeypatch.setattr(compose, "worth", lambda *a: False)
    calls.clear()
    plain = net(x)
    assert not calls
    testing.close(composed, plain, "composed against activation form")
    plain.square().sum().backward()
    for g, p in zip(grads, (p for p in net.parameters() if p.requires_grad), strict=True):
        testing.close(g, p.grad, "gradient", factor=10)


# ---- the triangular start ------------------------------------------------------------------------------------------------


def test_the_triangular_start_leaves_bond_rank_one_and_the_paper_start_does_not() -> None:
    """The paper's start keeps all slices of a core equal for ever; ours does not (tlora.md, pitfalls)."""
    spread = {}
    for init in ("paper", "triangular"):
        net = smidgen.adapt(torch.nn.Sequential(torch.nn.Linear(12, 8)), "tlora(2,2)", init=init, target_modules=["0"])
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
        target = noise(16, 8, seed=3).float()
        for _ in range(5):
            optimizer.zero_grad()
            (net(noise(16, 12).float()) - target).square().mean().backward()
            optimizer.step()
        e = net[0].smidgen_slots["default"].transform_e1.detach()
        spread[init] = float((e[0, 0] - e[1, 1]).abs().max() / e.abs().max())
    assert spread["paper"] < 1e-5 < 1e-2 < spread["triangular"]
