"""Damaging a file as a test may: written beside and renamed."""

import os
from pathlib import Path


def rewrite(path: Path, content: bytes) -> None:
    """New content under the same name. Truncating in place would kill a process that still holds the old file mapped."""
    beside = path.with_name(path.name + ".damaged")
    beside.write_bytes(content)
    os.replace(beside, path)
