"""accelerate, set up for one run, and what its processes must agree on."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.adapters.atomic import replace_file
from smidgen.errors import ConfigError, MissingExtraError
from smidgen.training.alone import alone
from smidgen.training.checkpoints import CheckpointStore

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")  # set by accelerate launch
TRACKERS = {"tensorboard": "smidgen[track]", "trackio": "smidgen[track]", "wandb": "wandb", "comet_ml": "comet_ml"}


def make_accelerator(folder: Path, precision: str, accumulation: int, tracker: str) -> Any:
    """An Accelerator in ``precision`` whose ``tracker`` (or ``none``) writes below ``folder``; ``jsonl`` is our own.

    Raises MissingExtraError for a tracker that is not there, ConfigError for a precision this machine has not and
    for a launch that shards the model.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    _check_tracker(tracker)
    _check_whole()
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            cpu=not torch.accelerator.is_available(),  # else accelerate starts no process group on a CPU
            log_with=_tracker(tracker, folder),
            project_dir=str(folder),
        )
        if precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("fp16 has no arithmetic on a CPU")
    except ValueError as error:
        raise ConfigError(f"--mixed-precision {precision} cannot be used here: {error}") from error
    if tracker != "none":
        accelerator.init_trackers("smidgen")
    return accelerator


def prepare(accelerator: Any, model: nn.Module, trained: Sequence[nn.Parameter]) -> nn.Module:
    """``model`` on the accelerator's device and in its precision, with the main process's ``trained`` numbers.

    It is not wrapped: an adapter is so small that its gradients are summed at the end of a step (``sum_gradients``),
    and the task sees the model itself.
    """
    model = accelerator.prepare_model(model, evaluation_mode=True)
    if accelerator.num_processes > 1:
        for parameter in trained:
            torch.distributed.broadcast(parameter.data, src=0)
    return model


def sum_gradients(accelerator: Any, trained: Sequence[nn.Parameter]) -> None:
    """Sum each gradient over the processes. A parameter that had none anywhere has none afterwards."""
    if accelerator.num_processes == 1:
        return
    flags = gathered(accelerator, [float(parameter.grad is not None) for parameter in trained])
    used = [parameter for parameter, *column in zip(trained, *flags, strict=True) if any(column)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for chunk in _chunks(used):
        gradients = [parameter.grad for parameter in chunk if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _chunks(parameters: Sequence[nn.Parameter], most: int = 2**24) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype with about ``most`` numbers together."""
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        if chunk and (chunk[0].dtype != parameter.dtype or sum(p.numel() for p in chunk) + parameter.numel() > most):
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


def num_processes() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Is this the process that writes files? True outside ``accelerate launch``."""
    return process_index() == 0


def process_state() -> Any:
    """accelerate's state of this process. The first one asked for decides: on a machine without an accelerator one that is not told
    so is alone, and several processes would each train on their own."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def wait_for_all() -> None:
    """Lets no process of this run go on before all are here."""
    if num_processes() > 1:
        process_state().wait_for_everyone()


def by_main(write: Callable[[], object]) -> None:
    """Has the main process write files that the others read afterwards."""
    if is_main():
        write()
    wait_for_all()


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


def _tracker(name: str, folder: Path) -> Any:
    if name != "jsonl":
        return None if name == "none" else name
    from smidgen.training.progress import ProgressFile

    return ProgressFile(folder)


def _check_tracker(tracker: str) -> None:
    """accelerate passes over a tracker that is not installed in silence; a run that was to be tracked must not."""
    from accelerate.tracking import get_available_trackers

    if tracker not in ("none", "jsonl") and tracker not in {str(found) for found in get_available_trackers()}:
        raise MissingExtraError(f"--report-to {tracker} needs it: pip install '{TRACKERS[tracker]}'")


def _check_whole() -> None:
    """Sharded trained numbers could be neither saved nor resumed here, and a run must not find that out at its end."""
    for name in SHARDING:
        if os.environ.get(name, "false").lower() in ("1", "true"):
            kind = name.removeprefix("ACCELERATE_USE_")
            raise ConfigError(
                f"This process was launched with {kind}, which shards what is trained. Smidgen's loop keeps the whole model "
                "on each device and sums gradients over processes: launch with docs/accelerate/multi_gpu.yaml instead. "
                "docs/multi_gpu.md says what to do with a base that does not fit."
            )


SETTINGS = (".yaml", ".json", ".jinja")  # endings of what a run writes before its first step


@contextmanager
def run_folder(
    out: Path, resume: str | None, overwrite: bool, *inner: Path, keep: Sequence[str] = ()
) -> Iterator[Path]:
    """The folder of a run, with ``inner`` ones whose checkpoints go with it. When the block is refused before its first
    checkpoint, what it wrote is taken away again, but for the names in ``keep``; the settings of an earlier run are put back.

    Raises:
        ConfigError: another run is at work in it; or an earlier run is in it, and this one is neither to resume nor to
            overwrite it.
    """
    with alone(out), _run_folder(out, resume, overwrite, *inner, keep=keep):
        yield out


@contextmanager
def _run_folder(out: Path, resume: str | None, overwrite: bool, *inner: Path, keep: Sequence[str]) -> Iterator[None]:
    store = CheckpointStore(out)
    if overwrite and not resume:
        if is_main():
            for folder in (out, *inner):
                CheckpointStore(folder).clear()
    elif store.steps() and not resume:
        raise ConfigError(
            f"{out} already holds checkpoint-{store.steps()[-1]}. Go on with --resume-from-checkpoint latest, "
            "start again with --overwrite, or choose another --out."
        )
    steps, settings = store.steps(), {path: path.read_bytes() for path in out.glob("*.*") if path.suffix in SETTINGS}
    there = {*keep, *(path.name for path in out.iterdir())} if out.is_dir() else {*keep}
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_main() and store.steps() == steps:
            for path, content in settings.items():
                replace_file(path, content)
        if is_main() and not any(store.steps()):  # checkpoint-0 is of before any step
            for path in out.iterdir():
                if path.name not in there:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in made:
                with suppress(OSError):  # what is kept, or another's
                    folder.rmdir()
        raise
