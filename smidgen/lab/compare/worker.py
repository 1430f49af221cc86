"""A worker process of a comparison: ``python -m smidgen.lab.compare.worker STAGE FOLDER``, the experiment on stdin."""

import logging
import os
import sys
from pathlib import Path

from smidgen.lab.compare.cells import Cell, Cells, Record
from smidgen.lab.compare.fresh import experiment_here, one_thread
from smidgen.lab.compare.run import work_on
from smidgen.lab.compare.trainer import Trainer
from smidgen.training.interrupts import TrainingInterrupted


def main(stage: str, folder: str) -> int:
    """Do what nobody else is doing of a stage; returns the exit status."""
    experiment, parent = experiment_here(), os.getppid()
    trainer = Trainer(experiment)

    def work(cell: Cell) -> Record:
        if os.getppid() != parent:  # whoever started this is gone: nobody waits for the rest
            raise KeyboardInterrupt
        return trainer(cell)

    try:
        work_on(stage, experiment, Cells(Path(folder)), work)
    except (KeyboardInterrupt, TrainingInterrupted):
        return 130
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("smidgen.lab.compare").setLevel(logging.INFO)
    one_thread()
    sys.exit(main(*sys.argv[1:]))
