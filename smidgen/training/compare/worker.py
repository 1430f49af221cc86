"""A worker process of a comparison: ``python -m smidgen.training.compare.worker STAGE FOLDER``, the experiment on stdin."""

import logging
import sys
from pathlib import Path

from smidgen.training.compare.cells import Cells
from smidgen.training.compare.fresh import experiment_here, one_thread
from smidgen.training.compare.run import work_on

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("smidgen.training.compare").setLevel(logging.INFO)
    one_thread()
    stage, folder = sys.argv[1:]
    work_on(stage, experiment_here(), Cells(Path(folder)))
