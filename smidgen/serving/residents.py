"""Adapters in memory: on a model, a bank for each config, whose members are versions of adapters by their fingerprints; and,
for all models together, which of them may stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from smidgen.adapters.api import load_parts, set_active
from smidgen.adapters.bank import Bank, MisfitError
from smidgen.adapters.tuner.injection import remove
from smidgen.adapters.verify import verify
from smidgen.errors import AdapterFileError, SmidgenError
from smidgen.serving.requests import BusyError, ReplacedError
from smidgen.serving.shelf import Entry

Row = tuple[tuple[str, float], ...]  # fingerprint and weight of each adapter of a row; () is the base
CONFIGS = 32  # banks on one model at most: each has frozen factors of its own


class Residents:
    """The adapters on one model. What changes them is called between two steps of the model, by the thread that makes these;
    :meth:`drop` by any thread, of what no step needs.

    Args:
        model: what adapters sit on, frozen and in evaluation.
        whole: the pipeline that it belongs to, if any.
    """

    def __init__(self, model: nn.Module, whole: Any = None) -> None:
        self.model, self._whole = model, model if whole is None else whole
        self._lock = threading.RLock()
        self._banks: dict[str, Bank] = {}  # by the adapter that each was made with
        self._labels: dict[str, str] = {}  # structure of a config -> whose bank
        self._where: dict[str, str] = {}  # fingerprint -> whose bank
        self._made = 0

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._where

    def __len__(self) -> int:
        return len(self._where)

    @property
    def bytes(self) -> int:
        """Of the numbers of all banks, free places included, frozen factors not."""
        return sum(4 * p.numel() for bank in list(self._banks.values()) for p in bank.parameters())

    def put(self, entry: Entry) -> None:
        """Puts an adapter into the bank of its config. The first of a config is verified on the model, by passes of it; of all
        others the files are, base lock included, and that their own numbers move a layer: they share layers and factors.

        Raises:
            SmidgenError: it is refused; nothing changed.
        """
        with self._lock:
            label = self._labels.get(entry.structure)
            others = [other for other in self._banks if other != label]
            for known in [*([label] if label else []), *others]:
                bank = self._banks[known]
                try:
                    _make_place(bank)
                    bank.put(entry.fingerprint, entry.folder)
                except MisfitError:
                    continue
                try:
                    bank.check(entry.fingerprint)
                except SmidgenError as error:
                    bank.evict(entry.fingerprint)
                    raise AdapterFileError(f"The adapter {entry.name!r} is OFF: {error}") from error
                break
            else:
                known = self._open(entry)
            self._labels[entry.structure], self._where[entry.fingerprint] = known, known

    def _open(self, entry: Entry) -> str:
        """A bank for a new config, with the adapter in it."""
        self._close_empty()
        self._made += 1
        label = f"serving{self._made}"
        load_parts([(self.model, entry.folder)], label)
        try:
            report = verify(self._whole, entry.folder)
            if not report.ok:
                raise AdapterFileError(f"The adapter {entry.name!r} is {report.verdict}: {' '.join(report.reasons)}")
            configs: Any = self.model.peft_config
            bank = Bank(self.model, configs[label], adapter_name=label)
            bank.put(entry.fingerprint, entry.folder)
        except BaseException:
            remove(self.model, label)
            raise
        finally:
            self._rest()
        self._banks[label] = bank
        return label

    def _rest(self) -> None:
        """No adapter is active, all parameters are frozen."""
        if hasattr(self.model, "peft_config"):
            set_active(self.model, [])
        self.model.requires_grad_(False)
        self.model.eval()

    def _close_empty(self) -> None:
        """Closes the oldest bank that nobody is in, where there are as many as may be."""
        if len(self._banks) < CONFIGS:
            return
        empty = next((label for label, bank in self._banks.items() if not bank.names), None)
        if empty is None:
            raise BusyError(
                f"Adapters of {CONFIGS} configs are in memory, which is the most a base serves at once; unload some, or "
                "train with fewer different settings."
            )
        self._banks.pop(empty).remove()
        remove(self.model, empty)
        self._labels = {key: label for key, label in self._labels.items() if label != empty}
        self._rest()

    def drop(self, fingerprint: str) -> None:
        """Forgets an adapter that no running step needs."""
        with self._lock:
            label = self._where.pop(fingerprint, None)
            if label is not None:
                self._banks[label].evict(fingerprint)

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[None]:
        """Within, row i of the model's batch goes through the adapters ``rows[i]``."""
        with ExitStack() as stack:
            with self._lock:
                for label, bank in self._banks.items():
                    own = [[pair for pair in row if self._where[pair[0]] == label] for row in rows]
                    names = [tuple(name for name, _ in row) for row in own]
                    stack.enter_context(bank.rows(names, weights=[[weight for _, weight in row] for row in own]))
            yield


def _make_place(bank: Bank) -> None:
    """Room for one more member, little more than is needed: places cost what members cost."""
    members = bank.count
    if members == bank.size or (bank.size > 2 * members + 64 and not bank.in_use):
        bank.resize(members + max(8, members // 16))


@dataclass
class Held:
    """A resident adapter: where, how large, by which names, in how many requests, and whether it is to go."""

    residents: Residents
    bytes: int
    names: set[str]
    uses: int = 1
    leaving: bool = False


class Memory:
    """What is resident on all models, within ``budget`` bytes: the least recently used that no request needs leave first, but
    for those whose names are in ``pins``."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pins: set[str] = set()
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._bytes = 0
        self.loads = self.evictions = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._held

    def hold(self, residents: Residents, entry: Entry) -> None:
        """Has an adapter in memory, for one request more; called by the thread that runs its model.

        Raises:
            BusyError: others that are needed fill the budget.
            SmidgenError: it is refused, or its files are no longer those of ``entry``.
        """
        with self._lock:
            held = self._held.get(entry.fingerprint)
            if held is not None:
                held.uses += 1
                held.names.add(entry.name)
                held.leaving = False
                self._held.move_to_end(entry.fingerprint)
                return
            self._make_room(entry)
            self._held[entry.fingerprint] = Held(residents, entry.bytes, {entry.name})
            self._bytes += entry.bytes
        try:
            check_unchanged(entry)
            residents.put(entry)
            check_unchanged(entry)
        except BaseException:
            with self._lock:
                self._drop(entry.fingerprint)
            raise
        self.loads += 1

    def _make_room(self, entry: Entry) -> None:
        free = self.budget - self._bytes
        if free >= entry.bytes:
            return
        idle = [name for name, held in self._held.items() if not held.uses and not held.names & self.pins]
        if free + sum(self._held[name].bytes for name in idle) < entry.bytes:
            raise BusyError(
                f"The adapter {entry.name!r} needs {entry.bytes:,} bytes, and of the {self.budget:,} for adapters all but "
                f"{max(0, free):,} are pinned or in use."
            )
        for name in idle:
            if free >= entry.bytes:
                return
            free += self._held[name].bytes
            self._drop(name)
            self.evictions += 1

    def release(self, fingerprint: str) -> None:
        """One request less needs it."""
        with self._lock:
            held = self._held.get(fingerprint)
            if held is None:
                return
            held.uses -= 1
            if held.leaving and not held.uses:
                self._drop(fingerprint)

    def unload(self, name: str, fingerprint: str) -> bool:
        """Has a version of an adapter leave memory as soon as no request needs it, unless it has other names; whether it was
        there."""
        with self._lock:
            held = self._held.get(fingerprint)
            if held is None:
                return False
            held.names.discard(name)
            held.leaving = not held.names
            if held.leaving and not held.uses:
                self._drop(fingerprint)
            return True

    def _drop(self, fingerprint: str) -> None:
        held = self._held.pop(fingerprint)
        self._bytes -= held.bytes
        held.residents.drop(fingerprint)

    @property
    def busy(self) -> bool:
        """Whether some request needs an adapter now, so that room may come."""
        return any(held.uses for held in list(self._held.values()))


def check_unchanged(entry: Entry) -> None:
    """Refuses a version of an adapter whose files are gone."""
    if not entry.unchanged():
        raise ReplacedError(
            f"The files of the adapter {entry.name!r} were replaced or deleted while the request waited; make it again."
        )
