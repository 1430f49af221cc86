"""Words become a call, and what is wrong with them one sentence: the parser's own boxes are read, not shown."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from smidgen.errors import ConfigError, did_you_mean
from smidgen.training.ranges import check, check_value
from smidgen.training.settings import check_file

_FRAME = "╭╮╰╯│─|+- "


def parse(command: Callable[..., Any], words: Sequence[str], name: str, style: Sequence[Any]) -> Callable[[], Any]:
    """The call of ``command`` that ``words`` ask for; ConfigError in one sentence when they do not fit its signature."""
    import tyro

    @functools.wraps(command)
    def later(*given: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(command, *given, **named)

    later.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    hints = {flag: str(hint) for flag, hint in _flags(command)}
    _check_words(words, hints)
    words = _gathered(words, hints)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            call = tyro.cli(later, args=list(words), prog=f"smidgen {name}", config=tuple(style))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_sentence(box.getvalue(), words, command, name)) from None
    for key, value in call.keywords.items():
        check(value) if dataclasses.is_dataclass(value) else check_value(key, value)
    for path in _paths([*call.args, *call.keywords.values()]):
        check_file(path)
    return call  # type: ignore[no-any-return]


def _gathered(words: Sequence[str], hints: Mapping[str, str]) -> list[str]:
    """Words in which a list that is given in several places, of which the parser takes the last, stands in one."""
    starts = [number for number, word in enumerate(words) if re.match(r"-+[A-Za-z]", word)]
    first, parts = dict[str, int](), [list(words[: starts[0]] if starts else words)]
    for start, end in itertools.pairwise([*starts, len(words)]):
        part, name = list(words[start:end]), _flag_name(words[start].partition("=")[0])
        if name in first and _is_list(hints.get(name, "")):
            parts[first[name]] = [*_apart(parts[first[name]]), *_apart(part)[1:]]
        else:
            first[name] = len(parts)
            parts.append(part)
    return [word for part in parts for word in part]


def _apart(part: Sequence[str]) -> list[str]:
    """A flag and its values, also of ``--flag=value``."""
    flag, equals, value = part[0].partition("=")
    return [flag, *([value] if equals else []), *part[1:]]


def _flag_name(flag: str) -> str:
    return flag.replace("_", "-").removeprefix("--")


def _is_list(hint: str) -> bool:
    """Whether a type takes any number of values in one place; some take one in each of several places, which the parser gathers."""
    return "UseAppendAction" not in hint and bool(re.search(r"\blist\b|\btuple\[[^\]]*\.\.\.", hint))


def _check_words(words: Sequence[str], hints: Mapping[str, str]) -> None:
    """What the parser would take without a word: a flag given twice, of which it takes the last, and an empty path, which is
    the folder one is in."""
    seen: set[str] = set()
    last = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            last = _flag_name(flag)
            if last in seen and not _is_list(hints.get(last, "list")) and "UseAppendAction" not in hints[last]:
                raise ConfigError(f"--{last} is given twice; give it once.")
            seen.add(last)
        if not (value if word.startswith("--") and equals else word) and "str" not in hints.get(last, ""):
            raise ConfigError(f"{'--' + last if last else 'An argument'} is empty; give a value, or leave it out.")


def _paths(values: Iterable[Any]) -> Iterator[Path]:
    """The paths among values, their sections and lists; a text counts where something lies at it."""
    for value in values:
        if dataclasses.is_dataclass(value):
            yield from _paths(vars(value).values())
        elif isinstance(value, list | tuple):
            yield from _paths(value)
        elif isinstance(value, Path):
            yield value
        elif isinstance(value, str) and os.sep in value:
            with contextlib.suppress(OSError):  # a text that is too long for a name
                if os.path.lexists(value):
                    yield Path(value)


def _flags(command: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The flags of a command as they are written, without dashes in front, and the types of their values."""
    start = "." if getattr(command, "prefixed", False) else ""
    for parameter in inspect.signature(command).parameters.values():
        hint = command.__annotations__.get(parameter.name, parameter.annotation)
        kind = getattr(hint, "__origin__", hint)
        if dataclasses.is_dataclass(kind):
            marks = getattr(hint, "__metadata__", ())
            yield from ((name, Annotated[own, marks]) if marks else (name, own) for name, own in _fields(kind, start))
        elif parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            yield from ((alias, hint) for alias in _names(hint, parameter.name))


def _fields(kind: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        parts = [
            part for part in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(part)
        ]
        name = field.name.replace("_", "-")
        if parts:
            yield from _fields(parts[0], start and f"{start}{name}.")
        else:
            yield start.removeprefix(".") + name, hints[field.name]


def _names(hint: Any, name: str) -> list[str]:
    renamed = [getattr(mark, "name", None) for mark in getattr(hint, "__metadata__", ())]
    return [next((other for other in renamed if other), name).replace("_", "-")]


def _sentence(box: str, words: Sequence[str], command: Callable[..., Any], name: str) -> str:
    """What the parser says is wrong, in a sentence; for an unknown flag the right name."""
    text = _unboxed(box)
    more = f" `smidgen {name} --help` says more."
    if text.startswith("Unrecognized options:"):
        unknown = text.removeprefix("Unrecognized options:").strip()
        flag = next((word for word in words if word.startswith("-") and word.partition("=")[0] in unknown), "")
        if not flag:
            return f"`{name}` takes no further argument, but got: {unknown}.{more}"
        flag = flag.partition("=")[0]
        return f"`{name}` has no {flag}.{_meant(flag, [known for known, _ in _flags(command)]) or more}"
    return text.rstrip(".") + "." + ("" if "--help" in text else more)


def _meant(flag: str, known: Sequence[str]) -> str:
    """The flags that are meant by one that there is not; of those in sections the whole names."""
    section, _, last = flag.lstrip("-").replace("_", "-").rpartition(".")
    leaves: dict[str, list[str]] = {}
    for one in [one for one in known if one.startswith(f"{section}.")] or known:
        leaves.setdefault(one.rpartition(".")[2].replace("-", "_"), []).append(f"--{one}")
    asked = last.replace("-", "_")
    if asked in leaves:  # under another section, or none
        return f" Did you mean {' or '.join(leaves[asked])}?"
    hint = did_you_mean(asked, leaves)
    hint = re.sub(r"'(\w+)'", lambda found: " or ".join(leaves[found[1]]), hint)
    return hint.replace("max-train-steps?", "max-train-steps (optimizer steps)?") if "epoch" in flag else hint


def _unboxed(box: str) -> str:
    """The first part of a box, without its frame, its title and the hints below; a terminal of ASCII has a frame of spaces."""
    parts: list[str] = []
    for line in box.splitlines()[1:]:
        inner = line[1:-1]
        if not inner.strip(_FRAME):
            if "".join(parts).strip():
                break
            continue
        parts.append(inner[1:-1])
    text = "".join(part if part and part == part.rstrip() else part.rstrip() + " " for part in parts)
    return re.sub(r"\s+", " ", text).strip()
