"""Regular expressions of a config that came from a file: matched once, in bounded time, and turned into names.

peft matches every module's name against ``target_modules``, ``exclude_modules``, ``layers_pattern`` and the keys of
``rank_pattern`` as regular expressions, and one such expression can keep Python's ``re`` busy for ever. A file's patterns
are therefore matched here before anything else sees them, by a library whose matching stops after ``SECONDS``; what goes
on to peft holds names alone. A saved adapter names its modules, so this is for the files of others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from smidgen.errors import ConfigError, TargetError

SECONDS = 2.0  # for all patterns of a config together; those in use take milliseconds for thousands of modules
LONGEST = 20_000
_SPECIAL = frozenset("\\^$*+?{}[]|()")


def is_plain(name: str) -> bool:
    """Whether a text is a name, as a regular expression too: nothing but its dots could match anything else.

    Example:
        >>> is_plain("layers.0.q_proj"), is_plain("layers.*.q_proj")
        (True, False)
    """
    return not _SPECIAL.intersection(name)


def check_names(option: str, entries: Iterable[str]) -> None:
    """Raises ConfigError for an entry that is a pattern where only names have a meaning."""
    for entry in entries:
        if not is_plain(entry):
            raise ConfigError(
                f"{option} takes names of modules or ends of names, and {entry[:100]!r} is a regular expression."
            )


def held(config: Any) -> bool:
    """Whether a config says by a regular expression where its adapter goes."""
    layers = config.layers_pattern or ()
    texts = (config.target_modules, config.exclude_modules, *([layers] if isinstance(layers, str) else layers))
    return any(isinstance(text, str) for text in texts[:2]) or not all(map(is_plain, texts[2:]))


def name_modules(config: Any, names: list[str]) -> None:
    """Puts names where a config, of smidgen's or peft's, has regular expressions.

    Args:
        config: changed in place.
        names: names of all modules of the model.

    Raises:
        ConfigError: a pattern that is none, is too long, or takes too long to match.
        TargetError: ``target_modules`` matches nothing.
    """
    check_names("modules_to_save", getattr(config, "modules_to_save", None) or ())
    matcher = _Matcher(names)
    for option in ("target_modules", "exclude_modules", "feedforward_modules"):
        pattern = getattr(config, option, None)
        if isinstance(pattern, str) and pattern.lower() != "all-linear":
            found = matcher.matches(option, pattern)
            fresh = (
                getattr(config, "base_lock", True) is None
            )  # what a file of ours leaves out was checked when it was made
            if not found and (option == "target_modules" or (option == "exclude_modules" and fresh)):
                raise TargetError(
                    f"{option} {pattern[:200]!r} (a regular expression that must match a whole module name) matches nothing."
                )
            setattr(config, option, set(found) if option != "exclude_modules" else found or None)
    _name_layers(config, matcher)
    for option in ("rank_pattern", "alpha_pattern"):
        ranks = getattr(config, option, None) or {}
        if not all(map(is_plain, ranks)):
            setattr(config, option, _by_name(option, ranks, matcher))


def _name_layers(config: Any, matcher: _Matcher) -> None:
    patterns = getattr(config, "layers_pattern", None) or ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    numbers, targets = getattr(config, "layers_to_transform", None), config.target_modules
    if all(map(is_plain, patterns)):
        return
    if numbers is None or not isinstance(targets, set | list | tuple):
        raise ConfigError("layers_pattern goes with layers_to_transform and a list of target_modules.")
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    ends = tuple(f".{target}" for target in targets)
    held = [n for n in matcher.names if f".{n}".endswith(ends)]
    inside: dict[str, int] = {}
    for pattern in patterns:
        inside = {n: int(number) for n, number in matcher.numbers("layers_pattern", pattern, held)} | inside
    config.target_modules = {n for n in held if n in targets or inside.get(n) in wanted}
    config.layers_pattern = config.layers_to_transform = None
    if not config.target_modules:
        raise TargetError(f"layers_pattern {patterns} with layers_to_transform {sorted(wanted)} leaves no target.")


def _by_name(option: str, ranks: Mapping[str, Any], matcher: _Matcher) -> dict[str, Any]:
    named: dict[str, Any] = {}
    taken: set[str] = set()
    for key, value in ranks.items():
        if is_plain(key):
            named[key] = value
            taken |= {n for n in matcher.names if f".{n}".endswith(f".{key}")}
        else:
            found = set(matcher.matches(option, rf"(?:.*\.)?(?:{key})")) - taken
            named |= dict.fromkeys(sorted(found), value)
            taken |= found
    return named


class _Matcher:
    """Matches names against patterns until its time is up."""

    def __init__(self, names: list[str]) -> None:
        self.names, self._left = names, SECONDS

    def matches(self, option: str, pattern: str) -> list[str]:
        """The names that a pattern matches as a whole."""
        return [n for n, match in self._run(option, pattern, "fullmatch", self.names) if match]

    def numbers(self, option: str, pattern: str, names: list[str]) -> list[tuple[str, str]]:
        """(name, number of its layer) of the names that are in a list of layers that the pattern matches."""
        form = rf"(?:^|.*?\.)(?:{pattern})\.(?P<number>\d+)\."
        return [(n, match["number"]) for n, match in self._run(option, form, "match", names) if match]

    def _run(self, option: str, pattern: str, how: str, names: list[str]) -> list[tuple[str, Any]]:
        import regex

        if len(pattern) > LONGEST:
            raise ConfigError(
                f"{option} is a regular expression of {len(pattern):,} characters; at most {LONGEST:,} are read."
            )
        started = time.monotonic()
        found = []
        try:
            match = getattr(regex.compile(pattern), how)
            for name in names:
                left = self._left - (time.monotonic() - started)
                if left <= 0:
                    raise TimeoutError
                found.append((name, match(name, timeout=left)))
        except TimeoutError:
            raise ConfigError(
                f"{option}: matching {pattern[:100]!r} takes too long (more than {SECONDS:.0f} s for {len(names)} modules); "
                "name the modules in its place."
            ) from None
        except (regex.error, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise ConfigError(f"{option}: {pattern[:100]!r} is no regular expression ({error}).") from error
        self._left -= time.monotonic() - started
        return found
