"""Keys and values of the rows of a batch that rows join and leave between tokens.

Rows end in the same column, so that what is before a row is padding on its left, as everywhere in transformers. There is room
for more rows and columns than are used, so a token is written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

COLUMNS = 64  # of room for what is to come


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, columns, width] of one layer, views into tensors with room."""

    is_sliding = False  # the mask of a sliding window is the model's to make

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None
        self.rows = self.start = self.end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new columns behind the others and gives all."""
        new = key_states.shape[-2]
        if self.room is None:
            self.room, self.rows, self.end = (key_states, value_states), len(key_states), new
            self.is_initialized = True
        else:
            self._reserve(self.rows, 0, new)
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room[: self.rows, :, self.end : self.end + new] = states
            self.end += new
        return self._show()

    def join(self, other: RoomyLayer, picks: Sequence[int]) -> None:
        """Takes rows of another batch after its own."""
        assert self.room is not None and other.room is not None
        length = other.end - other.start
        self._reserve(self.rows + len(picks), length - (self.end - self.start), 0)
        self.start = min(self.start, self.end - length)
        place = slice(self.rows, self.rows + len(picks)), slice(None), slice(self.end - length, self.end)
        for room, theirs in zip(self.room, (other.keys, other.values), strict=True):
            room[place] = theirs[list(picks)]
        self.rows += len(picks)
        self._show()

    def leave(self, row: int) -> None:
        """Forgets a row; the last one takes its place."""
        assert self.room is not None
        self.rows -= 1
        for room in self.room:
            room[row, :, self.start : self.end] = room[self.rows, :, self.start : self.end]
        self._show()

    def trim(self, columns: int) -> None:
        """Forgets all but the last columns."""
        self.start = max(self.start, self.end - columns)
        self._show()

    def _reserve(self, rows: int, before: int, after: int) -> None:
        """Room for so many rows, and so many columns before those that are used and after."""
        assert self.room is not None
        used, before = self.end - self.start, max(0, before)
        have = self.room[0].shape
        if rows <= have[0] and self.start >= before and self.end + after <= have[2]:
            return
        rows = rows if rows <= have[0] else max(rows, have[0] + have[0] // 4)
        found = []
        for room in self.room:
            new = room.new_zeros(max(rows, have[0]), room.shape[1], before + used + after + COLUMNS, room.shape[3])
            new[: self.rows, :, before : before + used] = room[: self.rows, :, self.start : self.end]
            found.append(new)
        self.room, self.start, self.end = (found[0], found[1]), before, before + used

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self.room is not None
        self.keys, self.values = (room[: self.rows, :, self.start : self.end] for room in self.room)
        return self.keys, self.values


class RoomyCache(Cache):
    """The layers of a model, as its forward takes them."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)

    def join(self, other: RoomyCache, picks: Sequence[int]) -> None:
        """As of :class:`RoomyLayer`, of all layers."""
        for own, theirs in zip(self.layers, other.layers, strict=True):
            own.join(theirs, picks)

    def leave(self, row: int) -> None:
        """As of :class:`RoomyLayer`, of all layers."""
        for layer in self.layers:
            layer.leave(row)

    def trim(self, columns: int) -> None:
        """As of :class:`RoomyLayer`, of all layers."""
        for layer in self.layers:
            layer.trim(columns)
