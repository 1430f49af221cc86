"""Ctrl-C and SIGTERM during a run: note them, finish the step, write a checkpoint, say how to go on."""

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from smidgen.errors import TrainingError


class TrainingInterrupted(TrainingError):
    """The run was asked to stop and wrote a checkpoint. ``signum`` is the signal it got."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is only noted in ``received``; a second SIGINT acts at once.

    Outside the main thread Python allows no handlers, and nothing is changed.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def error(self, step: int, checkpoint: Path, signum: int) -> TrainingInterrupted:
        """The error that ends a run for ``signum``, which this process or another of the run got."""
        name = signal.Signals(signum).name
        return TrainingInterrupted(
            f"Stopped by {name} after step {step}. {checkpoint} holds the whole run: the same command with "
            "--resume-from-checkpoint latest goes on from there.",
            signum,
        )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for a training that nobody goes on from: its checkpoints go with it, and TrainingInterrupted promises none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except TrainingInterrupted as error:
            name = signal.Signals(error.signum).name
            raise TrainingInterrupted(
                f"Stopped by {name}. This training keeps nothing on the way: the same command begins it again.",
                error.signum,
            ) from None
