"""Tables of plain records as parquet: the same records give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, MissingExtraError


def to_parquet(records: Sequence[Any]) -> bytes:
    """Dataclass records of one kind as a parquet file; equal records give equal bytes."""
    pa, pq = pyarrow()
    rows = [asdict(record) for record in records]
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = pa.map_(pa.string(), pa.string()) if isinstance(values[0], dict) else None
        if isinstance(values[0], tuple):
            kind, values = pa.list_(pa.string()), [list(value) for value in values]
        if isinstance(values[0], dict):
            values = [sorted(value.items()) for value in values]
        columns[name] = pa.array(values, type=kind or _column_type(pa, records[0], name))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def _column_type(pa: Any, record: Any, name: str) -> Any:
    """A column's type from the record's annotation, so that a column of None keeps it."""
    words = str(record.__dataclass_fields__[name].type)
    for word, kind in (("bool", pa.bool_()), ("int", pa.int64()), ("float", pa.float64())):
        if words.startswith(word):
            return kind
    return pa.string()


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Columns of a parquet file; DataError when it is missing or damaged."""
    pa, pq = pyarrow()
    try:
        return pq.read_table(path, partitioning=None).to_pydict()  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def pyarrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet), or the extra to install."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("A zoo keeps its tables in parquet: pip install 'smidgen[zoo]'") from error
    return pa, pq
