"""Methods: named pairs of a transform and a residual with their published defaults and their learning rates.

A method is data: one row of ``METHODS`` is all that the recipes, the zoo and the command line need to know of it. Any
transform may be paired with any residual by naming the two, ``"rotation+spectral"``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from smidgen.adapters.member import Residual, Transform, build
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.errors import OTHER_NAMES, ConfigError, did_you_mean

# What rates differ by: the family of a model that reads texts or images, and for image generators what is learnt on what.
Kind = Literal["encoder", "vision", "decoder", "picture", "picture_embedded", "control_embedded"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Rates:
    """Learning rates: for the residual, for the transform where there is one, and for a head (None: as the residual)."""

    residual: float
    transform: float
    head: float | None = None

    def chosen(self, residual: float | None, transform: float | None, head: float | None = None) -> Rates:
        """These where nothing is given. A residual's rate alone moves the transform's in proportion."""
        own = self.residual if residual is None else residual
        turn = self.transform * (own / self.residual) if transform is None else transform
        return Rates(own, turn, head)


def _rates(**by_kind: float | tuple[float, float]) -> Mapping[Kind, Rates]:
    """Rates by kind: one number for both members, or the residual's and the transform's."""
    return {kind: Rates(*(v if isinstance(v, tuple) else (v, v))) for kind, v in by_kind.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class Method:
    """A named pair. ``defaults`` are options of :func:`smidgen.config`.

    ``rates`` holds learning rates by kind. One kind is enough: the others follow in the proportion of a method with like
    members. None at all is allowed too: then the rates are those of like members.
    """

    name: str
    transform: str | None
    residual: str | None
    paper: str
    summary: str
    formula: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[Kind, Rates] = field(default_factory=dict)


# Rates on the embedded base are tuned (benchmarks/personalize.py --stage tune, benchmarks/control.py); on full-size image
# generators they are the papers' values, a place to start.
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
            _rates(
                encoder=(2e-2, 6e-3),
                vision=(2e-2, 6e-3),
                decoder=(1e-2, 3e-3),
                picture=(2e-4, 1e-4),
                picture_embedded=(4e-2, 1.2e-2),
                control_embedded=(3e-2, 9e-3),
            ),
        ),
        Method(
            "tlora_star",
            "tensor_ring",
            "low_rank",
            "arXiv 2501.08727",
            "tensor-ring transform and a LoRA residual (TLoRA*)",
            "R_T^2 sum(I_d^2) + r (out + in)",
            {"transform_rank": 1, "r": 1, "alpha": 1.0, "scaling": "rslora"},
            _rates(
                encoder=(5e-3, 1.5e-3),
                vision=(5e-3, 1.5e-3),
                decoder=(2e-3, 6e-4),
                picture=(2e-4, 5e-5),
                picture_embedded=(1e-2, 5e-3),
                control_embedded=(1e-2, 3e-3),
            ),
        ),
        Method(
            "svfit",
            None,
            "spectral",
            "arXiv 2409.05926",
            "the top r singular values of each matrix",
            "min(r, out, in)",
            {"r": 64},
            _rates(
                encoder=1e-1,
                vision=3e-2,  # hotter ends below the head alone
                decoder=5e-2,
                picture=5e-2,
                picture_embedded=1.5e-1,
                control_embedded=2e-1,
            ),
        ),
        Method(
            "loldu",
            None,
            "triangular",
            "arXiv 2410.13618",
            "the first r entries of the diagonal of an LDU factorisation",
            "min(r, out, in)",
            {"r": 64},
            _rates(
                encoder=1e-1,
                vision=3e-2,
                decoder=5e-2,
                picture=5e-3,
                picture_embedded=2e-1,
                control_embedded=2e-1,
            ),
        ),
        Method(
            "lora",
            None,
            "low_rank",
            "arXiv 2106.09685",
            "low-rank product B A",
            "r (out + in)",
            {"r": 8},
            _rates(
                encoder=2e-3,
                vision=2e-3,
                decoder=1e-3,
                picture=1e-4,
                picture_embedded=1e-2,
                control_embedded=1e-2,
            ),
        ),
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
            _rates(
                encoder=2e-3,
                vision=2e-3,
                decoder=1e-3,
                picture=1e-4,
                picture_embedded=5e-3,
                control_embedded=3e-3,
            ),
        ),
    )
}

# What recipes train besides our methods. peft's own methods, ``peft:lora`` and the like, start where ``lora`` does.
OTHERS: dict[str, Mapping[Kind, Rates]] = {
    "peft": METHODS["lora"].rates,
    "full": _rates(encoder=5e-5, vision=5e-5, decoder=2e-5),
}

# The option of `smidgen.config` that means a member's rank, where the member calls it otherwise.
_RANKS = {"transform": {"transform_rank": "rank"}, "residual": {"r": "r", "residual_rank": "r"}}
# Names a config may hold that are not options of a member.
_TLORA_NOTATION = re.compile(r"tlora(\*|_star)?\((\d+),\s*(\d+)\)", re.IGNORECASE)


def parse_method(method: str) -> tuple[Method, dict[str, Any]]:
    """A method and the options its spelling carries: ``"tlora(2,6)"`` is tlora with transform_rank 2, residual_rank 6.

    ``"rotation+spectral"``, a transform and a residual, and ``"diagonal"``, a member alone, are methods without a row: they
    have the members' own defaults.

    Raises:
        ConfigError: for a name that is no method or no member, with the nearest ones.

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
    if "+" in name:
        first, _, last = (part.strip() for part in name.partition("+"))
        for side, member in (("transform", first), ("residual", last)):
            member_options(side, member)  # raises where there is none
        return Method(f"{first}+{last}", first, last, "", "", ""), {}
    known = {m.name: m for m in known_methods()}
    if name not in known:
        raise ConfigError(
            f"Unknown method {method!r}.{did_you_mean(name, known)} Known: {', '.join(known)}, and any transform with "
            "any residual, such as rotation+low_rank."
        )
    return known[name], {}


def known_methods() -> list[Method]:
    """The rows of ``METHODS``, then a method for each member that no row is about: the member alone."""
    rows = {(m.transform, m.residual) for m in METHODS.values()}
    alone = [Method(name, name, None, "", *_told(member)) for name, member in TRANSFORMS.items()]
    alone += [Method(name, None, name, "", *_told(member)) for name, member in RESIDUALS.items()]
    both = TRANSFORMS.keys() & RESIDUALS.keys()  # a name that means either means neither
    return [*METHODS.values(), *(m for m in alone if (m.transform, m.residual) not in rows and m.name not in both)]


def _told(member: type) -> tuple[str, str]:
    """(first sentence, count) as the docstring of a member's file tells them."""
    text = inspect.getdoc(inspect.getmodule(member)) or ""
    return text.partition("\n")[0], text.partition("Count: ")[2].partition("\n")[0].rstrip(".")


def learning_rates(method: str, kind: Kind, transform: str | None = None, residual: str | None = None) -> Rates:
    """Where to start: the default learning rates of a method for a kind of task.

    Args:
        method: as in :func:`parse_method`, ``peft:NAME``, or ``full``.
        kind: one of ``KINDS``.
        transform, residual: members that replace the method's.

    Raises:
        ConfigError: an unknown method or member, or one that this kind of task does not train.

    Example:
        >>> learning_rates("tlora(2,6)", "encoder")
        Rates(residual=0.02, transform=0.006, head=None)
        >>> learning_rates("rotation+spectral", "encoder")  # each member as in its own method
        Rates(residual=0.1, transform=0.002, head=None)
    """
    other = OTHERS.get(method.partition(":")[0])
    if other is not None:
        if kind not in other:
            raise ConfigError(
                f"There is no learning rate for {method!r} in a {kind} task; there is for: {', '.join(other)}."
            )
        return other[kind]
    found = parse_method(method)[0]
    for side, member in (("transform", transform), ("residual", residual)):
        if member:
            member_options(side, member)  # raises where there is none
    pair = (transform or found.transform, residual or found.residual)
    if found.rates and pair == (found.transform, found.residual):
        return _of_method(found, kind)
    return member_rates(*pair, kind)


def member_rates(transform: str | None, residual: str | None, kind: Kind) -> Rates:
    """Learning rates of two members: of the method they make, else each as in the method that is most its own."""
    made = next((m for m in METHODS.values() if m.rates and (m.transform, m.residual) == (transform, residual)), None)
    if made:
        return _of_method(made, kind)
    sides = [_of_member(side, name, kind) for side, name in (("transform", transform), ("residual", residual)) if name]
    return Rates(sides[-1].residual, sides[0].transform)


def _of_method(method: Method, kind: Kind) -> Rates:
    """The method's own rates; for a kind it has none for, its first in the proportion of like members."""
    if kind in method.rates:
        return method.rates[kind]
    known, own = next(iter(method.rates.items()))
    name, side = (method.residual, "residual") if method.residual else (method.transform, "transform")
    like = METHODS[_like(side, str(name))].rates
    factor = like[kind].residual / like[known].residual
    return Rates(own.residual * factor, own.transform * factor)


def _of_member(side: str, name: str, kind: Kind) -> Rates:
    other = {"transform": "residual", "residual": "transform"}[side]
    having = [m for m in METHODS.values() if m.rates and getattr(m, side) == name]
    having.sort(key=lambda m: getattr(m, other) is not None)  # the method of this member alone comes first
    return _of_method(having[0] if having else METHODS[_like(side, name)], kind)


def _like(side: str, name: str) -> str:
    """The method with rates of every kind whose member is most like this one: diagonals run hotter than factors."""
    member: Any = (TRANSFORMS if side == "transform" else RESIDUALS)[name]
    if member.rates_like:
        return str(member.rates_like)
    if side == "transform":
        return "oft"
    return "svfit" if member.diagonal_between else "lora"


def member_options(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """Options of a member by name, without its geometry: what a config may set for it."""
    registry: Mapping[str, type] = TRANSFORMS if kind == "transform" else RESIDUALS
    if name not in registry:
        raise ConfigError(
            f"Unknown {kind} {name!r}.{did_you_mean(name, registry)} Known: {', '.join(sorted(registry))}."
        )
    geometry = {"width", "rows", "cols"}
    return {k: p for k, p in inspect.signature(registry[name]).parameters.items() if k not in geometry}


def _meant(option: str, every: Sequence[str]) -> str:
    """The right name for an option, or that it is one of training."""
    if {"learning_rate", "max_train_steps", "train_batch_size"} & {option, *OTHER_NAMES.get(option, ())}:
        return " It belongs to training, which an adapter's config does not decide."
    return did_you_mean(option, [*every, "target_modules"])


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
                f"{_meant(option, every)} Known: {', '.join(every)}."
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
