"""One run at a time in a folder: a second one is refused before it does anything."""

import functools
import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from smidgen.adapters.atomic import replace_file
from smidgen.errors import ConfigError

LOCK, OWNER = ".run.lock", ".run.json"  # both are gone when the run ends
_Recipe = TypeVar("_Recipe", bound=Callable[..., Any])
_held: dict[Path, int] = {}  # folder -> the thread of this process whose run it is


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within, ``out`` is this run's; its recipe may ask again. Of a run of several processes the main one asks.

    The lock is the operating system's and ends with its process, however that ends: a killed run leaves nothing that
    stops the next. On machines that share a disk it is as good as the disk's own locks.

    Raises:
        ConfigError: another run, of this process or of any other, is at work there; or nothing can be written there.
    """
    folder, thread = out.resolve(), threading.get_ident()
    if int(os.environ.get("RANK", "0")) != 0 or _held.get(folder) == thread:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock)
        replace_file(folder / OWNER, json.dumps(_this_run()))
    except Timeout:
        raise ConfigError(
            f"Another run is at work in {out}{_owner(folder)}. Wait until it has ended, stop it, or choose another --out."
        ) from None
    except OSError as error:
        lock.release()
        _take_away(made)
        raise ConfigError(f"Nothing can be written to {out} ({error.strerror}); choose another --out.") from error
    _held[folder] = thread
    try:
        yield
    finally:
        del _held[folder]
        for name in (OWNER, LOCK):
            with suppress(OSError):  # Windows keeps what is open
                (folder / name).unlink(missing_ok=True)
        lock.release()
        _take_away(made)


def runs_alone(recipe: _Recipe) -> _Recipe:
    """A recipe that has the folder ``out`` of its settings, among its first two arguments, to itself."""

    @functools.wraps(recipe)
    def run(*args: Any, **kwargs: Any) -> Any:
        settings = next(value for value in (*args[:2], *kwargs.values()) if hasattr(value, "out"))
        with alone(settings.out):
            return recipe(*args, **kwargs)

    return run  # type: ignore[return-value]


def _acquire(lock: FileLock) -> None:
    lock.acquire()
    if not Path(lock.lock_file).exists():  # its last owner took the file away just before it let go of it
        lock.release()
        lock.acquire()


def _this_run() -> dict[str, Any]:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since, "command": shlex.join(words)[:200]}


def _owner(folder: Path) -> str:
    """Who has the folder, as far as it has written that down."""
    try:
        first = json.loads((folder / OWNER).read_text())
        return ": process {pid} on {host}, since {since} ({command})".format(**first)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _take_away(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):  # not empty: something was made there
            path.rmdir()
