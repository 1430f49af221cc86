"""A host: one base for one kind of task, its adapters, and the thread that computes everything on it.

Requests of any threads wait in its queue. The thread takes them into batches as there is room, makes one step of each batch, and
looks again; whatever else touches the model (an adapter that is put in) runs between two steps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

from smidgen.errors import SmidgenError
from smidgen.serving.jobs import Batch, Job
from smidgen.serving.requests import BusyError, ClosedError, FailedError
from smidgen.serving.residents import Memory, Residents
from smidgen.serving.shelf import Entry

logger = logging.getLogger(__name__)

LOADING = threading.Lock()  # transformers and diffusers change torch while they load a model, for all threads
WAIT = 0.02  # seconds until a full memory is looked at again


class Host:
    """What all hosts share; a kind of task says what is loaded, and how requests are prepared.

    Args:
        name: of the base.
        memory: of all hosts.
        batch: rows of each verb that are computed at once.
        queue: requests that may wait.
        precision: of the base.
    """

    verbs: tuple[str, ...] = ()

    def __init__(self, name: str, memory: Memory, batch: int, queue: int, precision: str) -> None:
        self.name, self.memory, self.batch, self.queue, self.precision = name, memory, batch, queue, precision
        self.residents: Residents | None = None
        self.batches: dict[str, Batch] = {}
        self.fingerprint = ""  # of the base, once it is loaded
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._taken: list[Job] = []  # out of the queue, and maybe in no batch yet
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._worker: threading.Thread | None = None

    # ---- what a kind of task says ------------------------------------------------------------------------------------

    def load(self) -> tuple[Residents, dict[str, Batch]]:
        """Loads the base; once, in the worker."""
        raise NotImplementedError

    def prepare(self, verb: str, request: Any, entries: Sequence[tuple[Entry, float]]) -> Any:
        """What of a request can be made before it waits; refuses what cannot be answered. In the thread that asks."""
        raise NotImplementedError

    # ---- for any thread ----------------------------------------------------------------------------------------------

    def submit(self, job: Job, wait: bool = False) -> None:
        """Has a job wait for its turn.

        Raises:
            BusyError: too many wait; not with ``wait``, which waits for room.
            ClosedError: the host takes no more.
        """
        with self._changed:
            while True:
                self._start()
                if len(self._jobs) < self.queue:
                    break
                if not wait:
                    raise BusyError(f"{self.queue} requests wait for {self.name} already; make this one again later.")
                self._changed.wait(1.0)
            self._jobs.append(job)
            self._changed.notify_all()

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function between two steps, in the worker, and waits for what it gives."""
        future: Future[Any] = Future()
        with self._changed:
            self._start()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future.result()

    def put(self, entry: Entry) -> None:
        """Puts an adapter into memory and waits for it.

        Raises:
            SmidgenError: it is refused.
        """
        self.call(lambda: self._hold(entry))
        self.memory.release(entry.fingerprint)

    @property
    def alive(self) -> bool:
        """Whether a worker runs, or has not been needed yet."""
        return self._worker is None or self._worker.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def active(self) -> int:
        return sum(batch.active for batch in list(self.batches.values()))

    def close(self, timeout: float | None) -> None:
        """Takes no more jobs, and ends when those that there are are at their end, or after ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            worker = self._worker
            self._changed.notify_all()
        until = None if timeout is None else monotonic() + timeout
        if worker is not None and worker.is_alive():
            worker.join(None if until is None else max(0.0, until - monotonic()))
            if worker.is_alive():
                self._kill()
                worker.join()
        self.batches, self.residents = {}, None

    def _kill(self) -> None:
        """Ends the worker at its next step; all requests end in an error."""
        with self._changed:
            self._calls.appendleft((_die, Future()))
            self._changed.notify_all()

    # ---- the worker --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closing:
            raise ClosedError("The library is closed.")
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=self._work, name=f"smidgen-{self.name}", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        error: BaseException = ClosedError("The library was closed before this request was at its end.")
        try:
            if self.residents is None:
                with LOADING:
                    self.residents, self.batches = self.load()
            while self._turn():
                pass
        except SystemExit:
            error = error if self._closing else ClosedError(f"The worker of {self.name} was stopped; make it again.")
        except BaseException as found:
            logger.exception("The worker of %s ended.", self.name)
            error = (
                found if isinstance(found, SmidgenError) else ClosedError(f"The worker of {self.name} failed: {found}")
            )
        finally:
            with self._changed:
                jobs, calls = [*self._taken, *self._jobs], list(self._calls)
                self._taken = []
                self._jobs.clear()
                self._calls.clear()
                self._worker = None if self._worker is threading.current_thread() else self._worker
                self._changed.notify_all()
            for batch in self.batches.values():
                batch.abandon(error)
            for job in jobs:
                job.fail(error)
            for _, future in calls:
                if not future.done():
                    future.set_exception(error)

    def _turn(self) -> bool:
        """Calls, new requests, and a step of each batch; False when nothing will come any more."""
        with self._changed:
            while not (self._calls or self._jobs or self.active):
                if self._closing:
                    return False
                self._changed.wait()
            calls = list(self._calls)
            self._calls.clear()
        for function, future in calls:
            self._run(function, future)
        admitted = self._admit()
        for verb, batch in self.batches.items():
            try:
                if admitted.get(verb):
                    batch.admit(admitted[verb])
                if batch.active:
                    batch.step()
            except Exception as error:
                logger.exception("A step of %s on %s failed.", verb, self.name)
                batch.abandon(_as_ours(error, self.name))
                for job in admitted.get(verb, ()):
                    job.fail(_as_ours(error, self.name))
        self._taken = []
        return True

    def _run(self, function: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(function())
        except SystemExit as error:
            future.set_exception(ClosedError("The worker was stopped."))
            raise error
        except BaseException as error:
            future.set_exception(error)

    def _admit(self) -> dict[str, list[Job]]:
        """The next requests, as far as there is room for their rows and their adapters, by verb."""
        found: dict[str, list[Job]] = {}
        room = {verb: self.batch - batch.active for verb, batch in self.batches.items()}
        later: list[Job] = []
        while any(count > 0 for count in room.values()):
            with self._changed:
                if not self._jobs:
                    break
                job = self._jobs.popleft()
            self._taken.append(job)
            if job.handle.cancelled:
                job.end_cancelled()
            elif room[job.verb] <= 0:
                later.append(job)
            elif self._ready(job):
                room[job.verb] -= 1
                found.setdefault(job.verb, []).append(job)
            elif not job.handle.done:  # until others end
                later.append(job)
                break
        with self._changed:
            self._jobs.extendleft(reversed(later))
            self._changed.notify_all()
            if later and not found and not self.active:
                self._changed.wait(WAIT)
        return found

    def _ready(self, job: Job) -> bool:
        """Has a job's adapters in memory until its end; an error is its end, but for a full memory that others will leave."""
        held: list[str] = []
        try:
            for entry, _ in job.entries:
                self._hold(entry)
                held.append(entry.fingerprint)
        except BaseException as error:
            for fingerprint in held:
                self.memory.release(fingerprint)
            if not isinstance(error, Exception):
                raise
            if not (isinstance(error, BusyError) and self.memory.busy):
                job.fail(_as_ours(error, self.name))
            return False

        def ended() -> None:
            for fingerprint in held:
                self.memory.release(fingerprint)

        job.ended = ended
        return True

    def _hold(self, entry: Entry) -> None:
        assert self.residents is not None
        if entry.fingerprint not in self.residents:
            for batch in self.batches.values():
                batch.pause()
        self.memory.hold(self.residents, entry)


def _as_ours(error: BaseException, name: str) -> BaseException:
    if isinstance(error, SmidgenError):
        return error
    wrapped = FailedError(f"Computing on {name} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _die() -> None:
    raise SystemExit
