"""A run's progress as a file that anybody may watch: ``progress.jsonl``, a line for each step.

    {"step": 12, "time": 1732697000.1, "loss": 0.071, "lr": 0.001}

``time`` is seconds since 1970. A resumed run writes on below; of several lines about a step the last one counts.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

NAME = "progress.jsonl"


class ProgressFile(GeneralTracker):
    """accelerate's tracker for ``--report-to jsonl``."""

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / NAME

    @property
    def tracker(self) -> Path:
        """What is written to."""
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The settings are in ``config.yaml`` already."""

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """One line, whole or not there as far as a reader can tell: it is written in one piece."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")


def read_progress(folder: Path) -> dict[int, dict[str, Any]]:
    """What is known of each step, in order; steps that a resumed run took back are gone. {} where nothing was written."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):  # a line that a killed run left half written
            continue
        for later in [known for known in found if known > step]:
            del found[later]
        found[step] = {**found.get(step, {}), **row}
    return found
