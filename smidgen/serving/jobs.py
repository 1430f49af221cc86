"""A request in a host's hands, and what a host runs requests with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from smidgen.serving.handles import Handle
from smidgen.serving.requests import Served
from smidgen.serving.residents import Row
from smidgen.serving.shelf import Entry


@dataclass(eq=False)
class Job:
    """A request with the versions of adapters that it names.

    Attributes:
        verb: which batch it is for; request: as it was made; prepared: what the host made of it before it waited.
        entries: its adapters, with weights; () is the base.
        ended: called once when the handle is at its end, whichever.
    """

    verb: str
    request: Any
    entries: tuple[tuple[Entry, float], ...]
    prepared: Any = None
    handle: Handle[Any] = field(init=False)
    ended: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.handle = Handle(tuple(Served(entry.name, entry.fingerprint, weight) for entry, weight in self.entries))

    @property
    def row(self) -> Row:
        return tuple((entry.fingerprint, weight) for entry, weight in self.entries)

    def finish(self, result: Any) -> None:
        self._end()
        self.handle.finish(result)

    def fail(self, error: BaseException) -> None:
        self._end()
        self.handle.fail(error)

    def end_cancelled(self) -> None:
        self._end()
        self.handle.end_cancelled()

    def _end(self) -> None:
        ended, self.ended = self.ended, lambda: None
        ended()


class Batch(Protocol):
    """Requests of one verb that are computed together, in steps between which requests come and go. One thread calls it."""

    steps: int  # that were made

    @property
    def active(self) -> int:
        """How many requests are in it."""

    def admit(self, jobs: Sequence[Job]) -> None:
        """Takes requests whose adapters are resident."""

    def step(self) -> None:
        """One step of all that are in it; those that are at their end get their results."""

    def pause(self) -> None:
        """Adapters are about to be put into the model: nothing is open on it until the next step."""

    def abandon(self, error: BaseException) -> None:
        """Ends all that are in it with an error."""
