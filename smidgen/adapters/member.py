"""What a member is: one trained part of an adapter, written as pure functions over named tensors.

Every method of this library is the sentence ``W' = S (W T + D)``. A *transform* is a member that gives T, a *residual*
one that gives D, an *output transform* one that gives S. A member knows the geometry of one matrix and its options; it
holds no tensors. The engine (``tuner/``) holds them, with or without a leading axis [adapters, ...], and gives every
member merging, several adapters, files, banks and the table of laws.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smidgen.adapters.linalg.least_squares import solve_gram
from smidgen.errors import ConfigError, did_you_mean

Tensors = Mapping[str, Tensor]


class Member(ABC):
    """One trained part of an adapter at one matrix.

    Subclasses set ``name`` (the word used in configs) and take their options as keyword arguments after the geometry.
    """

    name: ClassVar[str]
    decomposes: ClassVar[bool] = False  # frozen factors follow from the base weight
    linear: ClassVar[bool] = False  # the update is linear in the trained numbers, so that adapters of one base add
    alternating: ClassVar[bool] = False  # ``fit`` has no closed form: a call goes some way from the numbers it is given
    rates_like: ClassVar[str | None] = (
        None  # method whose learning rates suit, for a member that no method has rates for
    )

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Trained numbers: name -> shape."""

    def start(self, seed: str) -> dict[str, Tensor]:
        """Trained numbers at the start (fp32), where the adapter is exactly the identity. Zeros unless overridden.

        Args:
            seed: text that names the adapter's seed and target; see :func:`stable_noise`.
        """
        return {name: torch.zeros(shape) for name, shape in self.shapes().items()}

    def constants(self, seed: str) -> dict[str, Tensor]:
        """Frozen numbers that follow from geometry, options and seed alone: rebuilt at load, never stored."""
        return {}

    def pins(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Whole numbers that *are* stored, because they pin the factors down: name -> (shape, dtype in the file; int32 in
        memory)."""
        return {}

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Frozen factors that follow from the base weight: name -> shape."""
        return {}

    def decompose(self, weight: Tensor, pins: Tensors | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Factors and pins of a base weight [rows, cols] (fp32); follows ``pins`` when they are given.

        Among the pins may be ``ties`` (int32, of any length), which say what the weight itself does not determine. They
        are given back with the pins of a weight that has some, and are kept in the config.
        """
        return {}, {}

    def count(self) -> int:
        """Trained numbers."""
        return sum(prod(shape) for shape in self.shapes().values())


class Transform(Member):
    """T of ``W' = S (W T + D)``: a full-rank map of the input space, the identity at the start."""

    def __init__(self, width: int) -> None:
        self.width = width

    @abstractmethod
    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        """T x over the last axis: [..., width] -> [..., width]; bit for bit x at the start."""

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """The trained numbers whose ``weight (T - I)`` is nearest to ``change``, both [n, width] in float64; what is
        ``alternating`` goes on from the trained numbers among ``tensors``.

        Raises:
            ConfigError: the member cannot be fitted.
        """
        raise ConfigError(f"A {self.name!r} transform has no fit, so it cannot be extracted.")

    def row_shift(self, rows: Tensor, tensors: Tensors) -> Tensor:
        """rows (T - I) over the last axis: [..., width] -> [..., width], which is what T does to the rows of a weight; exactly zero
        at the start. By the dense T, width^2 a row; a member whose T has a structure says it with that."""
        dense = self.matrix(tensors)
        return rows @ (dense - torch.eye(self.width, dtype=dense.dtype, device=dense.device)).to(rows.dtype)

    def matrix(self, tensors: Tensors) -> Tensor:
        """T as a dense matrix [width, width]."""
        like = next(iter(tensors.values()))
        return self.apply(torch.eye(self.width, dtype=like.dtype, device=like.device), tensors).mT


class Factors(NamedTuple):
    """A residual as a product: D = up @ diag(diagonal) @ down; up [rows, k], diagonal [k] or None, down [k, cols].

    ``floor`` [k] is the least that the diagonal may be, the adapter's weight included; :meth:`weighed` sees to it.
    """

    up: Tensor
    diagonal: Tensor | None
    down: Tensor
    floor: Tensor | None = None

    def weighed(self, weight: float | Tensor = 1.0) -> Factors:
        """The factors of s D at a weight s, none of them below the floor."""
        one = not isinstance(weight, Tensor) and weight == 1
        if self.diagonal is None:
            return self if one else self._replace(up=self.up * weight)
        diagonal = self.diagonal if one else self.diagonal * weight
        return Factors(self.up, diagonal if self.floor is None else torch.maximum(diagonal, self.floor), self.down)

    def dense(self) -> Tensor:
        """D [rows, cols] in fp32 or better; of factors that lead with an axis [experts], one D each."""
        own = self.weighed()
        up, down = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (own.up, own.down))
        return (up if own.diagonal is None else up * own.diagonal[..., None, :]) @ down


class Residual(Member):
    """D of ``W' = S (W T + D)``: an additive update, zero at the start."""

    diagonal_between: ClassVar[bool] = False  # a trained diagonal between two frozen factors
    stacks: ClassVar[bool] = False  # ``factors`` takes trained numbers with a leading axis too; see :meth:`stacked`

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols

    @abstractmethod
    def factors(self, tensors: Tensors) -> Factors:
        """D as a product of factors; ``tensors`` holds trained numbers, pins, constants and frozen factors by name."""

    def fit(self, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """The trained numbers whose D is nearest to ``change`` [rows, cols] in float64: least squares where they are a
        diagonal between frozen factors. What is ``alternating`` goes on from the trained numbers among ``tensors``.

        Raises:
            ConfigError: the member cannot be fitted.
        """
        if not self.diagonal_between:
            raise ConfigError(f"A {self.name!r} residual has no fit, so it cannot be extracted.")
        ((name, shape),) = self.shapes().items()
        unit = self.factors({**tensors, name: torch.ones(shape, dtype=change.dtype)})
        assert unit.diagonal is not None
        gram = (unit.up.mT @ unit.up) * (unit.down @ unit.down.mT)
        wanted = solve_gram(gram, ((unit.up.mT @ change) * unit.down).sum(1, keepdim=True))[:, 0]
        if unit.floor is not None:
            wanted = torch.maximum(wanted, unit.floor)
        return {name: torch.where(unit.diagonal == 0, 0.0, wanted / unit.diagonal)}

    def stacked(self, factors: Factors) -> Factors:
        """What :meth:`factors` made of trained numbers [adapters, ...]: the diagonal alone leads with the adapters, between
        an up and a down that all share, or there is none and up and down both lead.

        Raises:
            ConfigError: anything else, which ``stacks`` does not allow.
        """
        axes = 3 if factors.diagonal is None else 2
        if not factors.up.dim() == factors.down.dim() == axes:
            raise ConfigError(
                f"Residual {self.name!r} says that it stacks, but its up has {factors.up.dim()} axes and its down "
                f"{factors.down.dim()}, not {axes} each {'without' if axes == 3 else 'with'} a diagonal; leave stacks out."
            )
        return factors


class Output(Member):
    """S of ``W' = S (W T + D)``: a map of the output space, the identity at the start.

    ``width`` is the number of output features, in a grouped convolution those of one group, each with numbers of its own.
    """

    normed: ClassVar[bool] = False  # tensors hold ``base_norms`` and ``norms`` too, |W| and |W T + D| row by row
    diagonal: ClassVar[bool] = False  # S is a factor for each feature
    exact_gradient: ClassVar[Mapping[str, Any]] = {}  # options with which nothing is held constant in the backward pass

    def __init__(self, width: int) -> None:
        self.width = width

    @abstractmethod
    def shift(self, y: Tensor, tensors: Tensors) -> Tensor:
        """(S - I) y over the last axis: [..., width] -> [..., width]; exactly zero at the start."""

    def fit(self, weight: Tensor, change: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """The trained numbers whose ``(S - I) weight`` is nearest to ``change``, both [width, n] in float64.

        Raises:
            ConfigError: the member cannot be fitted.
        """
        raise ConfigError(f"A {self.name!r} output transform has no fit, so it cannot be extracted.")


def whole_rank(r: Any, what: str, full: int | None = None) -> int:
    """A rank as it was asked for; ``full`` is what "full" stands for, where it means something.

    Raises:
        ConfigError: no whole number of at least 1.

    Example:
        >>> whole_rank("full", "r of a 'seeded' residual", 16)
        16
    """
    if r == "full" and full is not None:
        return full
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        also = "" if full is None else " or 'full'"
        raise ConfigError(f"{what} must be a whole number of at least 1{also}, got {r!r}.")
    return r


def scale_of(alpha: float | None, rank: int, scaling: str) -> float:
    """The factor s in front of a residual: 1 without alpha, else alpha/r (``plain``) or alpha/sqrt(r) (``rslora``).

    ``rank`` is the r that was asked for, as in the released code of LoRA and LoLDU, also where a matrix has fewer directions.
    """
    if scaling not in ("plain", "rslora"):
        raise ConfigError(f"scaling must be 'plain' (alpha/r) or 'rslora' (alpha/sqrt(r)), got {scaling!r}.")
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < float("inf"):
        raise ConfigError(f"alpha must be a finite number other than 0, or None, got {alpha!r}.")
    return alpha / rank if scaling == "plain" else alpha / rank**0.5


def stable_noise(seed: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Nearly Gaussian fp32 noise that is the same, bit for bit, on every machine and version.

    torch's and numpy's generators may change between releases and devices; start values that are *not* stored must
    not. Twelve uniforms from BLAKE2b in counter mode are summed (Irwin-Hall), which takes exact arithmetic only.

    Args:
        seed: any text; different texts give independent noise.
        shape: shape of the result.
        std: standard deviation.
    """
    n = prod(shape)
    blocks = (n * 12 * 2 + 63) // 64
    key = hashlib.blake2b(seed.encode(), digest_size=32).digest()
    raw = b"".join(hashlib.blake2b(i.to_bytes(8, "little"), key=key).digest() for i in range(blocks))
    uniform = np.frombuffer(raw, dtype="<u2")[: n * 12].astype(np.int64).reshape(n, 12)
    unit = (uniform.sum(axis=1) - 6 * 65535) / 65535.0  # variance 1
    return torch.from_numpy((unit * std).astype(np.float32)).reshape(shape)


def stable_signs(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Random +-1 (fp32), the same on every machine and version: bits of BLAKE2b in counter mode.

    Example:
        >>> stable_signs("any text", (2, 3)).abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    n = prod(shape)
    key = hashlib.blake2b(seed.encode(), digest_size=32).digest()
    raw = b"".join(hashlib.blake2b(i.to_bytes(8, "little"), key=key).digest() for i in range((n + 511) // 512))
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[:n]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(shape)


def build(registry: Mapping[str, type], kind: str, name: str, *geometry: int, **options: Any) -> Any:
    """The member ``name`` of a registry at one geometry, or a :class:`ConfigError` that lists what exists."""
    if name not in registry:
        raise ConfigError(
            f"Unknown {kind} {name!r}.{did_you_mean(name, registry)} Known: {', '.join(sorted(registry))}."
        )
    return registry[name](*geometry, **options)
