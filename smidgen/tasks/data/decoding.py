"""Files as text: which encoding a file is in, and characters that no text holds.

A byte order mark or valid UTF-8 decides; anything else is a guess by charset-normalizer, and the guess is said. Bytes
that are no character, halves of characters and NULs are read as U+FFFD, as every decoder that replaces does, and counted.
"""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, MissingExtraError

MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BINARY = {b"PK\x03\x04": "a zip archive or an Excel workbook", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"%PDF": "PDF"}
WIDE = ["utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"]
USUAL = "cp1252"  # what unlabelled bytes are most often (the HTML standard's fallback too)
GUESSED = [
    *WIDE,
    USUAL,
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "koi8_r",
    "cp932",
    "euc_jp",
    "gb18030",
    "big5",
    "euc_kr",
]
REPLACEMENT = "\ufffd"
_DAMAGE = re.compile("[\ud800-\udfff\0]")


class Unusual(Exception):
    """A file that has to be guessed at or mended, which a reader of plain ones leaves to those that read it whole."""


def read_text(path: Path, warnings: list[str]) -> str:
    """The text of a file. Raises DataError for what is no text, and OSError as ``open`` does."""
    raw = path.read_bytes()
    for magic, what in BINARY.items():
        if raw.startswith(magic):
            raise DataError(f"{path} is {what}, not text; save it as a table, or give it the ending it should have.")
    for mark, encoding in MARKS:
        if raw.startswith(mark):
            return raw.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace")
    if raw.count(0) * 5 > len(raw):
        return _guessed(path, raw, WIDE, warnings)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        escaped = raw.decode("utf-8", "surrogateescape")
    bad = len(_DAMAGE.findall(escaped))
    good = sum(char > "\x7f" for char in escaped) - bad
    if good > bad:  # UTF-8 with broken bytes: they are counted where they stand
        return escaped
    return _guessed(path, raw, GUESSED, warnings)


def mended(value: Any) -> tuple[Any, bool]:
    """``value`` with U+FFFD for each NUL and each half of a character in its texts, and whether there was any.

    Example:
        >>> mended({"text": ["fine", "cut \\ud83d"]}) == ({"text": ["fine", "cut \\ufffd"]}, True)
        True
    """
    if isinstance(value, str):
        return (_DAMAGE.sub(REPLACEMENT, value), True) if _DAMAGE.search(value) else (value, False)
    if isinstance(value, dict):
        names, found = zip(*map(mended, value), strict=True) if value else ((), ())
        parts = [mended(part) for part in value.values()]
        whole = dict(zip(names, (part for part, _ in parts), strict=True))
        return whole, any(found) or any(damaged for _, damaged in parts)
    if isinstance(value, list):
        parts = [mended(part) for part in value]
        return [part for part, _ in parts], any(damaged for _, damaged in parts)
    return value, False


def _guessed(path: Path, raw: bytes, candidates: Sequence[str], warnings: list[str]) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is not UTF-8 text. Save it as UTF-8; guessing its encoding needs charset-normalizer: "
            "pip install 'smidgen[tasks]'"
        ) from error
    matches = list(from_bytes(raw, cp_isolation=list(candidates)))
    if not matches:
        raise DataError(f"{path} is not UTF-8 text, nor in any encoding that can be guessed. Save it as UTF-8.")
    best = matches[0]
    encoding = best.encoding
    alike = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    if any(USUAL in (match.encoding, *match.could_be_from_charset) for match in alike):
        encoding = USUAL
    warnings.append(
        f"{path.name} is not UTF-8; it is read as {encoding.replace('_', '-')}, a guess. Save it as UTF-8 to be sure."
    )
    return raw.decode(encoding, "replace").removeprefix("\ufeff")
