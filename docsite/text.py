"""Plain prose as Markdown: what is no markup in it does not become any."""

import re

_CODE = re.compile(r"(``.+?``|`[^`\n]+`)", re.S)


def escaped(text: str) -> str:
    """Formulas that look like tags or links, outside code."""
    parts = _CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"<(?=[A-Za-z/])", "&lt;", part).replace("][", "]&#91;")
        for part in parts
    )


def plain(text: str) -> str:
    """Prose without any markup but code between backticks."""
    parts = _CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]{}])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )
