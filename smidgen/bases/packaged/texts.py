"""What makes two texts the same one."""

import re
from collections.abc import Iterable


def bare(text: str, length: int = 60) -> str:
    """Letters and digits alone, without links, names, retweet marks and case, cut where copies get cut.

    Example:
        >>> bare("RT @JetBlue: Our fleet's on fleek. http://t.co/LY") == bare("our FLEETs on fleek")
        True
    """
    text = re.sub(r"https?://\S*|@\w+|\brt\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "", text)[:length]


def distinct(rows: Iterable[tuple[str, str]], length: int = 60) -> list[tuple[str, str]]:
    """The first (text, label) of those whose ``bare`` text is the same; texts labelled in two ways are left out.

    Example:
        >>> distinct([("Hi!", "a"), ("hi", "a"), ("yes", "a"), ("Yes.", "b")])
        [('Hi!', 'a')]
    """
    first: dict[str, tuple[str, str]] = {}
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        key = bare(text, length)
        first.setdefault(key, (text, label))
        labels.setdefault(key, set()).add(label)
    return [row for key, row in first.items() if key and len(labels[key]) == 1]
