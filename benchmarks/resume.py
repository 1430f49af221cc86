"""Kill a personalisation with SIGKILL at random moments and resume it: does it end with the same adapter, bit for bit?

    python -m benchmarks.resume [--times 20] [--seed 0]

Each time a fresh run on a tiny random Stable Diffusion pipeline is killed, every second time in the very moment a
checkpoint is being written, then resumed with ``--resume-from-checkpoint latest`` and compared with a run that was left
alone.
"""

import argparse
import hashlib
import itertools
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Attempt:
    """One killed and resumed run; ``killed_at`` the newest checkpoint then, by the ``clock`` or inside a ``write``."""

    killed_at: int
    kind: str
    killed: bool
    same: bool


def attempts(folder: Path, times: int, seed: int = 0, steps: int = 16) -> list[Attempt]:
    """Kill and resume ``times`` runs below ``folder``; the parent process only imports, forks and kills."""
    _import_everything()
    from tests.training import tiny

    _child(lambda: (tiny.sd_folder(folder / "base"), tiny.pictures(folder / "pictures")))
    started = time.perf_counter()
    _child(lambda: _run(folder, "whole", steps))
    duration = time.perf_counter() - started
    wanted, draw = _digest(folder / "whole"), random.Random(seed)
    return [_attempt(folder, f"run{n}", steps, duration, wanted, draw, n % 2 == 0) for n in range(times)]


def _attempt(
    folder: Path, name: str, steps: int, duration: float, wanted: str, draw: random.Random, by_clock: bool
) -> Attempt:
    out = folder / name
    moment, point = draw.uniform(0.1, 0.95) * duration, draw.randrange(steps // 2 * 6)
    child = _fork(lambda: _run(folder, name, steps, None if by_clock else point))
    if by_clock:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    whole = [int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")] if out.is_dir() else []
    _child(lambda: _run(folder, name, steps))
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return Attempt(max(whole, default=0), "clock" if by_clock else "write", killed, _digest(out) == wanted)


def _kill_in_writing(point: int) -> None:
    """Let this process die inside the writing of a checkpoint: with half a file written, or around a rename.

    Points are counted over the run: two to a file (half of it, all of it), two to a rename (before, after).
    """
    from types import SimpleNamespace

    from smidgen.training import checkpoints

    passed = itertools.count()
    write, rename = checkpoints.write_file, os.rename

    def die_at_point() -> None:
        if next(passed) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_file(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        die_at_point()
        write(path, content)
        die_at_point()

    def renamed(source, target) -> None:
        die_at_point()
        rename(source, target)
        die_at_point()

    checkpoints.write_file = write_file
    checkpoints.os = SimpleNamespace(**{**vars(os), "rename": renamed})


def _import_everything() -> None:
    """What the children need, so that they start at once; the parent computes nothing, which keeps forking sound."""
    import accelerate  # noqa: F401
    import diffusers
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch
    import transformers

    import smidgen.tasks.personalize.recipe  # noqa: F401

    torch.set_num_threads(1)
    for name in ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "DDPMScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "CLIPTextModelWithProjection"):
        getattr(transformers, name)


def _run(folder: Path, name: str, steps: int, point: int | None = None) -> None:
    from smidgen.tasks.personalize.recipe import personalize
    from smidgen.tasks.personalize.settings import Adapter, Data, PersonalizeConfig, Show
    from smidgen.training.loop import LoopConfig

    logging.disable(logging.WARNING)
    if point is not None:
        _kill_in_writing(point)
    config = PersonalizeConfig(
        data=Data(folder / "pictures", train_batch_size=2),
        adapter=Adapter("tlora", learning_rate=1e-2),
        train=LoopConfig(max_train_steps=steps, lr_warmup_steps=2, checkpointing_steps=2),
        show=Show(num_prompts=1, num_seeds=1, inference_steps=1, compare_lora=False),
        base=str(folder / "base"),
        out=folder / name,
        resume_from_checkpoint="latest",
    )
    personalize(config, progress=False)


def _fork(work) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _child(work) -> None:
    _, status = os.waitpid(_fork(work), 0)
    if status:
        raise RuntimeError(f"a run left alone ended with status {status}")


def _digest(out: Path) -> str:
    return hashlib.sha256(b"".join((out / name).read_bytes() for name in FILES)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from benchmarks._harness import write_result

    with tempfile.TemporaryDirectory() as folder:
        found = attempts(Path(folder), options.times, options.seed)
    same = sum(attempt.same for attempt in found)
    figures = {
        "times": len(found),
        "same_to_the_bit": same,
        "killed_by_the_clock": sum(attempt.killed and attempt.kind == "clock" for attempt in found),
        "killed_inside_a_write": sum(attempt.killed and attempt.kind == "write" for attempt in found),
        "distinct_steps_killed_at": len({attempt.killed_at for attempt in found}),
    }
    write_result("resume", figures, f"python -m benchmarks.resume --times {options.times} --seed {options.seed}")
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    return 0 if same == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
