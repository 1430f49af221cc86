"""A worker of pytest-xdist that dies takes one test with it: that test, and only that, runs once more.

Once in several runs a process dies inside a C library, never twice in one place. A test that kills its worker twice
has failed, and so has, at once, every test whose assertion failed. Traces of the dead stay in ``build/crashes``.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("build/crashes")


class Fence:
    """For the process that hands out the tests."""

    def __init__(self) -> None:
        self.died: dict[str, int] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any, sched: Any) -> None:
        self.died[crashitem] = self.died.get(crashitem, 0) + 1
        if self.died[crashitem] == 1:
            report.outcome = "rerun"
            sched.mark_test_pending(crashitem)

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        return ("rerun", "R", "RERUN") if report.outcome == "rerun" else None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for test, times in self.died.items():
            terminalreporter.write_line(f"died with its worker, {times} x: {test} (traces: {FOLDER}/)")


class Recorder:
    """For a worker: where its threads were when it died. A file that stays empty goes."""

    def __init__(self, root: Path, worker: str) -> None:
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        self.path = root / FOLDER / f"{worker}.txt"
        self.file = self.path.open("a")
        faulthandler.enable(self.file)

    def pytest_unconfigure(self) -> None:
        faulthandler.disable()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


@pytest.hookimpl(trylast=True)  # after pytest has pointed faulthandler at stderr
def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is None:
        config.pluginmanager.register(Fence())
    else:
        name = f"{worker['testrunuid'][:8]}-{worker['workerid']}"
        config.pluginmanager.register(Recorder(config.rootpath, name))
