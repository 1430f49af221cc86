"""One queue for several local workers: a group belongs to whoever made its lock file, until its owner is dead.

A lock is ``locks/000012.3.json``: group 12, third owner after two that died. Taking over means making the next number,
which the file system grants to one process alone; no lock is ever removed from under a living owner. An owner on this
machine is dead when its process is gone, one on another machine when it has not touched its lock for two minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEARTBEAT, STALE = 10.0, 120.0  # seconds
_NAME = re.compile(r"(\d{6})\.(\d+)\.json")


def alive(pid: int, started: float | None = None) -> bool:
    """Whether process ``pid`` of this machine lives, and is the one that started at ``started`` (seconds)."""
    import psutil

    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return not dead and (started is None or abs(process.create_time() - started) < 1)
    except psutil.Error:
        return False


class Queue:
    """Locks of groups in ``folder``.

    Example:
        >>> with Queue(tmp_path).claim(0) as mine:
        ...     mine
        True
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, group: int) -> Iterator[bool]:
        """Within: whether the group is this process's own; somebody else's otherwise."""
        lock = self._take(group)
        if lock is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(lock, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            for path in self._locks(group):  # own lock and those of the dead before it
                path.unlink(missing_ok=True)

    def busy(self) -> list[int]:
        """Groups that a living worker has."""
        groups = {int(match.group(1)) for p in self.folder.glob("*.json") if (match := _NAME.fullmatch(p.name))}
        return sorted(group for group in groups if self._owned(self._locks(group)))

    def _take(self, group: int) -> Path | None:
        there = self._locks(group)
        if self._owned(there):
            return None
        number = int(_NAME.fullmatch(there[-1].name).group(2)) + 1 if there else 0  # type: ignore[union-attr]
        lock = self.folder / f"{group:06d}.{number}.json"
        hidden = lock.with_name(f".{lock.name}.{os.getpid()}.{threading.get_ident()}")
        hidden.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": _started()}))
        try:
            os.link(hidden, lock)  # fails if it exists, and the file is whole from its first moment
        except FileExistsError:
            return None
        finally:
            hidden.unlink()
        return lock

    def _locks(self, group: int) -> list[Path]:
        found = [p for p in self.folder.glob(f"{group:06d}.*.json") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda path: int(path.name.split(".")[1]))

    def _owned(self, locks: list[Path]) -> bool:
        """Whether the newest lock's owner lives."""
        if not locks:
            return False
        try:
            owner, touched = json.loads(locks[-1].read_text()), locks[-1].stat().st_mtime
        except FileNotFoundError:  # released this very moment
            return False
        if owner["host"] == platform.node():
            return alive(owner["pid"], owner["started"])
        return time.time() - touched < STALE

    @staticmethod
    def _beat(lock: Path, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(lock)


def _started() -> float:
    import psutil

    return float(psutil.Process().create_time())
