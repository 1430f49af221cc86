"""A library of adapters: a folder of them, any mix of which answers in one batch.

with Library("adapters", bases=["smollm2"]) as library:
    answer = library.generate(TextRequest("ann", "Once upon a time", max_tokens=20)).result()
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from smidgen.adapters.checkpoint.files import public_name
from smidgen.errors import SmidgenError, did_you_mean
from smidgen.serving.handles import Handle
from smidgen.serving.requests import (
    AdapterInfo,
    BaseInfo,
    Classification,
    ClassifyRequest,
    Counters,
    Embedding,
    EmbedRequest,
    ImageRequest,
    ImageResult,
    TextRequest,
    TextResult,
    UnknownAdapterError,
)
from smidgen.serving.shelf import Shelf


class Library:
    """A folder of adapters and the bases that they are for.

    Every request names who answers: an adapter, a base (which is then meant), or adapters with weights. A name that is
    neither is an error, never the base. Requests may come from any thread. Adapters are read when they are first asked for,
    again when their files changed, and the least recently used leave memory when ``budget_bytes`` are full. A request ends
    with the version of its adapter that it began with, or in an error.

    Args:
        folder: the adapters, each in a folder of its own, which may lie deeper (``team/ann``); made when something is added.
        bases: names or folders of the bases to serve; () are those that adapters in the folder name.
        budget_bytes: of adapters' numbers in memory.
        batch: rows that a base computes at once, of each kind of request.
        queue: requests that may wait; more are a BusyError.
        precision: of the bases: ``no`` (fp32), ``fp16`` or ``bf16``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        bases: Sequence[str] = (),
        budget_bytes: int = 2**30,
        batch: int = 64,
        queue: int = 1024,
        precision: str = "no",
    ) -> None:
        self.shelf = Shelf(folder, budget_bytes)
        self._bases = {public_name(base): base for base in bases}
        self.budget_bytes, self.batch, self.queue, self.precision = budget_bytes, batch, queue, precision

    # ---- what is there -----------------------------------------------------------------------------------------------

    def adapters(self) -> list[AdapterInfo]:
        """All adapters that can be read, by name."""
        found = []
        for name in self.shelf.names():
            try:
                found.append(self.info(name))
            except SmidgenError:
                continue
        return found

    def refused(self) -> dict[str, str]:
        """Adapter folders that cannot be served: name -> why."""
        found = {}
        for name in self.shelf.names():
            try:
                self.info(name)
            except SmidgenError as error:
                found[name] = str(error)
        return found

    def info(self, name: str) -> AdapterInfo:
        """What is known of an adapter.

        Raises:
            UnknownAdapterError: there is none, with the nearest names.
            SmidgenError: it is damaged, or of a kind that is not served.
        """
        return self.shelf.entry(name).info()

    def bases(self) -> list[BaseInfo]:
        """The bases, which are models of their own: a row of the base itself."""
        raise NotImplementedError

    def check(self, model: str) -> None:
        """Nothing, if ``model`` is an adapter or a base.

        Raises:
            UnknownAdapterError: it is neither, with the nearest names of both.
        """
        if model not in self._bases and self.shelf.place(model) is None:
            near = did_you_mean(model, [*self.shelf.names(), *self._bases])
            raise UnknownAdapterError(f"There is no adapter and no base {model!r}.{near}")

    # ---- changes -----------------------------------------------------------------------------------------------------

    def add(self, name: str, folder: str | os.PathLike[str], overwrite: bool = False) -> AdapterInfo:
        """Copies an adapter's folder into the library, after it was put into its base and found on.

        Raises:
            ConfigError: the name is taken (unless ``overwrite``), a base's, or none.
            SmidgenError: the adapter is damaged, of another base, or off; nothing was added.
        """
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Deletes an adapter from folder and memory. Requests that it is answering end with it."""
        raise NotImplementedError

    def load(self, name: str) -> AdapterInfo:
        """Puts an adapter into memory now; waits until it is there."""
        raise NotImplementedError

    def unload(self, name: str) -> bool:
        """Takes an adapter out of memory, once no request needs it; whether it was there. Its files stay."""
        raise NotImplementedError

    def pin(self, name: str) -> AdapterInfo:
        """Loads an adapter and keeps it in memory until :meth:`unpin`, new versions of its files included."""
        raise NotImplementedError

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter be evicted again."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Looks at the folder: what is gone or replaced leaves memory, pinned adapters are read again. Requests look at
        their own adapter anyway."""
        raise NotImplementedError

    # ---- requests ----------------------------------------------------------------------------------------------------

    def generate(self, request: TextRequest) -> Handle[TextResult]:
        """Text; events are TextPieces, then the TextResult.

        Raises:
            UnknownAdapterError, BusyError, ClosedError; ConfigError for a value out of range or an adapter of another task;
            DataError for a prompt that the model cannot read; SmidgenError for an adapter that is refused.
        """
        raise NotImplementedError

    def draw(self, request: ImageRequest) -> Handle[ImageResult]:
        """An image; events are Progress after each step, then the ImageResult. Errors as of :meth:`generate`."""
        raise NotImplementedError

    def classify(self, request: ClassifyRequest) -> Handle[Classification]:
        """A class, by an adapter with a head. Errors as of :meth:`generate`."""
        raise NotImplementedError

    def embed(self, request: EmbedRequest) -> Handle[Embedding]:
        """A vector. Errors as of :meth:`generate`."""
        raise NotImplementedError

    def generate_all(self, requests: Sequence[TextRequest]) -> list[TextResult]:
        """Waits for all answers, computed in as few batches as may be; any number of requests."""
        raise NotImplementedError

    def draw_all(self, requests: Sequence[ImageRequest]) -> list[ImageResult]:
        """As :meth:`generate_all`."""
        raise NotImplementedError

    def classify_all(self, requests: Sequence[ClassifyRequest]) -> list[Classification]:
        """As :meth:`generate_all`."""
        raise NotImplementedError

    def embed_all(self, requests: Sequence[EmbedRequest]) -> list[Embedding]:
        """As :meth:`generate_all`."""
        raise NotImplementedError

    # ---- the end -----------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """What it did and holds, for metrics."""
        raise NotImplementedError

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, ends those that there are (waiting ``timeout`` seconds for them, None: for ever; the rest
        end in a ClosedError) and frees the bases."""
        raise NotImplementedError

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(0.0)
