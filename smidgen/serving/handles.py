"""A request on its way: its events for whoever waits, in any thread, and how it is cancelled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar, cast

from smidgen.serving.requests import CancelledRequestError, Event, Progress, Served, TextPiece

logger = logging.getLogger(__name__)

R = TypeVar("R")


class Handle(Generic[R]):
    """The answer to one request while it is made.

    Iterating waits for each event (pieces of text, progress of an image) and ends after the result, which is the last one;
    an error is raised there. Events are kept, so several may iterate, each from the first event on.

    Attributes:
        adapters: which versions answer, known at once; () is the base alone.
    """

    def __init__(self, adapters: tuple[Served, ...] = ()) -> None:
        self.adapters = adapters
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._done = False
        self._cancelled = threading.Event()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    # ---- for who asked -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        for at in count():
            with self._changed:
                while len(self._events) <= at and not self._done:
                    self._changed.wait()
                if len(self._events) <= at:
                    if self._error is not None:
                        raise self._error
                    return
                event = self._events[at]
            yield event

    def result(self, timeout: float | None = None) -> R:
        """Waits for the result.

        Raises:
            TimeoutError: it is not there after ``timeout`` seconds; the request goes on.
            SmidgenError: what became of the request.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"There is no result after {timeout:g} seconds.")
            if self._error is not None:
                raise self._error
            return cast(R, self._events[-1])

    def cancel(self) -> None:
        """Asks to stop. Text that was cancelled has a result with what there was; all else ends in a CancelledRequestError."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """Whether the result, or an error, is there."""
        return self._done

    def events(self, start: int = 0) -> list[Event]:
        """The events from number ``start`` on that are there now; does not wait, and does not raise."""
        with self._changed:
            return self._events[start:]

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has ``listener`` called after each event and at the end, from the thread that computes: it must be quick, such as
        ``lambda: loop.call_soon_threadsafe(event.set)``. Called at once if something is there already."""
        with self._changed:
            self._listeners.append(listener)
            there = bool(self._events) or self._done
        if there:
            listener()

    # ---- for who computes --------------------------------------------------------------------------------------------

    def put(self, event: TextPiece | Progress) -> None:
        """The next event."""
        self._change(event)

    def finish(self, result: R) -> None:
        """The result, after which nothing comes."""
        self._change(cast(Event, result), done=True)

    def fail(self, error: BaseException) -> None:
        """The end without a result."""
        self._change(None, done=True, error=error)

    def end_cancelled(self) -> None:
        """The end of a request that was cancelled before there was a result."""
        self.fail(CancelledRequestError("The request was cancelled."))

    def _change(self, event: Event | None, done: bool = False, error: BaseException | None = None) -> None:
        with self._changed:
            if self._done:
                return
            if event is not None:
                self._events.append(event)
            self._done, self._error = done, error
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except (
                Exception
            ):  # a loop that was closed is its owner's business, and not that of who else is in the batch
                logger.exception("A listener of a request failed.")
