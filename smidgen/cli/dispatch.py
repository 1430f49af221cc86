"""From words to a command, and from errors to an exit status."""

import logging
import sys
from collections.abc import Sequence

from smidgen.cli.table import GROUPS, find, overview
from smidgen.errors import SmidgenError

HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("smidgen").setLevel(logging.INFO)
    # peft imports these where they are installed, and they warn about kernels that nothing here calls
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return _dispatch(words)
    except SmidgenError as error:
        print(f"smidgen: {error}", file=sys.stderr)
        signum = getattr(error, "signum", None)
        return 2 if signum is None else 128 + signum
    except KeyboardInterrupt:
        print("smidgen: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _dispatch(words: list[str]) -> int:
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
