"""Methods: named pairs of a transform and a residual with their published defaults.

A method is data. ``resolve`` turns a method name and options into the two members' names and options; any transform may
be paired with any residual by naming the two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smidgen.adapters.member import Residual, Transform, build
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Method:
    """A named pair. ``defaults`` are options of :func:`smidgen.config`."""

    name: str
    transform: str | None
    residual: str | None
    paper: str
    summary: str
    formula: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "tlora",
            "tensor_ring",
            "tensor_ring",
            "arXiv 2501.08727",
            "tensor-ring transform of the input space and a tensor-ring residual",
            "R_T^2 sum(I_d^2) + R_D^2 (sum O_d + sum I_d)",
            {"transform_rank": 1, "residual_rank": 2, "alpha": 1.0, "scaling": "rslora"},
        ),
        Method(
            "tlora_star",
            "tensor_ring",
            "low_rank",
            "arXiv 2501.08727",
            "tensor-ring transform and a LoRA residual (TLoRA*)",
            "R_T^2 sum(I_d^2) + r (out + in)",
            {"transform_rank": 1, "r": 1, "alpha": 1.0, "scaling": "rslora"},
        ),
        Method(
            "svfit",
            None,
            "spectral",
            "arXiv 2409.05926",
            "the top r singular values of each matrix",
            "min(r, out, in)",
            {"r": 64},
        ),
        Method(
            "loldu",
            None,
            "triangular",
            "arXiv 2410.13618",
            "the first r entries of the diagonal of an LDU factorisation",
            "min(r, out, in)",
            {"r": 64},
        ),
        Method("lora", None, "low_rank", "arXiv 2106.09685", "low-rank product B A", "r (out + in)", {"r": 8}),
        Method(
            "seeded",
            None,
            "seeded",
            "docs/budget.md",
            "coefficients of fixed random directions: the smallest and most portable files",
            "r",
            {"r": 64, "store_dtype": "float16"},
        ),
        Method(
            "oft",
            "rotation",
            None,
            "arXiv 2306.07280",
            "block-diagonal rotation of the input space (Cayley)",
            "blocks b (b - 1) / 2, b = in / blocks",
            {"block_size": 32},
        ),
    )
}

# The option of `smidgen.config` that means a member's rank, where the member calls it otherwise.
_RANKS = {"transform": {"transform_rank": "rank"}, "residual": {"r": "r", "residual_rank": "r"}}
# Names a config may hold that are not options of a member.
_TLORA_NOTATION = re.compile(r"tlora(\*|_star)?\((\d+),\s*(\d+)\)", re.IGNORECASE)


def parse_method(method: str) -> tuple[Method, dict[str, Any]]:
    """A method and the options its spelling carries: ``"tlora(2,6)"`` is tlora with transform_rank 2, residual_rank 6.

    Raises:
        ConfigError: for a name that is no method, with the nearest ones.

    Example:
        >>> parse_method("TLoRA*(2,4)")[1]
        {'transform_rank': 2, 'r': 4}
    """
    match = _TLORA_NOTATION.fullmatch(method.strip())
    if match:
        star, first, second = match.groups()
        name, last = ("tlora_star", "r") if star else ("tlora", "residual_rank")
        return METHODS[name], {"transform_rank": int(first), last: int(second)}
    name = method.strip().lower().replace("-", "_")
    if name not in METHODS:
        raise ConfigError(f"Unknown method {method!r}.{did_you_mean(name, METHODS)} Known: {', '.join(METHODS)}.")
    return METHODS[name], {}


def member_options(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """Options of a member by name, without its geometry: what a config may set for it."""
    registry: Mapping[str, type] = TRANSFORMS if kind == "transform" else RESIDUALS
    if name not in registry:
        raise ConfigError(
            f"Unknown {kind} {name!r}.{did_you_mean(name, registry)} Known: {', '.join(sorted(registry))}."
        )
    geometry = {"width", "rows", "cols"}
    return {k: p for k, p in inspect.signature(registry[name]).parameters.items() if k not in geometry}


def split_options(
    transform: str | None, residual: str | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of :func:`smidgen.config` sorted into the transform's and the residual's own.

    ``r`` and ``residual_rank`` mean the residual's rank, ``transform_rank`` the transform's; an option that neither
    member knows is an error.

    Raises:
        ConfigError: unknown or contradictory options.
    """
    sides = {"transform": transform, "residual": residual}
    known = {kind: member_options(kind, name) if name else {} for kind, name in sides.items()}
    sorted_options: dict[str, dict[str, Any]] = {"transform": {}, "residual": {}}
    for option, value in options.items():
        takers = [
            (kind, inner)
            for kind in ("transform", "residual")
            for inner in (_RANKS[kind].get(option, option),)
            if inner in known[kind] and not (inner == "rank" and option == "rank")
        ]
        if not takers:
            every = sorted({*known["transform"], *known["residual"], "r", "transform_rank", "residual_rank"} - {"rank"})
            raise ConfigError(
                f"Option {option}={value!r} has no meaning for transform={transform!r} with residual={residual!r}."
                f"{did_you_mean(option, every)} Known: {', '.join(every)}."
            )
        for kind, inner in takers:
            if inner in sorted_options[kind] and sorted_options[kind][inner] != value:
                raise ConfigError(f"r and residual_rank are both given and differ ({option}={value!r}); give one.")
            sorted_options[kind][inner] = value
    return sorted_options["transform"], sorted_options["residual"]


def make_members(
    transform: str | None,
    residual: str | None,
    transform_options: Mapping[str, Any],
    residual_options: Mapping[str, Any],
    width: int,
    rows: int,
    cols: int,
) -> tuple[Transform | None, Residual | None]:
    """The two members of one matrix [rows, cols] whose transformed axis has ``width`` features."""
    t = build(TRANSFORMS, "transform", transform, width, **transform_options) if transform else None
    d = build(RESIDUALS, "residual", residual, rows, cols, **residual_options) if residual else None
    return t, d
