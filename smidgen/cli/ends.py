"""How a command ends: every way out is a sentence on stderr and an exit status, never a traceback."""

import contextlib
import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from smidgen.errors import SmidgenError

USER, FAULT, STOPPED, PIPE = 2, 1, 130, 141
_WORKS = {  # what would work, for what the system says of a file
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EDQUOT: "free some of your quota, or choose a place on another disk",
    errno.EFBIG: "the system limits the size of files here; choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may read and write, or change its permissions",
    errno.EPERM: "choose a place that you may read and write, or change its permissions",
    errno.EEXIST: "a file is in the way; choose another name",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EISDIR: "this is a folder where a file is meant; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the links lead in a circle; choose another path",
    errno.ENOENT: "check the path",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENOTEMPTY: "another program writes there; choose another place",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, where a command has no better answer to it: what it began is taken back as for Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; a handler of others stays, and outside the main thread there is none."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ended(command: Callable[[], int], debug: bool = False) -> int:
    """The exit status of ``command``, which is called; what stopped it is said on stderr.

    0 done, 2 a user error or a system that refuses a file, 130 and 143 stopped by a signal, 141 nobody reads the output any
    more, 1 a fault of Smidgen's own: its traceback goes into a file that is named (with ``debug`` to stderr).
    """
    try:
        with _terminable():
            status = command()
        if sys.stdout is not None:  # None where the caller closed it
            sys.stdout.flush()
        return status
    except SmidgenError as error:
        say(str(error))
        signum = getattr(error, "signum", None)
        return USER if signum is None else 128 + signum
    except Terminated:
        say("stopped by SIGTERM; the same command starts again, or goes on where it keeps what is done.")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        say("stopped; the same command starts again, or goes on where it keeps what is done.")
        return STOPPED
    except BrokenPipeError:
        _drop_output()
        return PIPE
    except (OSError, MemoryError, UnicodeEncodeError) as error:
        if debug:
            traceback.print_exc()
        say(_refusal(error))
        _drop_output()
        return USER
    except Exception as error:
        memory = "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()
        say(_refusal(MemoryError()) if memory else _fault(error, debug))
        return USER if memory else FAULT


def say(sentence: str) -> None:
    """One line on stderr, whatever the terminal can show; nothing when there is no stderr."""
    line = f"smidgen: {' '.join(sentence.split())}\n"
    coding = getattr(sys.stderr, "encoding", None) or "ascii"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(line.encode(coding, "backslashreplace").decode(coding))
        sys.stderr.flush()


def _refusal(error: OSError | MemoryError | UnicodeEncodeError) -> str:
    """What the system refused, of which file, and what would work."""
    if isinstance(error, MemoryError):
        return "The memory is full; smaller batches, fewer pictures at once or --gradient-checkpointing need less."
    if isinstance(error, UnicodeEncodeError):
        return (
            f"This terminal ({error.encoding}) cannot show {error.object[error.start : error.end]!a}; set PYTHONUTF8=1, or "
            "send the output to a file."
        )
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f"{named[-1]!r}: " if named else ""
    works = _WORKS.get(error.errno or 0)
    said = error.strerror or str(error) or type(error).__name__
    return f"{where}{said}{f' ({works})' if works else ''}. What was there before is as it was."


def _fault(error: Exception, debug: bool) -> str:
    kind = f"{type(error).__name__}: {error}"
    report = "Please report it with the command that led here"
    if debug:
        traceback.print_exc()
        return f"This is a fault of Smidgen's own. {report} and the lines above."
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="smidgen-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            traceback.print_exc(file=log)
    except OSError:
        return f"A fault of Smidgen's own ({kind[:300]}). {report}; --debug shows where it happened."
    return f"A fault of Smidgen's own ({kind[:300]}). {report} and {log.name}."


def _drop_output() -> None:
    """What is still buffered and cannot be written (nobody reads it, the disk is full) goes nowhere, at exit too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
