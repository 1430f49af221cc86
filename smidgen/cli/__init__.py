"""The command line. A command is a row of one table (table.py) and a function whose signature is
its flags; one builder (build.py) makes them meet.

User errors end with one line on stderr and status 2, Ctrl-C with 130; results go to stdout, progress to stderr.
"""

from smidgen.cli.dispatch import main

__all__ = ["main"]
