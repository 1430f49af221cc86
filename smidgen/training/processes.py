"""accelerate, set up for one run, and what its processes must agree on."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smidgen.errors import ConfigError, MissingExtraError

TRACKERS = {"tensorboard": "smidgen[track]", "trackio": "smidgen[track]", "wandb": "wandb", "comet_ml": "comet_ml"}


def make_accelerator(folder: Path, precision: str, accumulation: int, tracker: str) -> Any:
    """An Accelerator in ``precision`` whose ``tracker`` (or ``none``) writes below ``folder``.

    Raises MissingExtraError for a package that is not there, ConfigError for a precision this machine has not.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
    except ImportError as error:
        raise MissingExtraError("Training needs accelerate: pip install 'smidgen[diffusion]'") from error
    _check_tracker(tracker)
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # frozen factors are buffers
            log_with=None if tracker == "none" else tracker,
            project_dir=str(folder),
        )
        if precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("fp16 has no arithmetic on a CPU")
    except ValueError as error:
        raise ConfigError(f"--mixed-precision {precision} cannot be used here: {error}") from error
    if tracker != "none":
        accelerator.init_trackers("smidgen")
    return accelerator


def is_main() -> bool:
    """Is this the process that writes files? True outside ``accelerate launch``."""
    return int(os.environ.get("RANK", "0")) == 0


def gathered(accelerator: Any, values: Sequence[float]) -> list[list[float]]:
    """``values`` of every process, in the order of processes: the same answer everywhere."""
    if accelerator.num_processes == 1:
        return [list(values)]
    mine = torch.tensor([list(values)], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(mine).tolist()


def from_main(accelerator: Any, value: Any) -> Any:
    """The main process's ``value``, on every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _check_tracker(tracker: str) -> None:
    """accelerate passes over a tracker that is not installed in silence; a run that was to be tracked must not."""
    from accelerate.tracking import get_available_trackers

    if tracker != "none" and tracker not in {str(found) for found in get_available_trackers()}:
        raise MissingExtraError(f"--report-to {tracker} needs it: pip install '{TRACKERS[tracker]}'")
