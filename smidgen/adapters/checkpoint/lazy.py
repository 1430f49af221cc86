"""Tensors of safetensors files that are read one by one, when they are asked for: a checkpoint larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smidgen.adapters.checkpoint.files import check_file
from smidgen.errors import AdapterFileError


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor of one or several safetensors files; nothing is kept.

    Raises:
        AdapterFileError: a file that is missing, truncated or none.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        self.bytes = sum(check_file(file) for file in files)
        for file in files:
            self._files |= dict.fromkeys(self._opened(file), file)

    @staticmethod
    def _opened(file: Path, name: str | None = None):  # type: ignore[no-untyped-def]
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys()) if name is None else opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise AdapterFileError(f"{file} is truncated or not a safetensors file ({error}).") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._opened(self._files[name], name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Changed(Mapping[str, Tensor]):
    """Another mapping's tensors with differences added to some: ``names`` is name -> its difference's."""

    def __init__(
        self, tensors: Mapping[str, Tensor], differences: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> None:
        self._tensors, self._differences, self._names = tensors, differences, names

    def __getitem__(self, name: str) -> Tensor:
        before = self._tensors[name]
        if name not in self._names:
            return before
        difference = self._differences[self._names[name]].float()
        if difference.shape != before.shape or not bool(torch.isfinite(difference).all()):
            raise AdapterFileError(
                f"The difference of {name!r} is {tuple(difference.shape)}, the weight {tuple(before.shape)}; numbers must be finite."
            )
        return before.float() + difference

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Renamed(Mapping[str, Tensor]):
    """Another mapping's tensors by other names: ``names`` is new -> old."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
