"""Atomic checkpoints of a training run: ``checkpoint-<step>/`` holds safetensors and JSON, never a pickle.

A checkpoint is written to a hidden folder, flushed to the disk and renamed, so under its final name it is always
whole. It carries the trained tensors, the optimizer's state, the step, and the *identity* of the run: the settings
that decide its numbers. Random numbers need no state, as they follow from (seed, step); see ``randomness.py``.

    trained.safetensors      the trained parameters by name, in their own dtype
    optimizer.safetensors    the optimizer's tensors as ``<parameter>::<key>``
    state.json               step, identity, losses, evaluations, seconds, size and SHA-256 of the two files above
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from smidgen.adapters.atomic import flush, write_file
from smidgen.errors import CheckpointError, did_you_mean

logger = logging.getLogger(__name__)

FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """All of a run at the end of ``step``. ``trained`` and ``optimizer`` are CPU tensors by name."""

    step: int
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    identity: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    scaler: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class CheckpointStore:
    """The checkpoints of one run folder, newest last.

    Example:
        >>> store = CheckpointStore(tmp_path, keep=2)
        >>> store.write(Checkpoint(5, {"w": torch.ones(2)}, {}, {"seed": 0}))
        >>> store.latest({"seed": 0}).step
        5
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"At least one checkpoint must be kept, not {keep}.")
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, whole or damaged, in ascending order."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("checkpoint-*"))
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def write(self, checkpoint: Checkpoint, spare: Collection[int] = ()) -> Path:
        """Write atomically, then drop all but the newest ``keep`` and the steps to ``spare``. A full disk leaves the
        earlier checkpoints as they were."""
        self.sweep()
        hidden = self.folder / f".checkpoint-{checkpoint.step}.tmp"
        try:
            hidden.mkdir(parents=True)
            _write_files(checkpoint, hidden)
            self._move_in(hidden, self.path(checkpoint.step))
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise self._write_error(checkpoint.step, error) from error
        for step in self.steps()[: -self.keep]:
            if step not in spare:
                self._discard(self.path(step))
        return self.path(checkpoint.step)

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``; CheckpointError says what is damaged."""
        return read_checkpoint(self.path(step))

    def latest(self, identity: Mapping[str, Any] | None = None) -> Checkpoint | None:
        """The newest whole checkpoint, passing damaged ones with a warning; None when there is none to read.

        Raises CheckpointError when its identity differs, naming each differing key, and when every checkpoint is
        damaged.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self.read(step)
            except CheckpointError as error:
                damage.append(str(error))
                logger.warning("%s Falling back to the checkpoint before.", error)
                continue
            if identity is not None:
                check_identity(checkpoint.identity, identity, self.path(step))
            return checkpoint
        if damage:
            raise CheckpointError(f"No whole checkpoint is left in {self.folder}: {' '.join(damage)}")
        return None

    def sweep(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        for pattern in (".checkpoint-*.tmp", ".checkpoint-*.old"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove every checkpoint of this folder."""
        self.sweep()
        for step in self.steps():
            self._discard(self.path(step))

    def _move_in(self, hidden: Path, final: Path) -> None:
        if final.exists():  # a damaged one that was passed over: rename cannot replace a folder that has files
            self._discard(final)
        os.rename(hidden, final)
        flush(self.folder)

    def _discard(self, path: Path) -> None:
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)

    def _write_error(self, step: int, error: OSError) -> CheckpointError:
        kept = self.steps()
        last = f"{self.path(kept[-1])} is intact" if kept else "no earlier checkpoint exists"
        cause = "the disk is full" if error.errno in _FULL else f"the system says: {error.strerror or error}"
        with contextlib.suppress(OSError):
            cause += f" ({shutil.disk_usage(self.folder).free // 1024} kB free)"
        return CheckpointError(
            f"Checkpoint of step {step} could not be written to {self.folder}: {cause}. {last[0].upper()}{last[1:]}; "
            "make room and run the same command with --resume-from-checkpoint latest."
        )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check one checkpoint folder. CheckpointError names the folder and the damage."""
    path = Path(path)
    try:
        state = json.loads((path / "state.json").read_text())
        seal = state.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: state.json cannot be read ({error}).") from error
    if seal != _seal(state):
        raise CheckpointError(f"{path} is damaged: state.json was changed after it was written.")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}; this version of smidgen reads format {FORMAT}.")
    tensors = {
        name: load(_checked_bytes(path / f"{name}.safetensors", state["files"])) for name in ("trained", "optimizer")
    }
    keys = ("step", "identity", "losses", "seconds", "scaler", "evaluations")
    return Checkpoint(trained=tensors["trained"], optimizer=tensors["optimizer"], **{key: state[key] for key in keys})


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume when a setting that decides the numbers has changed. Both are compared as JSON would store
    them; a setting that came after a run was begun and is None now is what it was."""
    found, wanted = json.loads(json.dumps(found)), json.loads(json.dumps(wanted))
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing:
        lines = "; ".join(
            f"{key}: {found.get(key, 'absent')!r} then, {wanted.get(key, 'absent')!r} now" for key in differing
        )
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({lines}). Resume with the settings of that run, or choose "
            "another --out folder."
        )


def resolve(folder: str | Path, resume: str | None, keep: int, identity: Mapping[str, Any]) -> Checkpoint | None:
    """What ``--resume-from-checkpoint`` names: None, ``latest``, or a ``checkpoint-<step>`` name or path."""
    store = CheckpointStore(folder, keep)
    store.sweep()
    if resume is None:
        return None
    if resume == "latest":
        return store.latest(identity)
    path = Path(resume) if Path(resume).is_dir() else Path(folder) / resume
    if not path.is_dir():
        known = [f"checkpoint-{step}" for step in store.steps()]
        hint = did_you_mean(path.name, known) or f" There are: {', '.join(known) or 'none'}."
        raise CheckpointError(f"There is no checkpoint {resume!r} in {folder}.{hint}")
    checkpoint = read_checkpoint(path)
    check_identity(checkpoint.identity, identity, path)
    return checkpoint


def _write_files(checkpoint: Checkpoint, folder: Path) -> None:
    contents = {f"{name}.safetensors": save(_plain(getattr(checkpoint, name))) for name in ("trained", "optimizer")}
    state = {key: value for key, value in _fields(checkpoint).items() if key not in ("trained", "optimizer")}
    state |= {"format": FORMAT, "files": {name: _digest(content) for name, content in contents.items()}}
    state["seal"] = _seal(state)
    contents["state.json"] = json.dumps(state, indent=1).encode()
    for name, content in contents.items():
        write_file(folder / name, content)
    flush(folder)


def _fields(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _seal(state: Mapping[str, Any]) -> str:
    canonical = json.dumps(json.loads(json.dumps(state)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _checked_bytes(path: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} cannot be read ({error.strerror}).") from error
    if _digest(content) != expected.get(path.name):
        raise CheckpointError(
            f"{path.parent} is damaged: {path.name} has {len(content)} bytes that are not those written."
        )
    return content
