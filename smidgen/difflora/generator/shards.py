"""Tensors of many examples in files that are read row by row: they need not fit into memory.

    encoded/pictures-00007.safetensors    rows 7168 .. 8191

Each file is memory-mapped for a read and written whole, so that a killed run makes no file twice, and carries what its
rows were made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.errors import DataError
from smidgen.training.processes import is_main, num_processes, process_index, wait_for_all

ROWS = 1024  # in a file, all of them in memory while it is made


class Shards:
    """``count`` rows of some named tensors in ``folder``; ``asked`` is what they follow from.

    Example:
        >>> shards = Shards(tmp_path, "squares", "version 1", count=3)
        >>> shards.fill(lambda places: {"square": torch.tensor([float(place**2) for place in places])})
        >>> shards.column("square")[[2, 0]]
        tensor([4., 0.])
    """

    def __init__(self, folder: Path, name: str, asked: Any, count: int) -> None:
        self.folder, self.name, self.count = folder, name, count
        self.asked = hashlib.sha256(repr((asked, count, ROWS)).encode()).hexdigest()

    def fill(self, make: Callable[[range], dict[str, Tensor]]) -> None:
        """Makes the files that are missing or of something else: ``make(places)`` answers tensors [places, ...]. Several processes
        share them, and go on when all are made."""
        for number in self._own():
            if not self._fits(self.path(number)):
                made = make(self._rows(number))
                whole = {key: value.cpu().contiguous() for key, value in made.items()}
                replace_file(self.path(number), save(whole, metadata={"asked": self.asked}))
        wait_for_all()
        if is_main():
            wanted = {self.path(number) for number in range(self._files)}
            for path in set(self.folder.glob(f"{self.name}-*.safetensors")) - wanted:
                path.unlink(missing_ok=True)

    def missing(self) -> int:
        """Rows that :meth:`fill` would make in this process."""
        return sum(len(self._rows(number)) for number in self._own() if not self._fits(self.path(number)))

    @property
    def _files(self) -> int:
        return -(-self.count // ROWS)

    def _own(self) -> range:
        """Numbers of the files that this process makes."""
        return range(process_index(), self._files, num_processes())

    def _rows(self, number: int) -> range:
        return range(number * ROWS, min((number + 1) * ROWS, self.count))

    def path(self, number: int) -> Path:
        """File number ``number``."""
        return self.folder / f"{self.name}-{number:05d}.safetensors"

    def column(self, key: str, places: Sequence[int] | None = None) -> Any:
        """One tensor of all rows, indexed by a list of places; ``places[i]`` is the row that stands for i."""
        return _Column(self, key, range(self.count) if places is None else places)

    def names(self) -> list[str]:
        """Names of the tensors, once there are any."""
        with safe_open(self.path(0), "pt") as file:
            return list(file.keys())

    def whole(self, key: str) -> Tensor:
        """One tensor of all rows, in memory."""
        return self.read(key, range(self.count))

    def read(self, key: str, places: Sequence[int]) -> Tensor:
        """Rows of one tensor [len(places), ...].

        Raises:
            DataError: a file that is gone or damaged, by name.
        """
        found: list[Any] = [None] * len(places)
        by_file: dict[int, list[int]] = {}
        for at, place in enumerate(places):
            by_file.setdefault(place // ROWS, []).append(at)
        for number, ats in by_file.items():
            try:
                with safe_open(self.path(number), "pt") as file:
                    rows = file.get_slice(key)
                    for at in ats:
                        row = places[at] % ROWS
                        found[at] = rows[row : row + 1]
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self.path(number)} cannot be read ({error}); run again to have it made.") from error
        return torch.cat(found)

    def _fits(self, path: Path) -> bool:
        try:
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("asked") == self.asked
        except (OSError, SafetensorError):
            return False


class _Column:
    """What of a tensor an ``Encoded`` needs."""

    def __init__(self, shards: Shards, key: str, places: Sequence[int]) -> None:
        self.shards, self.key, self.places = shards, key, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        return self.shards.read(self.key, [self.places[row] for row in rows])
