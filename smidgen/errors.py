"""One family of errors: every refusal of Smidgen is a ``SmidgenError``, and a ``SmidgenError`` is a ``ValueError``.

A message states the rule, the offending value and what would work.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SmidgenError(ValueError):
    """Base of all errors raised by Smidgen at its boundaries."""


class ConfigError(SmidgenError):
    """An option has no meaning or a value outside its range."""


class TargetError(SmidgenError):
    """A target module does not exist or cannot carry the method."""


class BaseLockError(SmidgenError):
    """The adapter was made for another base model; ``report`` says how its weights compare, where they were read."""

    report: object = None


class AdapterFileError(SmidgenError):
    """An adapter file is missing, truncated, hostile or does not fit the model."""


class DataError(SmidgenError):
    """Training data cannot be read or has nothing to learn from."""


class FetchError(SmidgenError):
    """A pinned package is not here and cannot be downloaded, or is not what was pinned."""


class TrainingError(SmidgenError):
    """Training cannot go on: a loss or gradient that is not finite, or a run that was told to stop."""


class CheckpointError(SmidgenError):
    """A training checkpoint cannot be written, is damaged, or belongs to another run."""


class HubError(SmidgenError):
    """The Hugging Face Hub cannot be reached, or refuses an upload."""


class MissingExtraError(SmidgenError):
    """An optional dependency is needed; the message names the extra to install."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """``" Did you mean 'q_proj'?"`` for the nearest known names, or ``""`` when nothing is near. Never ``name`` itself.

    Example:
        >>> did_you_mean("q_porj", ["q_proj", "v_proj"])
        " Did you mean 'q_proj' or 'v_proj'?"
    """
    folded = {other.casefold(): other for other in sorted(set(known) - {name}, reverse=True)}
    near = [folded[other] for other in get_close_matches(name.casefold(), folded, n=most, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
