"""Tokens as they come, as text: whole characters alone, and nothing of a text that ends the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "�"  # what a tokenizer writes for a part of a character


class Speller:
    """The text of one answer, piece by piece.

    Args:
        tokenizer: that of the model.
        stop: texts that end the answer, across tokens too.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = 0  # tokens from here on are spelt together; up to here they were given
        self._held = ""  # what may be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._ids.append(token)
        before, now = self._spelt(self._ids[self._from : self._read]), self._spelt(self._ids[self._from :])
        if now.endswith(HALF) or len(now) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._given(now[len(before) :])

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return ""
        before, now = self._spelt(self._ids[self._from : self._read]), self._spelt(self._ids[self._from :])
        given = self._given(now[len(before) :])
        rest, self._held = self._held, ""
        return given if self.stopped else given + rest

    def _given(self, text: str) -> str:
        """Of the text held and the new one, what can be no part of a stop text."""
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        at = len(text) - longest
        self._held = text[at:]
        return text[:at]

    def _spelt(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of a text that a stop text begins with.

    Example:
        >>> _overlap("one\\nUs", "\\nUser:")
        3
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
