"""500 and more mistakes at the command line: every one ends in one sentence and status 2, and leaves nothing behind.

Wrong values for each flag by its type, flags that are missing, doubled, misspelt or of other tools, wrong kinds of file for each
path, damaged and nonsensical config files, places that cannot be written. Every command runs in this process, on tiny
models; ``--only N`` takes so many, some of each kind for each command. Outcomes: refused (2), accepted (0: the mistake was none), loud (a traceback, or a fault of
Smidgen's own), left (something new lies in the folder), mute (no sentence, or more than one), slow (past --seconds).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._harness import write_result
from smidgen.cli import main as smidgen
from smidgen.cli.build import build
from smidgen.cli.parsing import _flags
from tests.training import tiny

TYPOS = ("lr", "epochs", "steps", "batch-size", "lora-r", "targets", "rankk", "hlep", "output", "x")
WRONG: Mapping[str, tuple[str, ...]] = {
    "int": ("potato", "1.5", "", "-1", "1e3", "18446744073709551616", "nan", "５x", "0x10"),
    "float": ("potato", "", "nan", "inf", "-inf", "1e400", "1,5", "--"),
    "bool": ("maybe", "2"),
    "literal": ("bogus", "", "NO WAY", "None "),
}


DEFAULTS = ("generator train", "zoo build", "zoo plan")  # work without a word, for minutes or hours
MODELS = {  # where a config file takes the place of the preset that names a tiny model
    "train text-classification": ("--model", "debug-text"),
    "train image-classification": ("--model", "debug-image"),
    "train instruction": ("--model", "debug-chat"),
}


@dataclass(frozen=True)
class Case:
    """A command line with one mistake. ``sure``: nobody could mean it, so that status 0 is a failure too."""

    kind: str
    words: tuple[str, ...]
    sure: bool = True


@dataclass(frozen=True)
class World:
    """Good inputs and bad ones, in a folder. ``good``: a line for each command that works, its paths by their place."""

    root: Path
    good: Mapping[str, tuple[str, ...]]
    bad: Mapping[str, Path]


def world(root: Path) -> World:
    """Build the inputs."""
    import torch

    import smidgen as package

    torch.set_num_threads(1)
    good, bad = root / "good", root / "bad"
    bad.mkdir(parents=True)
    base = tiny.sd_folder(good / "sd")
    pictures = tiny.pictures(good / "pictures")
    (good / "texts.csv").write_text("text,label\n" + "".join(f"some words {n},{'ab'[n % 2]}\n" for n in range(40)))
    (good / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) + "\n" for n in range(30))
    )
    for label in ("cat", "dog"):
        shutil.copytree(pictures, good / "labelled" / label, ignore=shutil.ignore_patterns("*.jsonl", "*.csv", "*.txt"))
    from smidgen.bases.families import load_base

    pipe = load_base(str(base), "no", "cpu").pipe
    adapter = package.save(package.adapt(pipe.unet, "svfit", r=2, target_modules=["to_q"]), good / "adapter")
    for name in ("empty", "adapter_config.json"):
        (bad / name).write_bytes(b"")
    (bad / "binary.png").write_bytes(random.Random(0).randbytes(3000))
    (bad / "binary").write_bytes(random.Random(0).randbytes(3000))
    (bad / "cut.png").write_bytes(next(pictures.glob("*.png")).read_bytes()[:60])
    (bad / "text.txt").write_text("just some words\n")
    (bad / "damaged.json").write_text('{"a": [1, 2')
    (bad / "deep.json").write_text("[" * 50_000)
    (bad / "table.csv").write_bytes(b"\xff\xfe\x00a,b\n1\n")
    (bad / "folder").mkdir()
    (bad / "with space \n and newline").mkdir()
    os.mkfifo(bad / "pipe")
    os.symlink(bad / "loop", bad / "loop")
    os.symlink(bad / "nowhere", bad / "dangling")
    (Path(os.fsdecode(os.fsencode(bad) + b"/half\xe9"))).mkdir()
    broken = shutil.copytree(adapter, bad / "adapter")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    wrong = shutil.copytree(adapter, bad / "adapter config")
    (wrong / "adapter_config.json").write_text('{"peft_type": "NO SUCH", "r": -1}')
    kinds = {path.name: path for path in bad.iterdir()}
    kinds |= {
        "missing": bad / "nowhere",
        "null": Path("/dev/null"),
        "zero": Path("/dev/zero"),
        "proc": Path("/proc/1/mem"),
    }
    kinds |= {
        "long name": bad / ("x" * 300),
        "under a file": bad / "text.txt" / "x",
        "leading dash": Path("-"),
        "home": Path("~x"),
    }
    out, one = str(root / "out"), ["--max-train-steps", "1", "--lr-warmup-steps", "0"]
    few = ["--preset", "debug", *one]
    drawn = ["--num-prompts", "1", "--num-seeds", "1", "--inference-steps", "1", "--no-compare-lora"]
    photo = str(next(pictures.glob("*.png")))
    sheet = ["--no-sheet", "--out", out]
    lines = {
        "personalize": [str(pictures), "--base", str(base), *few, *drawn, "--out", out],
        "plan personalize": [str(pictures), "--base", "sd15", "--train-batch-size", "1"],
        "train control": [str(pictures), "--base", str(base), "--control", "canny", *few, "--out", out],
        "train text-classification": [str(good / "texts.csv"), *few, "--out", out],
        "train image-classification": [str(good / "labelled"), *few, "--out", out],
        "train instruction": [str(good / "chats.jsonl"), *few, "--out", out],
        "generate": [str(adapter), "--base", str(base), "--prompt", "a", "--steps", "1", "--out", out],
        "verify": [str(adapter), "--base", str(base)],
        "inspect": [str(adapter)],
        "subject": [out, "--num-pictures", "1"],
        "pairs": [out, "--num-pictures", "2"],
        "zoo build": ["--base", str(base), "--folder", str(good / "labelled"), "--preset", "debug", "--out", out],
        "zoo status": [str(good)],
        "zoo import": [str(good / "adapter"), "--base", str(base), "--out", out],
        "zoo evaluate": [str(good), "--preset", "debug", "--out", out],
        "zoo plan": ["--people", "2"],
        "predict": [photo, *sheet],
        "edit": [photo, "--set", "skin=dark:1", *sheet],
        "blend": [photo, photo, *sheet],
        "invert": [photo, "--invert-steps", "1", *sheet],
        "sample": ["--seeds", "0", *sheet],
        "generator train": ["--preset", "debug", "--out", out],
        "generator directions": [str(good / "adapter"), "--people", str(good)],
        "generator inspect": [str(good / "adapter")],
        "compare": ["debug", "--out", out, "--workers", "1", "--stage", "report"],
        "count": ["svfit", "--architecture", "sd15", "--rank", "2"],
        "config": ["show"],
        "methods": [],
    }
    return World(root, {name: tuple(words) for name, words in lines.items()}, kinds)


def cases(found: World) -> Iterator[Case]:
    """Every mistake."""
    for name, good in found.good.items():
        start = tuple(name.split())
        line = (*start, *good)
        flags = dict(_flags(build(name, [])))
        yield Case("extra argument", (*line, "surplus", "more"))
        if name not in DEFAULTS:
            yield Case("nothing given", start, sure=False)
        yield from (Case("unknown flag", (*line, f"--{typo}", "3")) for typo in TYPOS if typo not in flags)
        for flag, hint in flags.items():
            rest = without(line, flag)
            yield Case("no value", (*rest, f"--{flag}"), sure=kind_of(hint) not in ("bool", "list"))
            yield Case("misspelt flag", (*rest, f"--{flag}z", "1"))
            for value in WRONG.get(kind_of(hint), ()):
                yield Case(f"wrong {kind_of(hint)}", (*rest, f"--{flag}={value}"), sure=value not in ("-1", "--", "2"))
            if kind_of(hint) in ("int", "float"):
                yield Case("doubled flag", (*rest, f"--{flag}", "1", f"--{flag}", "2"))
            if kind_of(hint) == "path":
                yield from (
                    Case(f"path {flag}: {kind}", (*rest, f"--{flag}", str(bad)), False)
                    for kind, bad in found.bad.items()
                )
        for place, word in enumerate(good):
            if place < 2 and Path(word).exists() and not good[place - 1 if place else 0].startswith("--"):
                for kind, bad in found.bad.items():
                    words = (*start, *good[:place], str(bad), *good[place + 1 :])
                    yield Case(f"argument: {kind}", words, sure=kind not in ("folder", "home") and name != "inspect")
        if "out" in flags or name in ("subject", "pairs"):
            for kind in ("empty", "pipe", "loop", "long name", "under a file", "null"):
                bad = str(found.bad[kind])
                yield Case("out", tuple(bad if word == str(found.root / "out") else word for word in line))
            for bad in ("/proc/nothing/here", "/sys/x", "/dev/full/x", "/proc/1/mem"):
                yield Case("out", tuple(bad if word == str(found.root / "out") else word for word in line))
        if "config" in flags:
            yield from configs(found, name, (*without(line, "preset"), *MODELS.get(name, ())))
    for name in (
        "persnalize",
        "train",
        "train x",
        "zoo x",
        "generator",
        "",
        "--",
        "-x",
        "Personalize",
        "train  control",
    ):
        yield Case("no command", tuple(name.split(" ")), sure=False)


QUICK = (
    "extra argument",
    "unknown flag",
    "misspelt flag",
    "wrong literal",
    "doubled flag",
    "no command",
    "config and preset",
)
JUNK = (
    "", "[]", "3", "a: [", "\t", "adapter: 3", "adapter: {rnak: 2}", "adapter: {rank: [1]}", "train: {seed: x}", "train: {seed: -1}",
    "train: {lr: 1}", "epochs: 3", "steps: 3", "train: {batch_size: 3}", "adapter: {lora_r: 3}", "adapter: {targets: [q]}",
    "train: {max_train_steps: 1.5}", "train: {max_train_steps: .nan}", "adapter: {weight_decay: .inf}", "out: [a]", "out: {a: b}",
    "? [a]\n: b", "adapter: {method: nope}", "!!python/object:os.system x", "a: &x [*x]", "&x a: *x", "data: {folder: 3}",
    "train: {seed: 99999999999999999999}", "data: null", "train: null", "out: ''", "1: 2", "train: {1: 2}", "\x00", "adapter: {rank: true}",
    "---\na: 1\n---\nb: 2", "train: {lr_scheduler: bogus}", "data: {train_batch_size: 1000000000}", "out: 2026-11-26", "data: {path: 3}",
    "a: " + "[" * 3000, "a: " + "{a: " * 3000, "train: {seed: 1, seed: 2}",
)  # fmt: skip


def configs(found: World, name: str, line: tuple[str, ...]) -> Iterator[Case]:
    """Config files that are wrong."""
    folder = found.root / "configs"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(JUNK):
        path = folder / f"{number}.yaml"
        path.write_text(text)
        sure = text not in ("", "data: null", "train: null", "3", "[]", "\t")
        yield Case(
            "config",
            (*line, "--config", str(path)),
            sure and "path: 3" not in text and "seed: 1," not in text and "folder" not in text,
        )
    yield Case("config and preset", (*line, "--config", str(folder / "0.yaml"), "--preset", "debug"))


def without(line: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """``line`` without ``flag`` and its value."""
    if f"--{flag}" not in line:
        return line
    place = line.index(f"--{flag}")
    end = place + 1
    while end < len(line) and not line[end].startswith("--"):
        end += 1
    return line[:place] + line[end:]


def kind_of(hint: Any) -> str:
    """What a flag takes."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    parts = [part for part in (typing.get_args(hint) or (hint,)) if part is not type(None)]
    if typing.get_origin(hint) in (list, tuple) or any(typing.get_origin(part) in (list, tuple) for part in parts):
        return "list"
    if typing.get_origin(hint) is typing.Literal or any(typing.get_origin(part) is typing.Literal for part in parts):
        return "literal"
    if len(parts) > 1:
        return "str"
    return {int: "int", float: "float", bool: "bool", Path: "path"}.get(parts[0], "str")


class Slow(BaseException):
    """A case took too long."""


def outcome(case: Case, found: World, seconds: int) -> tuple[str, str]:
    """Runs a case: what came of it, and what was said."""
    before, out, err = listing(found.root), io.StringIO(), io.StringIO()

    def late(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    status: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = smidgen(list(case.words))
            except SystemExit as stop:
                status = stop.code
    except Slow:
        return "slow", f"past {seconds} s"
    except BaseException as error:  # what a user would see as a traceback
        return "loud", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        new = listing(found.root) - before
        for path in map(Path, sorted(new, reverse=True)):  # so that the next case finds the world as it was
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(
                missing_ok=True
            )
    said = [line for line in err.getvalue().splitlines() if line.startswith("smidgen: ")]
    if "Traceback (most recent" in err.getvalue() or "fault of Smidgen" in err.getvalue():
        return "loud", err.getvalue()[-1500:]
    if status == 0:
        return ("accepted" if not case.sure else "let through"), out.getvalue()[-200:]
    if status != 2 or len(said) != 1:
        return "mute", f"status {status}: {err.getvalue()[-500:]}"
    return ("left", f"{sorted(new)[:5]} {said[0]}") if new else ("refused", said[0])


def listing(root: Path) -> set[str]:
    """What lies in the scratch folder, and in the folder one is in."""
    here = {f"./{path.name}" for path in Path().iterdir()}
    return here | {os.path.join(folder, name) for folder, _, names in os.walk(root) for name in ("", *names)}


def run(
    seed: int,
    most: int | None,
    seconds: int,
    tell: Callable[[Case, str, str], None],
    match: str = "",
    quick: bool = False,
) -> Counter[str]:
    """Tries the cases, or ``most`` of them by ``seed``; counts by outcome. ``quick``: only what is refused before a model is
    loaded."""
    counts: Counter[str] = Counter()
    start, level = Path.cwd(), logging.getLogger().level
    with tempfile.TemporaryDirectory(prefix="cli-fuzz-") as scratch:
        root = Path(scratch)
        found = world(root / "world")
        (root / "here").mkdir()
        os.chdir(root / "here")
        try:
            every = [case for case in cases(found) if match in f"{case.kind} {' '.join(case.words[:3])}"]
            every = [case for case in every if not quick or case.kind in QUICK]
            for case in chosen(every, seed)[:most]:
                result, said = outcome(replace(case), found, seconds)
                counts[result] += 1
                tell(case, result, said)
        finally:
            os.chdir(start)
            logging.getLogger().setLevel(level)
    return counts


def chosen(every: list[Case], seed: int) -> list[Case]:
    """The cases in an order by ``seed`` in which each command and kind of mistake has its turn."""
    random.Random(seed).shuffle(every)
    rounds: Counter[tuple[str, ...]] = Counter()
    order = []
    for case in every:
        group = (case.kind.partition(":")[0], *case.words[:2])
        order.append((rounds[group], len(order), case))
        rounds[group] += 1
    return [case for _, _, case in sorted(order, key=lambda one: one[:2])]


def main() -> int:
    """Run, write ``results/cli_fuzz.json``, and fail when anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, default=560, help="so many cases, chosen by the seed (0: all 6,000, an hour)"
    )
    parser.add_argument("--seconds", type=int, default=150, help="a case that takes longer is a failure")
    parser.add_argument("--match", default="", help="cases whose kind or first words hold this; no result is written")
    parser.add_argument("--verbose", action="store_true", help="print every sentence")
    asked = parser.parse_args()
    started = time.time()

    def tell(case: Case, result: str, said: str) -> None:
        if asked.verbose or result not in ("refused", "accepted"):
            print(f"{result:12} {case.kind:20} {' '.join(map(ascii, case.words))}\n             {said!a}", flush=True)

    counts = run(asked.seed, asked.only or None, asked.seconds, tell, asked.match)
    figures = {name: counts[name] for name in ("refused", "accepted", "let through", "loud", "mute", "left", "slow")}
    figures |= {"cases": sum(counts.values()), "seed": asked.seed, "seconds": round(time.time() - started)}
    print(figures)
    if not asked.match:
        figures = {name.replace(" ", "_"): value for name, value in figures.items()}
        write_result("cli_fuzz", figures, f"make bench NAME=cli_fuzz  # seed {asked.seed}")
    return 1 if set(counts) - {"refused", "accepted"} else 0


if __name__ == "__main__":
    sys.exit(main())
