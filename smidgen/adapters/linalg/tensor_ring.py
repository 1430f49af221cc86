"""Tensor rings: matrices and vectors as closed chains of small cores (TLoRA, arXiv 2501.08727, sections 3.1-3.2).

A *ring matrix* is a list of cores ``A_d`` of shape [bond, bond, I_d, I_d], a *ring vector* a list of cores
[bond, bond, n_d]; the bond axes come first, and core 0 is the slowest index (C order, same as ``torch.kron``)::

    T[(i1..iD), (j1..jD)] = trace(A_1[i1, j1] A_2[i2, j2] ... A_D[iD, jD])

Split in two, a ring of bond rank R is a sum of R^2 Kronecker products, T = sum_rs L[r, s] kron M[s, r]; everything here
is built on that, so T itself is formed only where it is cheaper.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from smidgen.adapters.linalg.kronecker import kronecker_apply
from smidgen.errors import ConfigError


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The dense matrix T [I, I] of ring cores [bond, bond, I_d, I_d], with I = I_1 ... I_D.

    Example:
        >>> a, b = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 3, 3)
        >>> torch.allclose(ring_matrix([a, b]), torch.kron(a[0, 0], b[0, 0]))
        True
    """
    _check(cores, 4)
    split = _split(_modes(cores))
    if split == len(cores):
        return torch.einsum("aaij->ij", reduce(_join_matrices, cores))
    left, right = reduce(_join_matrices, cores[:split]), reduce(_join_matrices, cores[split:])
    dense = torch.einsum("abij,bakl->ikjl", left, right)
    return dense.reshape(left.shape[2] * right.shape[2], left.shape[3] * right.shape[3])


def ring_apply(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """T x along the last axis of ``x`` [..., I], for cores [bond, bond, I_d, I_d].

    At R = 1 T is never formed: each core acts on its own mode, sum(I_d) multiplications per number of x instead of I.
    At R > 1 x is read as a matrix [left, right] and multiplied from both sides, R^2 (left + right) multiplications per
    number, unless T itself is cheaper for so many tokens.

    Raises:
        ConfigError: cores that do not close into a ring, or a last axis of ``x`` other than I.

    Example:
        >>> cores = identity_cores((2, 3), R=2, generator=torch.Generator().manual_seed(0))
        >>> x = torch.randn(5, 6)
        >>> torch.equal(ring_apply(cores, x), x)
        True
    """
    _check(cores, 4)
    modes = _modes(cores)
    width = math.prod(modes)
    if x.shape[-1] != width:
        raise ConfigError(f"cores of modes {modes} act on the last axis of {width} numbers, got x {tuple(x.shape)}")
    rank, split = cores[0].shape[0], _split(modes)
    if rank == 1 and len(cores) > 1:
        return kronecker_apply([core[0, 0] for core in cores], x)
    if split == len(cores) or _dense_is_cheaper(modes, split, rank, x.numel() // max(1, width)):
        return x @ ring_matrix(cores).mT
    return _apply_pair(reduce(_join_matrices, cores[:split]), reduce(_join_matrices, cores[split:]), x)


def identity_cores(
    shape: Sequence[int],
    R: int,
    init: str = "triangular",
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Cores [R, R, I_d, I_d] of a ring matrix that is the identity.

    ``"paper"`` puts Identity / R in every bond slice. All slices then receive equal gradients for ever, so the ring
    stays one Kronecker product. ``"triangular"`` (default) starts from unequal slices and is bit for bit the identity:
    slice [0, 0] is the identity, the rest of bond column 0 is zero, row 0 is Gaussian of std 0.5 / sqrt(I_d), and the
    remaining block is zero in the first core and Gaussian of std 1 / sqrt(I_d (R - 1)) in the others. At R = 1 both
    are one identity.

    Raises:
        ConfigError: an unknown ``init``, R < 1 or an empty shape.

    Example:
        >>> cores = identity_cores((2, 4), R=3, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(ring_matrix(cores), torch.eye(8))
        True
    """
    if init not in ("triangular", "paper"):
        raise ConfigError(f"the init of a ring matrix is 'triangular' or 'paper', got {init!r}")
    if R < 1 or not shape or min(shape) < 1:
        raise ConfigError(f"a ring matrix needs R >= 1 and modes >= 1, got R = {R} and shape {tuple(shape)}")
    make = _paper_core if init == "paper" else _triangular_core
    return [make(n, R, first=d == 0, generator=generator).to(device=device, dtype=dtype) for d, n in enumerate(shape)]


def ring_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Cores of X Y^T from the cores of X and Y: ``C_d[i, j] = sum_l A_d[i, l] kron B_d[j, l]``, bond rank R_a R_b.

    Example:
        >>> cores = [torch.randn(2, 2, 3, 3, dtype=torch.float64) for _ in range(2)]
        >>> t = ring_matrix(cores)
        >>> torch.allclose(ring_matrix(ring_product(cores, cores)), t @ t.T)
        True
    """
    _check(a, 4)
    _check(b, 4)
    if _modes(a) != _modes(b):
        raise ConfigError(f"a ring product needs equal modes, got {_modes(a)} and {_modes(b)}")
    return [torch.einsum("abil,cdjl->acbdij", p, q).flatten(2, 3).flatten(0, 1) for p, q in zip(a, b, strict=True)]


def ring_vector_dense(cores: Sequence[Tensor]) -> Tensor:
    """The vector [n_1 ... n_D] of ring cores [bond, bond, n_d]: ``v[n..] = trace(A_1[n1] ... A_D[nD])``.

    Example:
        >>> ring_vector_dense([torch.ones(2, 2, 3), torch.ones(2, 2, 2)])
        tensor([4., 4., 4., 4., 4., 4.])
    """
    _check(cores, 3)
    return torch.einsum("aan->n", reduce(_join_vectors, cores))


def ring_vector_factors(out_cores: Sequence[Tensor], in_cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """P [O, R^2] and Q [R^2, I] with P Q = Delta, the ring vector of ``out_cores + in_cores`` read as a matrix [O, I].

    So a tensor-ring residual of bond rank R *is* a LoRA of rank R^2. Cores are [bond, bond, n_d].

    Example:
        >>> out, into = [torch.randn(2, 2, 3), torch.randn(2, 2, 2)], [torch.randn(2, 2, 5)]
        >>> p, q = ring_vector_factors(out, into)
        >>> torch.allclose(p @ q, ring_vector_dense(out + into).view(6, 5), atol=1e-5)
        True
    """
    _check([*out_cores, *in_cores], 3)
    p, q = reduce(_join_vectors, out_cores), reduce(_join_vectors, in_cores)
    return p.flatten(0, 1).mT, q.transpose(0, 1).flatten(0, 1)


def _apply_pair(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """sum_rs (left[r, s] kron right[s, r]) x with left [R, R, a, a], right [R, R, b, b], x [..., a b]."""
    a, b = left.shape[2], right.shape[2]
    y = x.reshape(-1, a * b).mT.reshape(a, -1)
    # tokens last: [i, (l n)] -> [(k r s), (l n)] -> [k, (r s l), n] -> [k, m, n], no permutation in between
    half = (left.permute(2, 0, 1, 3).flatten(0, 2) @ y).reshape(a, left.shape[0] ** 2 * b, -1)
    inner = right.permute(2, 1, 0, 3).flatten(1)
    return torch.bmm(inner.expand(a, -1, -1), half).reshape(a * b, -1).mT.contiguous().view(x.shape)


def _dense_is_cheaper(modes: tuple[int, ...], split: int, rank: int, tokens: int) -> bool:
    """Multiplications of forming T once and multiplying, against those of the R^2 Kronecker products.

    The latter move R^2 times the numbers of x through memory: worth 60 % more multiplications (16-1024 tokens).
    """
    a, b = math.prod(modes[:split]), math.prod(modes[split:])
    dense = (a * b) ** 2 * (rank * rank + tokens)
    pair = tokens * a * b * (a + b) * rank * rank
    return dense < 1.6 * pair


def _split(modes: tuple[int, ...]) -> int:
    """Where to cut the ring in two so that the two halves cost least; ``len(modes)`` for a single core."""
    if len(modes) == 1:
        return 1
    return min(range(1, len(modes)), key=lambda s: math.prod(modes[:s]) + math.prod(modes[s:]))


def _join_matrices(a: Tensor, b: Tensor) -> Tensor:
    """One core [R, R, ik, jl] from two neighbours [R, R, i, j] and [R, R, k, l]."""
    return torch.einsum("rsij,stkl->rtikjl", a, b).flatten(4, 5).flatten(2, 3)


def _join_vectors(a: Tensor, b: Tensor) -> Tensor:
    """One core [R, R, nm] from two neighbours [R, R, n] and [R, R, m]."""
    return torch.einsum("rsn,stm->rtnm", a, b).flatten(2, 3)


def _paper_core(n: int, rank: int, *, first: bool, generator: torch.Generator | None) -> Tensor:
    return (torch.eye(n) / rank).expand(rank, rank, n, n).clone()


def _triangular_core(n: int, rank: int, *, first: bool, generator: torch.Generator | None) -> Tensor:
    core = torch.zeros(rank, rank, n, n)
    core[0, 0] = torch.eye(n)
    if rank == 1:
        return core
    core[0, 1:] = torch.randn(rank - 1, n, n, generator=generator) * (0.5 / math.sqrt(n))
    if not first:
        scale = 1.0 / math.sqrt(n * (rank - 1))
        core[1:, 1:] = torch.randn(rank - 1, rank - 1, n, n, generator=generator) * scale
    return core


def _modes(cores: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(core.shape[-1] for core in cores)


def _check(cores: Sequence[Tensor], axes: int) -> None:
    kind = "[bond, bond, I_d, I_d]" if axes == 4 else "[bond, bond, n_d]"
    if not cores or any(core.dim() != axes or core.shape[2] != core.shape[-1] for core in cores):
        raise ConfigError(f"ring cores have shape {kind}, got {[tuple(core.shape) for core in cores]}")
    bonds = [core.shape[:2] for core in cores]
    if any(bond != bonds[0] or bond[0] != bond[1] for bond in bonds):
        raise ConfigError(f"ring cores share one square bond, got bonds {[tuple(bond) for bond in bonds]}")
