"""How much of the house a newcomer walks through to follow one thing: the files whose functions a walk calls, and the ways
back, steps from one file into another that was entered before. Small runs of the real commands, traced.

python -m benchmarks.walks        (about 3 minutes)
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import smidgen
from benchmarks._harness import write_result
from smidgen.cli import main as command

ROOT = Path(smidgen.__file__).parent


class Walk:
    """The files of the package in the order in which their functions are called."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.steps: set[tuple[str, str]] = set()
        self._at = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(ROOT)) or frame.f_code.co_name == "<module>":
            return
        name = name[len(str(ROOT)) + 1 :]
        if name != self._at:
            if name in self.files:
                self.steps.add((self._at, name))
            self.files.setdefault(name, len(self.files))
            self._at = name


@contextlib.contextmanager
def walking() -> Iterator[Walk]:
    walk = Walk()
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def run(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = command(list(words))
    if status:
        raise RuntimeError(f"smidgen {' '.join(words)}: {errors.getvalue()[-500:]}")


def adapters() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    smidgen.adapt(model, "svfit", "a", r=4, target_modules=["0", "1"])
    smidgen.adapt(model, "tlora", "b", target_modules=["0", "1"])
    bank = smidgen.Bank(model, model.peft_config["a"], ["a"])
    bank.put("a", model, "a")
    return model, bank


def walks(folder: Path) -> dict[str, Callable[[], Any]]:
    """Each walk, with what it needs made before."""
    subject, adapter, model, zoo = (str(folder / name) for name in ("subject", "adapter", "model", "zoo"))
    run("subject", subject, "--seed", "7")
    net = nn.Sequential(nn.Linear(16, 16))
    smidgen.save(smidgen.adapt(net, "svfit", r=4, target_modules=["0"]), adapter)
    table = folder / "table.csv"
    table.write_text("text,label\n" + "".join(f"film {i} is good,yes\nfilm {i} is bad,no\n" for i in range(60)))
    two, bank = adapters()

    def through() -> None:
        smidgen.set_active(two, ["a", "b"])
        two(torch.randn(2, 16))
        with bank.rows(["a", None]):
            two(torch.randn(2, 16))

    def zoo_to_generator() -> None:
        enough = ("--judged-pictures", "0", "--max-train-steps", "60")  # for the quality filter to keep some
        run("zoo", "build", "--preset", "debug", *enough, "--out", zoo)
        small = ("--two-stage.train.max-train-steps", "4", "--two-stage.batch-size", "4", "--two-stage.codec", "pca")
        run("generator", "train", "--preset", "paper", "--two-stage.zoo", zoo, *small, "--out", model)

    def load() -> Any:
        torch.manual_seed(0)
        return smidgen.load(nn.Sequential(nn.Linear(16, 16)), adapter)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    smidgen.save(smidgen.adapt(net, "svfit", r=4, target_modules=["0"]), adapter)
    loaded = load()
    photo = str(sorted(Path(subject).glob("*.png"))[0])
    words = ("--preset", "debug", "--train-file", str(table), "--out", str(folder / "texts"))
    return {
        "personalize": lambda: run("personalize", subject, "--preset", "debug", "--out", str(folder / "person")),
        "predict": lambda: run("predict", photo, "--out", str(folder / "predicted"), "--no-sheet"),
        "two_adapters_and_bank": through,
        "one_csv_line": lambda: run("train", "text-classification", *words),
        "load": load,
        "verify": lambda: smidgen.verify(loaded, adapter),
        "zoo_to_generator": zoo_to_generator,
    }


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, walk in walks(Path(folder)).items():
            with walking() as found:
                walk()
            figures |= {f"{name}_files": len(found.files), f"{name}_ways_back": len(found.steps)}
            print(f"{name}: {len(found.files)} files, {len(found.steps)} ways back", flush=True)
    write_result("walks", figures, "make bench NAME=walks")


if __name__ == "__main__":
    main()
