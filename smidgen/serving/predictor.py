"""Adapters from photos, by a generator that is loaded once, when it is first asked."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from smidgen.difflora.use.commands import predict
from smidgen.difflora.use.sampler import Output, Sampler, Sheet
from smidgen.errors import DataError

_FIELDS = {  # of the form, for the command's flags
    "--unchecked goes": "unchecked=true goes", "--seeds 0..7": "several values of seed", "or --each for an adapter of each": "or send each alone",
}  # fmt: skip


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

    def predict(
        self, photos: Sequence[IO[bytes]], seed: int, scratch: Path, unchecked: bool = False
    ) -> tuple[Path, list[str]]:
        """The folder, in ``scratch``, of the adapter of the person in ``photos``, and what was read of them and how surely.

        Raises:
            DataError: a photo that cannot be read, or shows nobody; ``unchecked``, what is no usual photo is a remark.
        """
        paths = []
        for number, photo in enumerate(photos):
            paths.append(scratch / f"photo-{number}")
            with paths[-1].open("xb") as file:
                shutil.copyfileobj(photo, file)
        output = Output(scratch / "predicted", self.generator, self.base, sheet=Sheet(sheet=False), unchecked=unchecked)
        try:
            with self._lock:
                if self._sampler is None:
                    self._sampler = Sampler(output)
                made = predict(paths, output, [seed], sampler=self._sampler)
        except DataError as error:
            raise DataError(self._told(str(error), scratch)) from error
        return output.out, [self._told(note, scratch) for note in made.notes]

    @staticmethod
    def _told(said: str, scratch: Path) -> str:
        """A sentence of the command's, for who sent a form: its fields for flags, and no place of this machine."""
        for flag, field in _FIELDS.items():
            said = said.replace(flag, field)
        return said.replace(f"{scratch}{os.sep}", "")
