"""How docstrings are read for the API pages: a griffe extension.

Ours say ``Example:`` and ``:func:`name```, formulas hold ``<``; griffe and Markdown want ``Examples:``, links and ``&lt;``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import smidgen
from docsite.text import escaped

_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of everything that was loaded."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """One object's docstring."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = read(obj.docstring.value, obj)


def read(text: str, obj: griffe.Object) -> str:
    """A docstring as griffe and Markdown take it."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
    parts = re.split(
        r"^( *(?:>>>|\.\.\.).*(?:\n *\S.*)*)", text, flags=re.M
    )  # examples and what they print stay as they are
    text = "".join(part if number % 2 else escaped(part) for number, part in enumerate(parts))
    return _ROLE.sub(lambda found: linked(found[1], obj), text)


def linked(name: str, obj: griffe.Object) -> str:
    """A link to what ``name`` means where ``obj`` stands, or the name as code where it is none of ours."""
    if name in (f"smidgen.{public}" for public in smidgen._LATER):
        last = name.rpartition(".")[2]
        return f"[`{name}`][{smidgen._LATER[last]}.{last}]"
    try:
        path = name if name.startswith("smidgen.") else obj.resolve(name)
        found = obj.modules_collection[path]
        found = found.final_target if found.is_alias else found
    except (griffe.GriffeError, KeyError):
        return f"`{name}`"
    return f"[`{name}`][{found.path}]" if found.docstring and not found.name.startswith("_") else f"`{name}`"
