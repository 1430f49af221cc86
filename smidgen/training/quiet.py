"""Silence from transformers where its words would mislead."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers reports a fresh head as something gone wrong, and draws a bar for every load."""
    from transformers.utils import logging as loud

    level, bars = loud.get_verbosity(), loud.is_progress_bar_enabled()
    loud.set_verbosity_error()
    loud.disable_progress_bar()
    try:
        yield
    finally:
        loud.set_verbosity(level)
        if bars:
            loud.enable_progress_bar()
