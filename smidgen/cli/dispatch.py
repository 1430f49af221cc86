"""From words to a command, and from errors to an exit status."""

import contextlib
import logging
import sys
from collections.abc import Sequence

from smidgen.cli.ends import ended
from smidgen.cli.table import GROUPS, find, overview
from smidgen.errors import ConfigError

HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``--debug`` shows the traceback of what stops it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    _set_up_output()
    return ended(lambda: _dispatch([word for word in words if word != "--debug"]), debug)


def _set_up_output() -> None:
    """Warnings and progress to stderr. A name that the terminal cannot show is escaped, and stops nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("smidgen").setLevel(logging.INFO)
    # peft imports these where they are installed, and they warn about kernels that nothing here calls
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _dispatch(words: list[str]) -> int:
    if any("\0" in word for word in words):
        raise ConfigError("A word of the command holds a NUL character; no file or option has one.")
    if words and words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"smidgen {version('smidgen')}")
        return 0
    group, rest = (words[0], words[1:]) if words and words[0] in GROUPS else ("", words)
    if not rest or rest[0] in HELP:
        print(overview(group))
        return 0
    name = find(rest[0], group)
    from smidgen.cli.build import run

    run(name, rest[1:])
    return 0
