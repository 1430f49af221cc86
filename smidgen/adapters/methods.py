"""Methods: named members, a transform, a residual, an output transform, with their published defaults and learning rates.

A method is data: one row of ``METHODS`` is all that the recipes, the zoo and the command line need to know of it. Any
members go together by naming them, ``"rotation+spectral"`` or ``"low_rank+magnitude"``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from smidgen.adapters.member import Output, Residual, Transform, build
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.errors import OTHER_NAMES, ConfigError, did_you_mean

# What rates differ by: the family of a model that reads texts or images, and for image generators what is learnt on what.
Kind = Literal["encoder", "vision", "decoder", "picture", "picture_embedded", "control_embedded"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIDES: Mapping[str, Mapping[str, type]] = {"transform": TRANSFORMS, "residual": RESIDUALS, "output": OUTPUTS}


@dataclass(frozen=True)
class Rates:
    """Learning rates: for the residual, for the transform where there is one, for a head and for an output transform (None:
    as the residual)."""

    residual: float
    transform: float
    head: float | None = None
    output: float | None = None

    def chosen(self, residual: float | None, transform: float | None, head: float | None = None) -> Rates:
        """These where nothing is given. A residual's rate alone moves the transform's in proportion."""
        own = self.residual if residual is None else residual
        turn = self.transform * (own / self.residual) if transform is None else transform
        return Rates(own, turn, head, self.output and self.output * (own / self.residual))

    def of(self, side: str) -> float:
        """The rate of a member by its side: "transform", "output", or "residual", as what else is trained has it."""
        return {"transform": self.transform, "output": self.output or self.residual}.get(side, self.residual)


def _rates(**by_kind: float | tuple[float, float]) -> Mapping[Kind, Rates]:
    """Rates by kind: one number for both members, or the residual's and the transform's."""
    return {kind: Rates(*(v if isinstance(v, tuple) else (v, v))) for kind, v in by_kind.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class Method:
    """Members by name. ``defaults`` are options of :func:`smidgen.config`.

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
    output: str | None = None

    @property
    def members(self) -> dict[str, str]:
        """Side -> member, of those that are there."""
        return {side: name for side in SIDES if (name := getattr(self, side))}


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
        Method(
            "dora",
            None,
            "low_rank",
            "arXiv 2402.09353",
            "low-rank product, and the norm of each row of the weight apart from its direction",
            "r (out + in) + out",
            {"r": 8},
            output="magnitude",
        ),
        Method(
            "ia3",
            None,
            None,
            "arXiv 2205.05638",
            "one factor for each output feature",
            "out",
            rates=_rates(encoder=1e-1, decoder=5e-3),
            output="scale",
        ),
        Method(
            "oft_out",
            None,
            None,
            "arXiv 2306.07280",
            "block-diagonal rotation of the output space (Cayley), as in the paper",
            "blocks b (b - 1) / 2, b = out / blocks",
            {"block_size": 32},
            output="output_rotation",
        ),
    )
}

# What recipes train besides our methods. peft's own methods, ``peft:lora`` and the like, start where ``lora`` does.
OTHERS: dict[str, Mapping[Kind, Rates]] = {
    "peft": METHODS["lora"].rates,
    "full": _rates(encoder=5e-5, vision=5e-5, decoder=2e-5),
}

# The option of `smidgen.config` that means a member's rank, where the member calls it otherwise.
_RANKS = {"transform": {"transform_rank": "rank"}, "residual": {"r": "r", "residual_rank": "r"}, "output": {}}
_SAID = {"transform": "transform", "residual": "residual", "output": "output transform"}
# Names a config may hold that are not options of a member.
_TLORA_NOTATION = re.compile(r"tlora(\*|_star)?\((\d+),\s*(\d+)\)", re.IGNORECASE)


def parse_method(method: str) -> tuple[Method, dict[str, Any]]:
    """A method and the options its spelling carries: ``"tlora(2,6)"`` is tlora with transform_rank 2, residual_rank 6.

    ``"rotation+spectral"``, a transform and a residual, ``"low_rank+magnitude"`` or ``"rotation+spectral+scale"``, with an
    output transform behind, and ``"diagonal"``, a member alone, are methods without a row: they have the members' own defaults.

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
        members = _named([part.strip() for part in name.split("+")])
        transform, residual, output = map(members.get, SIDES)
        return Method("+".join(members.values()), transform, residual, "", "", "", output=output), {}
    known = {m.name: m for m in known_methods()}
    if name not in known:
        raise ConfigError(
            f"Unknown method {method!r}.{did_you_mean(name, known)} Known: {', '.join(known)}, and any transform with "
            "any residual, such as rotation+low_rank, and an output transform behind them, such as rotation+low_rank+scale."
        )
    return known[name], {}


def _named(parts: list[str]) -> dict[str, str]:
    """Side -> member of a method's spelling: a transform and a residual, one of the two with an output transform, all three."""
    inner, last = (parts[:-1], parts[-1:]) if parts[-1] in OUTPUTS else (parts, [])
    if not 0 < len(inner) < 3:
        raise ConfigError(
            f"{'+'.join(parts)!r} is no method: it takes a transform, a residual and an output transform "
            f"({', '.join(OUTPUTS)}) in this order, or two of them."
        )
    sides = ["transform", "residual"]
    if len(inner) == 1:
        sides = [side for side in sides if inner[0] in SIDES[side]] or ["residual"]
        if len(sides) == 2:
            raise ConfigError(
                f"{inner[0]!r} in {'+'.join(parts)!r} may be either side; give transform= or residual=, and output=."
            )
    found = dict(zip([*sides, *["output"] * len(last)], [*inner, *last], strict=True))
    for side, member in found.items():
        member_options(side, member)  # raises where there is none
    return found


def known_methods() -> list[Method]:
    """The rows of ``METHODS``, then a method for each member that no row is about: the member alone."""
    rows = [m.members for m in METHODS.values()]
    alone = [Method(name, name, None, "", *_told(member)) for name, member in TRANSFORMS.items()]
    alone += [Method(name, None, name, "", *_told(member)) for name, member in RESIDUALS.items()]
    alone += [Method(name, None, None, "", *_told(member), output=name) for name, member in OUTPUTS.items()]
    both = TRANSFORMS.keys() & RESIDUALS.keys()  # a name that means either means neither
    return [*METHODS.values(), *(m for m in alone if m.members not in rows and m.name not in both)]


def _told(member: type) -> tuple[str, str]:
    """(first sentence, count) as the docstring of a member's file tells them."""
    text = inspect.getdoc(inspect.getmodule(member)) or ""
    return text.partition("\n")[0], text.partition("Count: ")[2].partition("\n")[0].rstrip(".")


def learning_rates(
    method: str, kind: Kind, transform: str | None = None, residual: str | None = None, output: str | None = None
) -> Rates:
    """Where to start: the default learning rates of a method for a kind of task.

    Args:
        method: as in :func:`parse_method`, ``peft:NAME``, or ``full``.
        kind: one of ``KINDS``.
        transform, residual, output: members that replace the method's.

    Raises:
        ConfigError: an unknown method or member, or one that this kind of task does not train.

    Example:
        >>> learning_rates("tlora(2,6)", "encoder")
        Rates(residual=0.02, transform=0.006, head=None, output=None)
        >>> learning_rates("rotation+spectral", "encoder")  # each member as in its own method
        Rates(residual=0.1, transform=0.002, head=None, output=None)
    """
    other = OTHERS.get(method.partition(":")[0])
    if other is not None:
        if kind not in other:
            raise ConfigError(
                f"There is no learning rate for {method!r} in a {kind} task; there is for: {', '.join(other)}."
            )
        return other[kind]
    found = parse_method(method)[0]
    for side, member in (("transform", transform), ("residual", residual), ("output", output)):
        if member:
            member_options(side, member)  # raises where there is none
    return member_rates(transform or found.transform, residual or found.residual, kind, output=output or found.output)


def member_rates(transform: str | None, residual: str | None, kind: Kind, output: str | None = None) -> Rates:
    """Learning rates of members: of the method they make, else each as in the method that is most its own."""
    wanted = {"transform": transform, "residual": residual, "output": output}
    members = {side: name for side, name in wanted.items() if name}
    made = next((m for m in METHODS.values() if m.rates and m.members == members), None)
    if made:
        return _of_method(made, kind)
    rates = {side: _of_member(side, name, kind) for side, name in members.items()}
    inner = [own for side, own in rates.items() if side != "output"] or list(rates.values())
    alone = "output" not in rates or len(rates) == 1
    return Rates(inner[-1].residual, inner[0].transform, output=None if alone else rates["output"].residual)


def _of_method(method: Method, kind: Kind) -> Rates:
    """The method's own rates; for a kind it has none for, its first in the proportion of like members."""
    if kind in method.rates:
        return method.rates[kind]
    known, own = next(iter(method.rates.items()))
    side = next(side for side in ("residual", "transform", "output") if side in method.members)
    like = METHODS[_like(side, method.members[side])].rates
    factor = like[kind].residual / like[known].residual
    return Rates(own.residual * factor, own.transform * factor)


def _of_member(side: str, name: str, kind: Kind) -> Rates:
    having = [m for m in METHODS.values() if m.rates and getattr(m, side) == name]
    having.sort(key=lambda m: len(m.members))  # the method of this member alone comes first
    return _of_method(having[0] if having else METHODS[_like(side, name)], kind)


def _like(side: str, name: str) -> str:
    """The method with rates of every kind whose member is most like this one: diagonals run hotter than factors."""
    member: Any = SIDES[side][name]
    if member.rates_like:
        return str(member.rates_like)
    if side != "residual":
        return "oft"
    return "svfit" if member.diagonal_between else "lora"


def member_options(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """Options of a member by name, without its geometry: what a config may set for it."""
    registry = SIDES[kind]
    if name not in registry:
        raise ConfigError(
            f"Unknown {_SAID[kind]} {name!r}.{did_you_mean(name, registry)} Known: {', '.join(sorted(registry))}."
        )
    geometry = {"width", "rows", "cols"}
    return {k: p for k, p in inspect.signature(registry[name]).parameters.items() if k not in geometry}


def _meant(option: str, every: Sequence[str]) -> str:
    """The right name for an option, or that it is one of training."""
    if {"learning_rate", "max_train_steps", "train_batch_size"} & {option, *OTHER_NAMES.get(option, ())}:
        return " It belongs to training, which an adapter's config does not decide."
    return did_you_mean(option, [*every, "target_modules"])


def split_options(members: Mapping[str, str | None], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of :func:`smidgen.config` sorted by the side of the member that they are of.

    ``r`` and ``residual_rank`` mean the residual's rank, ``transform_rank`` the transform's; what several members know goes
    to each, and an option that none knows is an error.

    Args:
        members: side -> member, None where there is none.
        options: by name.

    Raises:
        ConfigError: unknown or contradictory options.
    """
    known = {side: member_options(side, name) if (name := members.get(side)) else {} for side in SIDES}
    sorted_options: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    for option, value in options.items():
        takers = [
            (kind, inner)
            for kind in SIDES
            for inner in (_RANKS[kind].get(option, option),)
            if inner in known[kind] and not (inner == "rank" and option == "rank")
        ]
        if not takers:
            every = sorted(
                {*(name for own in known.values() for name in own), "r", "transform_rank", "residual_rank"} - {"rank"}
            )
            named = {side: members.get(side) for side in SIDES if side != "output" or members.get(side)}
            raise ConfigError(
                f"Option {option}={value!r} has no meaning for {' with '.join(f'{s}={n!r}' for s, n in named.items())}."
                f"{_meant(option, every)} Known: {', '.join(every)}."
            )
        for kind, inner in takers:
            if inner in sorted_options[kind] and sorted_options[kind][inner] != value:
                raise ConfigError(f"r and residual_rank are both given and differ ({option}={value!r}); give one.")
            sorted_options[kind][inner] = value
    return sorted_options


def make_members(
    config: Any, residual_options: Mapping[str, Any], width: int, rows: int, cols: int, groups: int = 1
) -> tuple[Transform | None, Residual | None, Output | None]:
    """The members that a config names at one matrix [rows, cols]: a transform of ``width`` features, an output transform of
    those of each of the ``groups`` of rows; options of the residual as given, which have the rank that holds here."""
    t = (
        build(TRANSFORMS, "transform", config.transform, width, **config.transform_options)
        if config.transform
        else None
    )
    d = build(RESIDUALS, "residual", config.residual, rows, cols, **residual_options) if config.residual else None
    s = (
        build(OUTPUTS, _SAID["output"], config.output, rows // groups, **config.output_options)
        if config.output
        else None
    )
    return t, d, s
