"""The store: thousands of adapters of one layout as files that many writers add to and readers stream.

    zoo.json                     format, layout (what each number of a row is, and on which base), settings
    subjects.parquet             who; see subjects.py
    shards/000012.safetensors    rows [n, size] of group 12
    manifest/000012.parquet      one line for each of them: id, step, split, state, scores, SHA-256 of the row's bytes

A group is there when its manifest is: the shard is written first, both are renamed into place whole. Rows are found by
id, never by order of writing, and every row is checked against its hash when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.rows import TensorRows
from smidgen.difflora.zoo.queue import alive
from smidgen.difflora.zoo.records import FORMAT, GroupFiles, Record, row_digest
from smidgen.difflora.zoo.tables import read_parquet
from smidgen.errors import DataError, did_you_mean

DESCRIPTION = "zoo.json"
_KEYS = {"format", "layout", "settings"}
_GROUP = re.compile(r"(\d{6})\.parquet")


class Zoo:
    """A zoo on disk.

    Example:
        >>> zoo = Zoo.create(tmp_path, layout)
        >>> zoo.commit(pack_group(layout, 0, torch.zeros(1, layout.size), [record]))
        >>> zoo.rows(split="train").load().values.shape
        torch.Size([1, 10])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a zoo; DataError when there is none or it was made by something else."""
        self.folder = Path(folder)
        path = self.folder / DESCRIPTION
        try:
            described = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise DataError(
                f"{self.folder} is no zoo: it has no {DESCRIPTION}. `smidgen zoo build` makes one."
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not isinstance(described, dict) or set(described) != _KEYS:
            unknown = sorted(set(described) ^ _KEYS)
            raise DataError(f"{path} has or lacks keys {unknown}.{did_you_mean(str(unknown[0]), _KEYS)}")
        if described["format"] != FORMAT:
            raise DataError(f"{path} has format {described['format']}; this version of smidgen reads format {FORMAT}.")
        self.layout = Layout.from_json(json.dumps(described["layout"]), f"The layout in {path}")
        self.settings: dict[str, Any] = described["settings"]

    @classmethod
    def create(cls, folder: str | os.PathLike[str], layout: Layout, settings: dict[str, Any] | None = None) -> Zoo:
        """A new zoo, or the one that is there if layout and settings are the same.

        Raises:
            DataError, BaseLockError: a zoo of another base, family, rank or settings is there.
        """
        path = Path(folder) / DESCRIPTION
        settings = json.loads(json.dumps(settings or {}))
        if path.exists():
            there = cls(folder)
            there.layout.check_same(layout, "The adapters asked for")
            old, new = _flat(there.settings), _flat(settings)
            differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if differing:
                lines = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in differing)
                raise DataError(f"{folder} holds a zoo of other settings ({lines}). Use them, or choose another --out.")
            return there
        described = {"format": FORMAT, "layout": json.loads(layout.to_json()), "settings": settings}
        replace_file(path, json.dumps(described, indent=1, sort_keys=True))
        return cls(folder)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def commit(self, files: GroupFiles) -> None:
        """Puts a group in place; one that is there already stays as it is."""
        if self.has(files.group):
            return
        replace_file(self.shard_path(files.group), files.shard)
        if files.seconds:
            replace_file(self.folder / "seconds" / f"{files.group:06d}.json", json.dumps({"seconds": files.seconds}))
        replace_file(self.manifest_path(files.group), files.manifest)

    def has(self, group: int) -> bool:
        """Whether a group is whole."""
        return self.manifest_path(group).exists()

    def sweep(self) -> None:
        """Removes what writers that were killed on this machine left half written."""
        for name in ("shards", "manifest", "seconds"):
            for path in (self.folder / name).glob(".*.tmp"):
                if not alive(int(path.name.split(".")[-2])):  # replace_file names its writer
                    path.unlink(missing_ok=True)

    def shard_path(self, group: int) -> Path:
        return self.folder / "shards" / f"{group:06d}.safetensors"

    def manifest_path(self, group: int) -> Path:
        return self.folder / "manifest" / f"{group:06d}.parquet"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def groups(self) -> list[int]:
        """Groups that are there, in ascending order."""
        found = (_GROUP.fullmatch(path.name) for path in (self.folder / "manifest").glob("*.parquet"))
        return sorted(int(match.group(1)) for match in found if match)

    def records(self) -> list[Record]:
        """All lines of the manifest, ordered by id and step, whatever the order they were written in.

        Raises:
            DataError: a damaged manifest, unknown columns, an adapter that is there twice.
        """
        lines = [line for group in self.groups() for line in self._lines(group)]
        seen: dict[tuple[str, int], Record] = {}
        for line in lines:
            other = seen.setdefault((line.id, line.step), line)
            if other is not line:
                raise DataError(
                    f"The adapter of {line.id!r} after {line.step} steps is in groups {other.group} and {line.group} of "
                    f"{self.folder}; a zoo holds it once."
                )
        return sorted(lines, key=lambda line: (line.id, line.step))

    def _lines(self, group: int) -> list[Record]:
        path = self.manifest_path(group)
        columns, known = read_parquet(path), set(Record.__dataclass_fields__)
        if set(columns) != known:
            unknown = sorted(set(columns) ^ known)
            raise DataError(f"{path} has or lacks columns {unknown}.{did_you_mean(unknown[0], known)}")
        lines = [Record(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        if any(line.group != group for line in lines):
            raise DataError(f"{path} speaks of group {lines[0].group}: the file was renamed.")
        return lines

    def rows(self, split: str | None = None, state: str | None = "kept", last: bool = True) -> ZooRows:
        """The adapters of a split (None: all), kept ones only and the last checkpoint of each unless told otherwise.

        Raises:
            DataError: there are none.
        """
        chosen = [
            line
            for line in self.records()
            if split in (None, line.split) and state in (None, line.state) and (line.last or not last)
        ]
        if not chosen:
            there = sorted({f"{line.split}/{line.state}" for line in self.records()})
            raise DataError(
                f"{self.folder} holds no adapters of {split or 'any split'}/{state or 'any state'}, but {there}."
            )
        return ZooRows(self, chosen)

    def row(self, identity: str) -> Tensor:
        """The adapter [size] of one person, kept or not.

        Raises:
            DataError: nobody of that name.
        """
        lines = [line for line in self.records() if line.id == identity and line.last]
        if not lines:
            raise DataError(
                f"No {identity!r} in {self.folder}.{did_you_mean(identity, {r.id for r in self.records()})}"
            )
        return self.read(lines)[0]

    def read(self, lines: Sequence[Record]) -> Tensor:
        """Rows [n, size] in fp32 of manifest lines, in their order, each checked against its hash.

        Raises:
            DataError: a shard that is missing, half-written, of another layout or changed, by name.
        """
        out = torch.empty(len(lines), self.layout.size)
        by_group: dict[int, list[int]] = {}
        for place, line in enumerate(lines):
            by_group.setdefault(line.group, []).append(place)
        for group, places in by_group.items():
            path = self.shard_path(group)
            for place, row in zip(places, self._read_shard(path, [lines[p].row for p in places]), strict=True):
                if row_digest(row) != lines[place].sha256:
                    raise DataError(
                        f"Row {lines[place].row} ({lines[place].id!r}) of {path} is not what was written; restore the "
                        f"shard, or remove it and {self.manifest_path(group)} to have the group built again."
                    )
                out[place] = row.float()
        return out

    def _read_shard(self, path: Path, rows: Sequence[int]) -> Iterator[Tensor]:
        try:
            with safe_open(path, "pt") as file:
                self._check_shard(path, file)
                tensor = file.get_slice("rows")
                for row in rows:
                    yield tensor[row : row + 1][0]
        except (OSError, SafetensorError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise DataError(
                f"The shard {path} ({size:,} bytes) is missing, half-written or no safetensors file ({error}). Remove it "
                f"and {self.manifest_path(int(path.stem))} to have the group built again."
            ) from error

    def _check_shard(self, path: Path, file: Any) -> None:
        described = json.loads((file.metadata() or {}).get("smidgen", "{}"))
        if list(file.keys()) != ["rows"]:
            raise DataError(f"The shard {path} holds {sorted(file.keys())}, a zoo's shard holds 'rows' alone.")
        if described.get("layout") != self.layout.digest:
            raise DataError(f"The shard {path} is of another layout (another base, rank, method or order of tensors).")
        shape, kind = file.get_slice("rows").get_shape(), file.get_slice("rows").get_dtype()
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        if shape[1] != self.layout.size or names.get(kind) != self.layout.dtype:
            raise DataError(
                f"The shard {path} has rows of {shape[1]} {kind} numbers, not {self.layout.size} {self.layout.dtype}."
            )

    def verify(self) -> int:
        """Reads every row of every group; returns how many there are. Raises what :meth:`read` raises."""
        count = 0
        for group in self.groups():
            count += len(self.read(self._lines(group)))
        return count

    def digest(self) -> str:
        """SHA-256 over the bytes of all shards and manifests; two builds of one zoo have the same."""
        total = hashlib.sha256()
        for group in self.groups():
            for path in (self.shard_path(group), self.manifest_path(group)):
                total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


class ZooRows:
    """Adapters of a zoo as :class:`smidgen.difflora.weightspace.rows.Rows`: streamed, never all in memory."""

    def __init__(self, zoo: Zoo, lines: Sequence[Record]) -> None:
        self.zoo, self.lines = zoo, list(lines)

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def ids(self) -> list[str]:
        """Whose rows, in their order."""
        return [line.id for line in self.lines]

    def blocks(self, size: int = 64) -> Iterator[Tensor]:
        """Rows [at most size, row], in order of id."""
        for start in range(0, len(self.lines), size):
            yield self.zoo.read(self.lines[start : start + size])

    def take(self, indices: Iterable[int]) -> Tensor:
        """Rows by their place."""
        return self.zoo.read([self.lines[index] for index in indices])

    def load(self) -> TensorRows:
        """All rows in memory."""
        return TensorRows(self.zoo.read(self.lines))
