"""Kill a personalisation with SIGKILL at random moments and resume it: does it end with the same adapter, bit for bit?

    python -m benchmarks.resume [--times 20] [--seed 0]

Each time a fresh run on a tiny random Stable Diffusion pipeline is killed, every second time in the very moment a
checkpoint is being written, then resumed with ``--resume-from-checkpoint latest`` and compared with a run that was left
alone.
"""

import argparse
import hashlib
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
    """One killed and resumed run. ``killed_at``: the newest whole checkpoint then; ``writing``: inside a checkpoint."""

    killed_at: int
    writing: bool
    finished_before: bool
    same: bool


def attempts(folder: Path, times: int, seed: int = 0, steps: int = 24) -> list[Attempt]:
    """Kill and resume ``times`` runs below ``folder``; the parent process only imports, forks and kills."""
    import torch

    from smidgen.training.recipes.personalize import personalize  # noqa: F401  (children inherit the imports)
    from tests.training import tiny

    torch.set_num_threads(1)
    _child(lambda: (tiny.sd_folder(folder / "base"), tiny.pictures(folder / "pictures")))
    started = time.perf_counter()
    _child(lambda: _run(folder, "whole", steps))
    duration = time.perf_counter() - started
    wanted, draw = _digest(folder / "whole"), random.Random(seed)
    return [_attempt(folder, f"run{n}", steps, duration, wanted, draw, n % 2 == 1) for n in range(times)]


def _attempt(
    folder: Path, name: str, steps: int, duration: float, wanted: str, draw: random.Random, in_writing: bool
) -> Attempt:
    out = folder / name
    child = _fork(lambda: _run(folder, name, steps))
    until = time.perf_counter() + draw.uniform(0.1, 0.95) * duration
    skip = draw.randrange(steps // 2)  # writings to let pass
    writing = _wait(out, until, skip) if in_writing else _sleep(until)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    whole = [int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")] if out.is_dir() else []
    _child(lambda: _run(folder, name, steps))
    return Attempt(max(whole, default=0), writing, status == 0, _digest(out) == wanted)


def _run(folder: Path, name: str, steps: int) -> None:
    from smidgen.training.loop import LoopConfig
    from smidgen.training.recipes.personalize import personalize
    from smidgen.training.recipes.personalize_settings import Adapter, Data, PersonalizeConfig, Show

    logging.disable(logging.WARNING)
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


def _wait(out: Path, until: float, skip: int) -> bool:
    """True in the middle of writing a checkpoint, after ``skip`` of them; False when ``until`` came first."""
    seen: set[str] = set()
    while time.perf_counter() < until + 5:
        hidden = [path.name for path in out.glob(".checkpoint-*.tmp")] if out.is_dir() else []
        seen.update(hidden)
        if hidden and len(seen) > skip:
            return True
        if not hidden and time.perf_counter() > until and len(seen) <= skip and (out / "report.json").exists():
            return False
    return False


def _sleep(until: float) -> bool:
    time.sleep(max(0.0, until - time.perf_counter()))
    return False


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
        "killed_while_writing_a_checkpoint": sum(attempt.writing for attempt in found),
        "killed_after_the_end": sum(attempt.finished_before for attempt in found),
        "distinct_steps_killed_at": len({attempt.killed_at for attempt in found}),
    }
    write_result("resume", figures, f"python -m benchmarks.resume --times {options.times} --seed {options.seed}")
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    return 0 if same == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
