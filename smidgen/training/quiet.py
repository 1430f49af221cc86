"""Silence from transformers and diffusers where their words would mislead."""

import contextlib
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """They report a fresh head as something gone wrong, and draw a bar for every load; what matters of it we say ourselves."""
    found = {"transformers", *({"diffusers"} & sys.modules.keys())}
    parts = [importlib.import_module(f"{library}.utils.logging") for library in sorted(found)]
    before = [(part, part.get_verbosity(), part.is_progress_bar_enabled()) for part in parts]
    for part in parts:
        part.set_verbosity_error()
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part, level, bars in before:
            part.set_verbosity(level)
            if bars:
                part.enable_progress_bar()
