"""Adapters from photos, by a generator that is loaded once, when it is first asked."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from smidgen.difflora.use.commands import predict
from smidgen.difflora.use.sampler import Output, Sampler, Sheet


class Predictor:
    """A generator with its base.

    Args:
        generator: its folder; None: the one that comes with the package.
        base: where its base lies, if elsewhere than the generator says.
    """

    def __init__(self, generator: Path | None = None, base: str | None = None) -> None:
        self.generator, self.base = generator, base
        self._lock = threading.Lock()
        self._sampler: Sampler | None = None

    def predict(self, photos: Sequence[IO[bytes]], seed: int, scratch: Path) -> Path:
        """The folder, in ``scratch``, of the adapter of the person in ``photos``.

        Raises:
            DataError: a photo that cannot be read, or shows nobody.
        """
        paths = []
        for number, photo in enumerate(photos):
            paths.append(scratch / f"photo-{number}")
            with paths[-1].open("xb") as file:
                shutil.copyfileobj(photo, file)
        output = Output(scratch / "predicted", self.generator, self.base, sheet=Sheet(sheet=False))
        with self._lock:
            if self._sampler is None:
                self._sampler = Sampler(output)
            predict(paths, output, [seed], sampler=self._sampler)
        return output.out
