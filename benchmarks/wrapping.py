"""Every method wrapped as trainers wrap models: what is saved against what was asked.

python -m benchmarks.wrapping          (half a minute; two CPU processes over gloo)

A small model with a head is trained for four steps in DistributedDataParallel on two processes, in FSDP2 (fully_shard) on
two, with torch's AveragedModel beside it (buffers averaged too) and with a moving average given to the save. Each cell
is the largest difference, relative to the output, of the model that loads the file from the model that was asked for; and of
two processes from one with the whole batch. A refusal must come before the first step and shows as its sentence.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import smidgen
from smidgen.errors import SmidgenError

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tlora": ("tlora", {}),
    "tlora_star": ("tlora_star", {}),
    "svfit": ("svfit", {"r": 8}),
    "svfit nonneg": ("svfit", {"r": 8, "nonneg": True, "alpha": 4}),
    "loldu": ("loldu", {"r": 8}),
    "loldu store_factors": ("loldu", {"r": 8, "store_factors": True}),
    "lora": ("lora", {"r": 2, "alpha": 4}),
    "seeded": ("seeded", {"store_dtype": "float32"}),
    "oft": ("oft", {"block_size": 4}),
    "diagonal": ("diagonal", {}),
    "rotation+spectral": ("rotation+spectral", {"r": 4, "block_size": 4}),
}
STEPS, RANKS = 4, 2


class Net(nn.Module):
    """Two layers with adapters and a head in modules_to_save."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))  # type: ignore[no-any-return]


def adapted(method: str) -> nn.Module:
    """The model with an adapter of a row of ``METHODS`` and its head trained too."""
    name, options = METHODS[method]
    return smidgen.adapt(Net(), name, target_modules=["up", "down"], modules_to_save=["head"], **options)  # type: ignore[no-any-return]


def batch(step: int, rank: int | None = None) -> Tensor:
    """Examples of a step, all of them or one process's share."""
    x = torch.randn(RANKS * 6, 16, generator=torch.Generator().manual_seed(step))
    return x if rank is None else x.chunk(RANKS)[rank]


def fit(model: nn.Module, rank: int | None = None, after: Callable[[nn.Module], None] = lambda _: None) -> nn.Module:
    """``STEPS`` steps of SGD, whose steps show a wrong size of the gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(batch(step, rank)) - 1).square().mean().backward()
        optimizer.step()
        after(model)
    return model


def off(folder: Path, wanted: Tensor) -> float:
    """How far the model that loads a folder is from the output it should have."""
    model = smidgen.load(Net(), folder)
    report = smidgen.verify(model, folder)
    with torch.no_grad():
        found = model(batch(99))
    return float((found - wanted).norm() / wanted.norm()) if report.ok else float("inf")


def answer(model: nn.Module) -> Tensor:
    """The output on examples that nothing was trained on."""
    with torch.no_grad():
        return model(batch(99)).detach()  # type: ignore[no-any-return]


def averaged(method: str, folder: Path) -> dict[str, float]:
    """torch's AveragedModel, buffers averaged too, saved as it is."""
    model = adapted(method)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    fit(model, after=average.update_parameters)
    smidgen.save(average, folder)
    return {"file": off(folder, answer(average)), "moved": float((answer(average) - answer(model)).norm())}


def snapshot(method: str, folder: Path) -> dict[str, float]:
    """A moving average of the state dict, given to the save of the live model."""
    model, average = adapted(method), {}

    def update(live: nn.Module) -> None:
        for key, value in live.state_dict().items():
            old = average.get(key, value)
            average[key] = old.lerp(value, 0.3) if value.is_floating_point() else value

    fit(model, after=update)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smidgen.save(model, folder, state_dict=average)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the save moved the model"
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(average)
    return {"file": off(folder, answer(wanted)), "moved": float((answer(wanted) - answer(model)).norm())}


def wrapped(method: str, how: str, folder: Path, rank: int) -> dict[str, float]:
    """One process of two: trained in a wrapper, saved by all, and by the first alone from a gathered state dict."""
    one = fit(adapted(method))
    model = adapted(method)
    if how == "ddp":
        outer: nn.Module = fit(DistributedDataParallel(model), rank)
        full = outer.state_dict()
        if rank == 0:  # the others hold the same
            smidgen.save(outer, folder / "own")
    else:
        for part in (model.up, model.down, model.head, model):
            fully_shard(part)  # type: ignore[arg-type]
        outer = fit(model, rank)
        full = get_model_state_dict(outer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        smidgen.save(outer, folder / "own")
    there = answer(outer)
    found = {"one process": float((there - answer(one)).norm() / there.norm())}
    found["moved"] = float((there - answer(adapted(method))).norm())
    if rank == 0:
        smidgen.save(model, folder / "given", state_dict=full)
        found |= {"file": off(folder / "own", there), "given": off(folder / "given", there)}
    return found


def tried(cell: Callable[..., dict[str, float]], *given: Any) -> dict[str, Any]:
    """A cell's numbers, or the sentence of its refusal."""
    try:
        return cell(*given)
    except SmidgenError as error:
        return {"refused": str(error)}


def worker(methods: list[str], hows: list[str], folder: Path) -> None:
    """What each of the two processes does; the first one writes ``cells.json``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, cells = distributed.get_rank(), {}
    for method in methods:
        for how in hows:
            cells[f"{method} | {how}"] = tried(wrapped, method, how, folder / method.replace(" ", "_") / how, rank)
    if rank == 0:
        (folder / "cells.json").write_text(json.dumps(cells))
    distributed.barrier()
    distributed.destroy_process_group()


def two_processes(methods: list[str], hows: list[str], folder: Path) -> dict[str, Any]:
    """The cells of two gloo processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", "benchmarks.wrapping", "worker", ",".join(methods), ",".join(hows), str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    with ExitStack() as open_logs:
        outs = [open_logs.enter_context(log.open("w")) for log in logs]
        running = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=out, stderr=subprocess.STDOUT)
            for rank, out in enumerate(outs)
        ]
        try:  # one that fails leaves the other waiting for it
            while any(process.poll() is None for process in running) and not any(p.poll() for p in running):
                time.sleep(0.1)
        finally:
            for process in running:
                process.kill()
                process.wait()
    for process, log in zip(running, logs, strict=True):
        if process.returncode > 0:
            raise RuntimeError(log.read_text()[-3000:])
    return json.loads((folder / "cells.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    from benchmarks._harness import write_result

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cells = two_processes(list(METHODS), ["ddp", "fsdp2"], folder)
        for method in METHODS:
            for name, cell in (("average", averaged), ("snapshot", snapshot)):
                cells[f"{method} | {name}"] = tried(cell, method, folder / name / method.replace(" ", "_"))
    print(
        "| method | " + " | ".join(("DDP", "FSDP2", "AveragedModel", "state dict given")) + " |\n|---|---|---|---|---|"
    )
    for method in METHODS:
        row = [cells[f"{method} | {how}"] for how in ("ddp", "fsdp2", "average", "snapshot")]
        print(f"| `{method}` | " + " | ".join(cell.get("refused") or told(cell) for cell in row) + " |")
    figures = {
        f"{where} | {what}": value for where, cell in cells.items() for what, value in cell.items() if what != "refused"
    }
    write_result("wrapping", figures, "make bench NAME=wrapping")


def told(cell: dict[str, float]) -> str:
    """The worst error of a cell's files; of two processes also that of the training."""
    text = f"{max(cell['file'], cell.get('given', 0.0)):.0e}"
    return text + (f" ({cell['one process']:.0e})" if "one process" in cell else "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2].split(","), sys.argv[3].split(","), Path(sys.argv[4]))
    else:
        main()
