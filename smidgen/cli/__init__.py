"""The command line. Each command is one function, its flags are that function's signature, its work one call below.

User errors end with one line on stderr and status 2, Ctrl-C with 130; results go to stdout, progress to stderr.
"""

from smidgen.cli.dispatch import SUMMARY, main

__all__ = ["SUMMARY", "main"]
