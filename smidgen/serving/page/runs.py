"""Runs on the disk: a folder each, which alone says how the run stands. Training is a child process of the command line, so it
outlives a closed tab, a reload and the server itself.

    ann/pictures/            what it learns from
    ann/page.json            what it is: kind, title, where it came from, how many steps
    ann/asked.yaml           the settings of its command
    ann/process.json         the last child: its number, and when it began
    ann/log.txt              what the child said
    ann/progress.jsonl, preview-100.png, checkpoint-100/, adapter_config.json, report.json, ...    what the command writes
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from smidgen.adapters.export import size
from smidgen.errors import ConfigError, SmidgenError
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.progress import NAME as PROGRESS
from smidgen.training.progress import read_progress
from smidgen.training.settings import dump_yaml

ASKED, SETTINGS, PROCESS, LOG, REPORT = "page.json", "asked.yaml", "process.json", "log.txt", "report.json"
STARTING, TRAINING, FINISHING, DONE, STOPPED, FAILED = "starting", "training", "finishing", "done", "stopped", "failed"
AT_WORK = (STARTING, TRAINING, FINISHING)
COMMANDS = {
    "personalize": ("personalize",),
    "text-classification": ("train", "text-classification"),
}  # of kinds that a child makes
RECENT = 20  # steps that the speed is taken from
_children: list[subprocess.Popen[bytes]] = []  # to be waited for, or they stay in the system's table


@dataclass(frozen=True)
class Status:
    """How a run stands: ``words`` say it, ``losses`` are those of the steps done, ``seconds_left`` a guess."""

    state: str
    words: str
    step: int = 0
    total: int = 0
    losses: tuple[float, ...] = field(default=(), repr=False)
    seconds_left: float | None = None
    preview: Path | None = None

    @property
    def at_work(self) -> bool:
        return self.state in AT_WORK


@dataclass(frozen=True)
class Run:
    """One folder of runs. ``kind`` is ``personalize``, ``text-classification``, ``predict``, ``edit``, ``blend``, or "" for what
    the command line made on its own."""

    folder: Path
    kind: str
    title: str
    about: str = ""  # what it came from
    steps: int = 0  # of its training

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def finished(self) -> bool:
        """There is an adapter to use, and nobody is writing it."""
        there = (self.folder / CONFIG_NAME).is_file() and (self.folder / WEIGHTS_NAME).is_file()
        return there and (self.kind not in COMMANDS or (self.folder / REPORT).is_file())

    @property
    def when(self) -> float:
        """Seconds since 1970 of the last thing that happened."""
        files = [self.folder / name for name in (ASKED, PROCESS, CONFIG_NAME, REPORT)]
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    def bytes(self) -> int:
        """What the adapter's two files take."""
        files = [self.folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
        return sum(file.stat().st_size for file in files if file.is_file())

    def status(self) -> Status:
        """How it stands now, read from its folder."""
        rows, since = read_progress(self.folder), began(self.folder)
        losses = tuple(row["loss"] for row in rows.values() if "loss" in row)
        known: dict[str, Any] = {"losses": losses, "preview": self.sheet()}
        if self.finished and (self.kind not in COMMANDS or not _alive(self.folder)):
            return Status(DONE, f"{size(self.bytes())}, kept in {self.folder}.", **known)
        if self.kind not in COMMANDS:
            return Status(FAILED, f"{self.folder} holds no adapter.")
        known |= {"step": max(rows, default=0), "total": self.steps}
        if not _alive(self.folder):
            state, words = self._ended()
            return Status(state, words, **known)
        times = [row["time"] for row in rows.values() if row["time"] >= since]
        if not times:
            return Status(STARTING, "Reading the data and the base. The first step follows in a few seconds.", **known)
        if known["step"] >= known["total"]:
            return Status(FINISHING, "All steps are done. Now the file is proved on a fresh base and used.", **known)
        steps = [later - earlier for earlier, later in pairwise(times[-RECENT:])]
        left = statistics.median(steps) * (known["total"] - known["step"]) if steps else None
        return Status(TRAINING, "Learning.", seconds_left=left, **known)

    def sheet(self) -> Path | None:
        """The newest picture of how it does: the contact sheet at the end, the last preview before."""
        if (self.folder / "contact_sheet.png").is_file():
            return self.folder / "contact_sheet.png"
        found = {int(path.stem[8:]): path for path in self.folder.glob("preview-*.png") if path.stem[8:].isdigit()}
        return found[max(found)] if found else None

    def stop(self) -> None:
        """Ask the child to end; while it trains it writes a checkpoint first."""
        process = _process(self.folder)
        if process is None:
            raise ConfigError(f"{self.title} is not at work, so there is nothing to stop.")
        replace_file(
            self.folder / PROCESS, json.dumps(_known(self.folder) | {"stopped": True})
        )  # it may be too young to say so
        process.terminate()

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint, from the beginning where there is none."""
        if self.kind not in COMMANDS:
            raise ConfigError(f"{self.title} was not trained here, so there is nothing to resume.")
        if self.status().at_work or self.finished:
            raise ConfigError(
                f"{self.title} is {'at work' if self.status().at_work else 'finished'}: there is nothing to resume."
            )
        _check_idle(folder)
        _spawn(self)

    def _ended(self) -> tuple[str, str]:
        """How a child that is gone ended: its own last sentence."""
        said = _said(self.folder)
        steps = CheckpointStore(self.folder).steps()
        kept = f"Step {steps[-1]} is kept: resume goes on from there." if steps else "Nothing was kept yet."
        if _known(self.folder).get("stopped") or "topped by SIG" in said:
            return STOPPED, f"Stopped. {kept}"
        if not said:
            return FAILED, f"It ended without a word, as when the machine runs out of memory or is switched off. {kept}"
        return FAILED, f"{said} {kept if steps else ''}".strip()


def list_runs(folder: Path) -> list[Run]:
    """All runs in ``folder``, the newest first; adapters that the command line wrote there are among them."""
    if not folder.is_dir():
        return []
    found = [read_run(path) for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted((run for run in found if run is not None), key=lambda run: -run.when)


def read_run(path: Path) -> Run | None:
    """The run in a folder, None where there is none."""
    try:
        asked = json.loads((path / ASKED).read_text(encoding="utf-8"))
        return Run(path, str(asked["kind"]), str(asked["title"]), str(asked["about"]), int(asked["steps"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Run(path, "", path.name) if (path / CONFIG_NAME).is_file() else None


def find(folder: Path, name: str | None) -> Run:
    """The run called ``name``.

    Raises:
        ConfigError: it is gone, or none was chosen.
    """
    run = read_run(folder / name) if name and Path(name).name == name else None
    if run is None:
        raise ConfigError(f"There is no run {name!r} any more." if name else "Choose one first.")
    return run


def new_run(folder: Path, title: str) -> Path:
    """A new folder whose name is made of ``title``: ann, ann-2, ann-3.

    Raises:
        ConfigError: the title is empty, or nothing can be written.
    """
    slug = re.sub(r"[^\w]+", "-", title.strip().lower()).strip("-")[:40]
    if not slug:
        raise ConfigError("Give it a name first: letters or digits, such as Ann.")
    for number in range(1, 10_000):
        path = folder / (slug if number == 1 else f"{slug}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"Nothing can be written to {folder} ({error.strerror}).") from error
        return path
    raise ConfigError(f"There are too many runs called {title!r}; choose another name.")


def note(path: Path, kind: str, title: str, about: str = "", steps: int = 0) -> Run:
    """Write down what a run is."""
    run = Run(path, kind, title.strip(), about, steps)
    known = {"kind": run.kind, "title": run.title, "about": run.about, "steps": run.steps}
    replace_file(path / ASKED, json.dumps(known, indent=1))
    return run


def start(folder: Path, path: Path, kind: str, title: str, config: Any, about: str = "") -> Run:
    """Start the command of ``kind`` with these settings as a child that writes to ``path``.

    Raises:
        ConfigError: another run is at work; one at a time has the machine.
    """
    _check_idle(folder)
    train = replace(config.train, report_to="jsonl")
    config = replace(config, out=path, train=train, resume_from_checkpoint=None, overwrite=False)
    replace_file(path / SETTINGS, dump_yaml(config))
    run = note(path, kind, title, about, train.max_train_steps)
    _spawn(run)
    return run


def at_work(folder: Path) -> Run | None:
    """The run that is being trained."""
    return next((run for run in list_runs(folder) if run.kind in COMMANDS and _alive(run.folder)), None)


def scratch(folder: Path) -> Path:
    """A hidden folder for what is only tried; those of two days ago are taken away."""
    tries = folder / ".tries"
    for old in tries.iterdir() if tries.is_dir() else ():
        if time.time() - old.stat().st_mtime > 2 * 86400:
            shutil.rmtree(old, ignore_errors=True)
    return tries / uuid.uuid4().hex


def discard(path: Path) -> None:
    """Take away a run's folder that came to nothing."""
    shutil.rmtree(path, ignore_errors=True)


def _check_idle(folder: Path) -> None:
    busy = at_work(folder)
    if busy is not None:
        raise ConfigError(
            f"{busy.title} is being trained, and one run at a time has the machine. Wait, or stop it first."
        )


def _spawn(run: Run) -> None:
    """The child of a run: from its last checkpoint where it has one."""
    path = run.folder
    words = [*COMMANDS[run.kind], "--config", str(path / SETTINGS)]
    if CheckpointStore(path).steps():
        words += ["--resume-from-checkpoint", "latest"]
    else:
        (path / PROGRESS).unlink(missing_ok=True)
    with (path / LOG).open("wb") as log:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "smidgen.cli", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise SmidgenError(f"No process could be started ({error.strerror}).") from error
    _children.append(child)
    replace_file(path / PROCESS, json.dumps({"pid": child.pid, "created": psutil.Process(child.pid).create_time()}))


def _known(path: Path) -> dict[str, Any]:
    """What is written down of a folder's last child, {} where there was none."""
    try:
        known = json.loads((path / PROCESS).read_text(encoding="utf-8"))
        return {"pid": int(known["pid"]), "created": float(known["created"]), "stopped": bool(known.get("stopped"))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _process(path: Path) -> psutil.Process | None:
    """The child that works in a folder, None when it is gone: numbers of processes are given out again, so its time must fit."""
    for child in _children[:]:
        if child.poll() is not None:
            _children.remove(child)
    known = _known(path)
    if not known:
        return None
    try:
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None
    except psutil.Error:
        return None


def _alive(path: Path) -> bool:
    return _process(path) is not None


def began(path: Path) -> float:
    """When the last child began, in seconds since 1970; 0 where none did."""
    return float(_known(path).get("created", 0.0))


def _said(path: Path) -> str:
    """The sentence that a command ended with, "" without one."""
    try:
        lines = (path / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    own = [line.removeprefix("smidgen: ").strip() for line in lines if line.startswith("smidgen: ")]
    return own[-1] if own else ""
