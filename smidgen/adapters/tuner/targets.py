"""Which modules an adapter goes on: every name must hit something that can carry it, or an error with near names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from smidgen.adapters.tuner.kinds import KIND_NAMES, class_name, kind_of
from smidgen.errors import ConfigError, TargetError, did_you_mean


def check_names(
    target_modules: Iterable[str] | str | None, names: list[str], adaptable: list[str], aliases: Mapping[str, str]
) -> None:
    """Every entry of ``target_modules`` must match a module.

    Args:
        target_modules: names or ends of names, or one regular expression.
        names: names of all modules of the model.
        adaptable: names that it matches, before any other list leaves some out.
        aliases: second names of modules -> their first, which is among ``names``.

    Raises:
        TargetError: with the nearest names there are.
    """
    if target_modules is None or target_modules == "all-linear":
        return
    ends = sorted({n.rpartition(".")[2] for n in names if n})
    if isinstance(target_modules, str):
        if not adaptable:
            raise TargetError(
                f"target_modules {target_modules!r} (a regular expression that must match a whole module name) matches "
                f"nothing.{did_you_mean(target_modules.rpartition('.')[2], ends)} Modules end in: {_some(ends)}."
            )
        return
    for entry in sorted(target_modules):
        if not any(n == entry or n.endswith(f".{entry}") for n in names):
            for alias, name in aliases.items():
                if alias == entry or alias.endswith(f".{entry}"):
                    raise TargetError(f"target_modules: {alias!r} is the same layer as {name!r}; name that.")
            raise _no_module("target_modules", entry, names, ends)


def check_fused(target_modules: Iterable[str] | str | None, names: list[str], fused: Iterable[str]) -> None:
    """A bare name that only fused experts have does not mean them.

    Args:
        target_modules: names or ends of names, or one regular expression.
        names: names of all other modules of the model.
        fused: names of fused experts that no entry means.

    Raises:
        TargetError: saying which entry would.
    """
    for entry in () if isinstance(target_modules, str) or target_modules is None else sorted(target_modules):
        hit = sorted(n for n in fused if f".{n}".endswith(f".{entry}"))
        if hit and not any(f".{n}".endswith(f".{entry}") for n in names):
            whole = ".".join(hit[0].split(".")[-2:])
            raise TargetError(
                f"target_modules: only fused experts are named {entry!r}; they are adapted when their owner is named too: "
                f"write {whole!r}."
            )


def check_any(target_modules: Iterable[str] | str, matched: list[str]) -> None:
    """The other lists must leave a target.

    Raises:
        TargetError: they leave none.
    """
    if not matched:
        given = repr(target_modules) if isinstance(target_modules, str) else sorted(target_modules)
        raise TargetError(f"target_modules {given} are all excluded or left out by other options.")


# Heads that peft adds to modules_to_save by itself, whether a model has them or not.
_OF_TASKS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}


def check_lists(config: Any, names: list[str], adaptable: list[str], matched: list[str]) -> None:
    """Every name in a fresh config's other lists must mean something, as those of ``target_modules`` must.

    Args:
        config: of smidgen's or of peft's; lists that it does not have are empty.
        names: names of all modules of the model.
        adaptable: names that ``target_modules`` matches, before any other list leaves some out.
        matched: names that are left.

    Raises:
        TargetError: an entry of exclude_modules, modules_to_save, rank_pattern, alpha_pattern, layers_to_transform or
            layers_pattern matches nothing; with the nearest names there are.
    """
    ends = sorted({n.rpartition(".")[2] for n in names if n})
    excluded = getattr(config, "exclude_modules", None) or ()
    if isinstance(excluded, str):
        if not any(re.fullmatch(excluded, n) for n in names):
            raise TargetError(
                f"exclude_modules {excluded!r} (a regular expression that must match a whole module name) matches nothing."
            )
    else:
        for entry in sorted(excluded):
            _check_excluded(entry, names, adaptable, ends)
    of_task = _OF_TASKS.get(str(getattr(config, "task_type", None)).rpartition(".")[2], ())
    for entry in sorted(getattr(config, "modules_to_save", None) or ()):
        if entry not in of_task and not any(n.endswith(entry) for n in names):
            raise _no_module("modules_to_save", entry, names, ends)
    for option in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(config, option, None) or {}:
            if not any(get_pattern_key([entry], n) == entry for n in matched):
                raise _no_module(option, entry, matched, sorted({n.rpartition(".")[2] for n in matched}), "target")
    _check_layer_numbers(config, names, adaptable)


def _check_excluded(entry: str, names: list[str], adaptable: list[str], ends: list[str]) -> None:
    hit = [n for n in names if n == entry or n.endswith(f".{entry}")]
    if not hit:
        raise _no_module("exclude_modules", entry, names, ends)
    inside = tuple(f"{n}." for n in hit)
    if not set(hit) & set(adaptable) and any(n.startswith(inside) for n in adaptable):
        pattern = r"(.*\.)?" + re.escape(entry) + r"\..*"
        raise TargetError(
            f"exclude_modules: {entry!r} is no target itself, and names in a list leave out nothing of what is inside a module; "
            f"write the regular expression {pattern!r}."
        )


def _check_layer_numbers(config: Any, names: list[str], adaptable: list[str]) -> None:
    """Every number of ``layers_to_transform`` must be that of a layer that holds a target."""
    numbers, patterns = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None) or ()
    numbers = [numbers] if isinstance(numbers, int) else list(numbers or ())
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if patterns and not numbers:
        raise TargetError(f"layers_pattern {patterns} goes with layers_to_transform, which names no layer.")
    if not numbers:
        return
    if isinstance(config.target_modules, str):
        raise TargetError(
            f"layers_to_transform goes with a list of target_modules, not with {config.target_modules!r}: name the modules, or say "
            "in a regular expression which layers."
        )
    lists = sorted({match[1] for n in names if (match := re.match(r"(?:.*?\.)?([^.]+)\.\d+(?:\.|$)", n))})
    for pattern in patterns:
        if not any(re.match(rf"(?:^|.*?\.){pattern}\.\d+\.", n) for n in names):
            raise TargetError(
                f"layers_pattern: no list of layers is named {pattern!r}.{did_you_mean(pattern, lists)} There are: {_some(lists)}."
            )
    forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    there = {int(match[1]) for n in adaptable for form in forms if (match := re.match(form, n))}
    for number in numbers:
        if number not in there:
            known = f"they are in {_ranges(sorted(there))}" if there else "name their list in layers_pattern"
            raise TargetError(f"layers_to_transform: no target is in a layer {number}; {known}. Lists: {_some(lists)}.")


def _ranges(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else ", ".join(map(str, numbers))


def _no_module(option: str, entry: str, names: list[str], ends: list[str], what: str = "module") -> TargetError:
    near = did_you_mean(entry, names) if "." in entry else did_you_mean(entry, ends)
    return TargetError(f"{option}: no {what} is named {entry!r}.{near} {what.capitalize()}s end in: {_some(ends)}.")


def check_shapes(modules: Mapping[str, nn.Module]) -> None:
    """Every layer must have its shape: torch cannot even freeze one that has none.

    Raises:
        TargetError: naming the first that has not.
    """
    for name, module in modules.items():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise TargetError(
                f"{name!r} is a {type(module).__name__} whose shape is not known yet; run one forward pass of the model, then "
                "adapt it."
            )


def check_layer(name: str, layer: nn.Module) -> None:
    """A target must be of a supported kind.

    Raises:
        TargetError: naming its class and what is supported.
    """
    if kind_of(layer) is None:
        raise TargetError(f"Target {name!r} is a {class_name(layer)}; adapters go on {', '.join(KIND_NAMES)}.")


def _some(ends: list[str], most: int = 20) -> str:
    named = [e for e in ends if not e.isdigit()]
    return ", ".join(named[:most]) + (", ..." if len(named) > most else "")


def parse_energy(r: str, residual: str | None) -> float:
    """The share e of ``r="energy:e"``.

    Raises:
        ConfigError: no share in (0, 1], or a residual without singular values.
    """
    try:
        share = float(r.removeprefix("energy:"))
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ConfigError(f"r='energy:SHARE' takes a share above 0 and at most 1, e.g. 'energy:0.99'; got {r!r}.")
    if residual != "spectral":
        raise ConfigError(f"r={r!r} needs singular values: the 'spectral' residual (svfit), not {residual!r}.")
    return share


def shortest_names(chosen: set[str], modules: Iterable[str], least: int = 1) -> set[str]:
    """Ends of names, as short as possible, that match exactly the ``chosen`` of all ``modules``; of ``least`` words or more.

    Example:
        >>> sorted(shortest_names({"a.0.q", "b.0.q", "a.0.out.0"}, ["a.0.q", "b.0.q", "a.0.out.0", "b.0"]))
        ['a.0.out.0', 'q']
    """
    paths = {name: name.split(".") for name in modules if name}
    entries, left = set(), set(chosen)
    for depth in range(least, max(map(len, paths.values()), default=0) + 1):
        hits: dict[str, set[str]] = {}
        for name, path in paths.items():
            if len(path) >= depth:
                hits.setdefault(".".join(path[-depth:]), set()).add(name)
        for end, names in hits.items():
            one_of_many = len(names) == 1 and any(part.isdigit() for part in end.split("."))
            if names & left and names <= chosen and not end[0].isdigit() and not one_of_many:
                entries.add(end)
                left -= names
    return entries | left
