"""A library of adapters: a folder of them, any mix of which answers in one batch.

with Library("adapters", bases=["smollm2"]) as library:
    answer = library.generate(TextRequest("ann", "Once upon a time", max_tokens=20)).result()
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from smidgen.adapters.checkpoint.files import public_name
from smidgen.bases.transformers import Head
from smidgen.errors import ConfigError, SmidgenError, did_you_mean, shown
from smidgen.serving.handles import Handle
from smidgen.serving.hosts import Host
from smidgen.serving.jobs import Job
from smidgen.serving.kinds import EncoderHost, ImageHost, LanguageHost, abilities, check_request
from smidgen.serving.requests import (
    AdapterInfo,
    BaseInfo,
    Classification,
    ClassifyRequest,
    ClosedError,
    Counters,
    Embedding,
    EmbedRequest,
    ImageRequest,
    ImageResult,
    Model,
    TextRequest,
    TextResult,
    UnknownAdapterError,
)
from smidgen.serving.residents import Memory
from smidgen.serving.shelf import Entry, Shelf, check_name, copy, read

Entries = tuple[tuple[Entry, float], ...]
ANY = Head(("0", "1"))  # of an encoder that only embeds


class Library:
    """A folder of adapters and the bases that they are for.

    Every request names who answers: an adapter, a base (which is then meant), or adapters with weights. A name that is
    neither is an error, never the base. Requests may come from any thread. Adapters are read when they are first asked for,
    again when their files changed, and the least recently used leave memory when ``budget_bytes`` are full. A request ends
    with the version of its adapter that it began with, or in an error.

    Args:
        folder: the adapters, each in a folder of its own, which may lie deeper (``team/ann``); made when something is added.
        bases: names or folders of the bases to serve, which are loaded at once; () are those that adapters name, each loaded
            when it is first asked for.
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
        self.shelf, self.memory = Shelf(folder, budget_bytes), Memory(budget_bytes)
        self._options = batch, queue, precision
        self._lock = threading.RLock()
        self._hosts: dict[tuple[Any, ...], Host] = {}
        self._weights: dict[tuple[str, str], dict[str, Any]] = {}  # of encoders, by base and task
        self._versions: dict[str, str] = {}  # name -> fingerprint of what was last found there
        self._requests: Counter[str] = Counter()
        self._closed, self._open = False, not bases
        self._bases = {public_name(base): base for base in bases}
        self._abilities = {name: abilities(base) for name, base in self._bases.items()}
        for info in self.adapters() if self._open else ():
            self._add_base(self.shelf.entry(info.name))
        try:
            for name in self._bases if bases else ():
                if self._abilities[name]:
                    self._host(name, self._abilities[name][0], ()).call(lambda: None)
        except BaseException:
            self.close(0.0)
            raise

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
        return self._info(self._entry(name))

    def _info(self, entry: Entry) -> AdapterInfo:
        return entry.info(entry.fingerprint in self.memory, entry.name in self.memory.pins)

    def bases(self) -> list[BaseInfo]:
        """The bases, which are models of their own: a row of the base itself."""
        with self._lock:
            loaded = {key[0]: host.fingerprint for key, host in self._hosts.items() if host.residents is not None}
        return [
            BaseInfo(name, self._abilities[name], loaded.get(name, ""), name in loaded) for name in sorted(self._bases)
        ]

    def check(self, model: str) -> None:
        """Nothing, if ``model`` is an adapter or a base.

        Raises:
            UnknownAdapterError: it is neither, with the nearest names of both.
        """
        if model not in self._bases and self.shelf.place(model) is None:
            near = did_you_mean(str(model), [*self.shelf.names(), *self._bases])
            raise UnknownAdapterError(f"There is no adapter and no base {shown(model)}.{near}")

    # ---- changes -----------------------------------------------------------------------------------------------------

    def add(self, name: str, folder: str | os.PathLike[str], overwrite: bool = False) -> AdapterInfo:
        """Copies an adapter's folder into the library, after it was put into its base and found on.

        Raises:
            ConfigError: the name is taken (unless ``overwrite``), a base's, or none.
            SmidgenError: the adapter is damaged, of another base, or off; nothing was added.
        """
        check_name(name)
        if name in self._bases:
            raise ConfigError(f"{name!r} is the name of a base; give the adapter another one.")
        if not overwrite and self.shelf.place(name) is not None:
            raise ConfigError(f"There is an adapter {name!r} already; remove it first, or say overwrite=True.")
        if other := self.shelf.around(name):
            raise ConfigError(f"The name {name!r} goes with no {other!r}, which is an adapter already; choose another.")
        self.shelf.folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".adding-", dir=self.shelf.folder))
        try:
            copy(Path(folder), stage)
            entry = read(name, stage, self.shelf.most)
            self._host_of(entry).put(entry)
            self.shelf.add(name, stage)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return self.info(name)

    def remove(self, name: str) -> None:
        """Deletes an adapter from folder and memory. Requests that it is answering end with it."""
        self.shelf.remove(name)
        self.memory.pins.discard(name)
        self._leave(name)

    def load(self, name: str) -> AdapterInfo:
        """Puts an adapter into memory now; waits until it is there."""
        entry = self._entry(name)
        self._host_of(entry).put(entry)
        return self._info(entry)

    def unload(self, name: str) -> bool:
        """Takes an adapter out of memory, once no request needs it; whether it was there. Its files stay."""
        entry = self._entry(name)
        self.memory.pins.discard(name)
        return self.memory.unload(name, entry.fingerprint)

    def pin(self, name: str) -> AdapterInfo:
        """Loads an adapter and keeps it in memory until :meth:`unpin`, new versions of its files included."""
        self.memory.pins.add(name)
        try:
            return self.load(name)
        except BaseException:
            self.memory.pins.discard(name)
            raise

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter be evicted again."""
        self.memory.pins.discard(name)

    def refresh(self) -> None:
        """Looks at the folder: what is gone or replaced leaves memory, pinned adapters are read again. Requests look at
        their own adapter anyway."""
        for name in list(self._versions):
            if self.shelf.place(name) is None:
                self._leave(name)
                continue
            try:
                self._entry(name)
            except SmidgenError:
                self._leave(name)
        for name in list(self.memory.pins):
            if self.shelf.place(name) is not None:
                self.load(name)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def generate(self, request: TextRequest) -> Handle[TextResult]:
        """Text; events are TextPieces, then the TextResult.

        Raises:
            UnknownAdapterError: a name that is neither an adapter nor a base.
            BusyError, ClosedError: too many requests wait, or the library is closed.
            ConfigError: a value out of range, or an adapter of another task.
            DataError: a prompt that the model cannot read.
            SmidgenError: an adapter that is refused.
        """
        return self._submit("generate", request)

    def draw(self, request: ImageRequest) -> Handle[ImageResult]:
        """An image; events are Progress after each step, then the ImageResult. Errors as of :meth:`generate`."""
        return self._submit("draw", request)

    def classify(self, request: ClassifyRequest) -> Handle[Classification]:
        """A class, by an adapter with a head. Errors as of :meth:`generate`."""
        return self._submit("classify", request)

    def embed(self, request: EmbedRequest) -> Handle[Embedding]:
        """A vector. Errors as of :meth:`generate`."""
        return self._submit("embed", request)

    def generate_all(self, requests: Sequence[TextRequest]) -> list[TextResult]:
        """Waits for all answers, computed in as few batches as may be; any number of requests."""
        return self._all("generate", requests)

    def draw_all(self, requests: Sequence[ImageRequest]) -> list[ImageResult]:
        """As :meth:`generate_all`."""
        return self._all("draw", requests)

    def classify_all(self, requests: Sequence[ClassifyRequest]) -> list[Classification]:
        """As :meth:`generate_all`."""
        return self._all("classify", requests)

    def embed_all(self, requests: Sequence[EmbedRequest]) -> list[Embedding]:
        """As :meth:`generate_all`."""
        return self._all("embed", requests)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """What it did and holds, for metrics."""
        hosts = list(self._hosts.values())
        batches = [batch for host in hosts for batch in list(host.batches.values())]
        return Counters(
            queued=sum(host.waiting for host in hosts),
            active=sum(host.active for host in hosts),
            resident=len(self.memory),
            resident_bytes=self.memory.bytes,
            requests=dict(self._requests),
            tokens=sum(getattr(batch, "tokens", 0) for batch in batches),
            images=sum(getattr(batch, "images", 0) for batch in batches),
            steps=sum(batch.steps for batch in batches),
            loads=self.memory.loads,
            evictions=self.memory.evictions,
        )

    @property
    def alive(self) -> bool:
        """Whether no worker has died; the next request starts a new one."""
        return not self._closed and all(host.alive for host in list(self._hosts.values()))

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, ends those that there are (waiting ``timeout`` seconds for them, None: for ever; the rest
        end in a ClosedError) and frees the bases."""
        with self._lock:
            self._closed = True
            hosts = list(self._hosts.values())
        until = None if timeout is None else monotonic() + timeout
        for host in hosts:
            host.close(None if until is None else max(0.0, until - monotonic()))

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(0.0)

    # ---- who answers -------------------------------------------------------------------------------------------------

    def _submit(self, verb: str, request: Any, wait: bool = False) -> Handle[Any]:
        if self._closed:
            raise ClosedError("The library is closed.")
        base, entries = self._resolve(request.model)
        self._check_tasks(verb, base, entries)
        host = self._host(base, verb, entries)
        job = Job(verb, request, entries, host.prepare(verb, request, entries))
        host.submit(job, wait)
        self._requests[verb] += 1
        return job.handle

    def _all(self, verb: str, requests: Sequence[Any]) -> list[Any]:
        handles: list[Handle[Any]] = []
        try:
            for request in requests:
                handles.append(self._submit(verb, request, wait=True))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def _resolve(self, model: Model) -> tuple[str, Entries]:
        """The base of a model, and its adapters with their weights; () is the base itself."""
        if isinstance(model, str) and model in self._bases:
            return model, ()
        if isinstance(model, str):
            entries: Entries = ((self._entry(model), 1.0),)
        else:
            if not isinstance(model, Mapping) or not model:
                raise ConfigError(f"A model is a name, or adapters with the weight of each; not {shown(model)}.")
            for name, weight in model.items():
                check_request(strength=weight)
                if name in self._bases:
                    raise ConfigError(f"{name!r} is a base, which has no weight; leave it out, or name it alone.")
            entries = tuple((self._entry(name), float(weight)) for name, weight in model.items())
        return self._base_of(entries), entries

    def _entry(self, name: str) -> Entry:
        """What is at a name now; an older version leaves memory once no request needs it."""
        self.check(name)
        if name in self._bases:
            raise ConfigError(f"{name!r} is a base, not an adapter.")
        entry = self.shelf.entry(name)
        before = self._versions.get(name)
        if before != entry.fingerprint:
            self._versions[name] = entry.fingerprint
            if before is not None:
                self.memory.unload(name, before)
        return entry

    def _leave(self, name: str) -> None:
        before = self._versions.pop(name, None)
        self.shelf.forget(name)
        if before is not None:
            self.memory.unload(name, before)

    def _base_of(self, entries: Entries) -> str:
        """The one base of adapters, which is served."""
        first = entries[0][0]
        for entry, _ in entries:
            if self._open:
                self._add_base(entry)
            if entry.base not in self._bases:
                known = ", ".join(self._bases) or "none"
                raise ConfigError(
                    f"The adapter {entry.name!r} is for the base {entry.base or 'nobody named'!r}, and those served are: {known}."
                )
            if entry.base != first.base:
                raise ConfigError(
                    f"{first.name!r} is for {first.base}, and {entry.name!r} for {entry.base}: adapters of one base add up."
                )
        return first.base

    def _add_base(self, entry: Entry) -> None:
        if entry.base and entry.base not in self._bases:
            found = abilities(entry.origin.base)
            with self._lock:
                self._abilities[entry.base] = found
                self._bases[entry.base] = entry.origin.base

    def _check_tasks(self, verb: str, base: str, entries: Entries) -> None:
        """Refuses adapters, or a base, that do something else."""
        for entry, _ in entries:
            task = entry.origin.task
            does = {"instruction": "generate or embed", "text-to-image": "draw"}.get(task, "classify")
            does = "classify or embed" if task == "text-classification" else does
            fits = {
                "generate": task == "instruction",
                "draw": task == "text-to-image",
                "classify": task.endswith("classification"),
                "embed": task in ("instruction", "text-classification"),
            }[verb]
            if not fits:
                raise ConfigError(f"The adapter {entry.name!r} is for {task}: ask it to {does}, not to {verb}.")
        if not entries and verb not in self._abilities[base]:
            able = " or ".join(self._abilities[base]) or "nothing without an adapter"
            why = "needs an adapter with a head" if verb == "classify" else f"is not what it does ({able})"
            raise ConfigError(f"The base {base!r} cannot {verb}: that {why}.")

    def _host_of(self, entry: Entry) -> Host:
        """The host that an adapter goes into."""
        verb = {"instruction": "generate", "text-to-image": "draw"}.get(entry.origin.task, "classify")
        entries = ((entry, 1.0),)
        return self._host(self._base_of(entries), verb, entries)

    def _host(self, base: str, verb: str, entries: Entries) -> Host:
        """The host of a base for requests of a verb with these adapters, which is made when it is first needed."""
        given, options = self._bases[base], (self.memory, *self._options)
        task = entries[0][0].origin.task if entries else ""
        with self._lock:
            if self._closed:
                raise ClosedError("The library is closed.")
            if verb == "draw":
                return self._hosts.setdefault((base, "draw"), ImageHost(given, *options))
            if verb == "generate" or ("generate" in self._abilities[base] and not task.endswith("classification")):
                if (base, "generate") not in self._hosts:
                    self._hosts[base, "generate"] = LanguageHost(given, *options)
                return self._hosts[base, "generate"]
            task = task or "text-classification"
            head = next((entry.origin.head for entry, _ in entries if entry.origin.head is not None), None)
            kind = None if head is None else (max(1, len(head.labels)), head.problem_type)
            if not entries:  # any will do
                there = next((host for key, host in self._hosts.items() if key[:2] == (base, task)), None)
                if there is not None:
                    return there
            key = (base, task, kind)
            if key not in self._hosts:
                weights = self._weights.setdefault((base, task), {})
                self._hosts[key] = EncoderHost(given, *options, task=task, head=head or ANY, weights=weights)
            return self._hosts[key]
