"""What it costs that every row of a batch has an adapter of its own: SmolLM2 and the embedded base, at 1, 8, 64 and 512 of them.

Processor seconds of interleaved rounds in one run, one thread: a decoding step through the bank and through peft's ``adapter_names``, the same
method and rank, over the base's; whole answers and images by the library, over the base's and adapter by adapter; from a folder to
servable; and ten thousand adapters in memory.

python -m benchmarks.serving [--part decode|answers|images|loading]        (about 40 minutes, one thread)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

import smidgen
from benchmarks._harness import RESULTS, write_result
from smidgen import testing
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, read_tensors
from smidgen.adapters.tuner.config import read_smidgen_config
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.bases.transformers import load_language_model
from smidgen.serving.key_values import RoomyCache
from smidgen.serving.library import Library
from smidgen.serving.requests import ImageRequest, TextRequest

PEOPLE, CONTEXT = (1, 8, 64, 512), 16
TARGETS = ["q_proj", "v_proj"]
RANKS = {"svfit": 128, "lora": 8}
PROMPT = "The day was long, and the road went on and on through the hills until"
SCENE, STEPS = "a portrait of a person with red hair", 8


def smollm2() -> Any:
    return load_language_model("smollm2", "no", None).model.eval().requires_grad_(False)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each run, round after round, once each to begin with."""
    times: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds + 1):
        for way, run in runs.items():
            start = time.process_time()
            run()
            if number:
                times[way].append(time.process_time() - start)
    return times


def over(times: Mapping[str, list[float]], way: str, base: str = "base") -> float:
    """Median of what a way takes more than the base in the same round."""
    return statistics.median(one - other for one, other in zip(times[way], times[base], strict=True))


def ratio(times: Mapping[str, list[float]], way: str, base: str) -> float:
    """Median of a way over another in the same round."""
    return statistics.median(one / other for one, other in zip(times[way], times[base], strict=True))


# ---- a decoding step -------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(method: str, rounds: int) -> dict[str, float]:
    names, rank = [f"p{i}" for i in range(max(PEOPLE))], RANKS[method]
    base, served, named = smollm2(), smollm2(), smollm2()
    config: Any = smidgen.config(method, r=rank, target_modules=TARGETS)
    smidgen.adapt(served, config)
    bank = smidgen.Bank(served, served.peft_config["default"], names)
    bank.start()
    for slot in bank.slots.values():
        for p in slot.parameters():
            p.requires_grad_(False).add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    if method == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    by_name: Any = peft.get_peft_model(named, config, names[0])
    there, figures = 1, {}
    for people in PEOPLE:
        add_beside(by_name, names[0], names[there:people])
        there = max(there, people)
        by_name.eval()
        token, context = torch.full((people, 1), 50), torch.full((people, CONTEXT), 60)
        past = RoomyCache()
        base(input_ids=context, past_key_values=past, use_cache=True)

        def step(run: Any, past: Any = past, token: torch.Tensor = token, **options: Any) -> torch.Tensor:
            out = run(input_ids=token, past_key_values=past, use_cache=True, **options).logits
            for layer in past.layers:  # the context stays as it is
                layer.end -= 1
                layer._show()
            return out  # type: ignore[no-any-return]

        runs = {
            "base": lambda step=step: step(base),
            "bank": lambda step=step: step(served),
            "names": lambda people=people, step=step: step(by_name, adapter_names=names[:people]),
        }
        with bank.rows(names[:people]):  # as between two tokens of a batch that nobody joins or leaves
            assert not torch.equal(runs["base"](), runs["bank"]()), "the bank is off"
            beside = runs["names"]()
            assert not torch.equal(runs["base"](), beside) and (people == 1 or not torch.equal(beside[0], beside[1]))
            times = interleaved(runs, rounds if people < 512 else max(2, rounds // 3))
        key = f"decode_{method}_{people}"
        figures[f"{key}_base_ms"] = 1e3 * statistics.median(times["base"])
        figures[f"{key}_bank_over_base_ms"] = 1e3 * over(times, "bank")
        figures[f"{key}_adapter_names_over_base_ms"] = 1e3 * over(times, "names")
        figures[f"{key}_ratio_of_overheads"] = over(times, "names") / max(1e-9, over(times, "bank"))
        figures[f"{key}_bank_of_base"] = ratio(times, "bank", "base")
        show(figures, key)
    return figures


@torch.no_grad()
def add_beside(model: Any, first: str, names: list[str]) -> None:
    """Adapters like ``first``, each with numbers of its own: peft's ``add_adapter``, whose time grows with the square of how many
    there are (104 in 80 s)."""
    generator = torch.Generator().manual_seed(0)
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        held = [
            own for own in (*vars(layer).values(), *layer._modules.values()) if isinstance(own, (dict, nn.ModuleDict))
        ]
        for own in [own for own in held if first in own]:
            frozen = own[first].buffers() if isinstance(own, nn.ModuleDict) else ()
            shared = {id(factor): factor for factor in frozen}
            for name in [first, *names]:
                own[name] = copy.deepcopy(own[first], dict(shared))
                for p in own[name].parameters() if isinstance(own, nn.ModuleDict) else ():
                    p.add_(0.02 * torch.randn(p.shape, generator=generator))
    model.peft_config.update(dict.fromkeys(names, model.peft_config[first]))


# ---- folders ---------------------------------------------------------------------------------------------------------


def write_people(folder: Path, count: int, model: Any, config: Any, report: Mapping[str, Any] | None = None) -> None:
    """Folders p0, p1, ... of one config: the first is saved, the others are its file with other numbers, sealed anew."""
    smidgen.adapt(model, config)
    testing.perturb(model, 0)
    smidgen.save(model, folder / "p0")
    remove(model, "default")
    tensors = read_tensors(folder / "p0")
    for number in range(count):
        place, own = folder / f"p{number}", read_smidgen_config(folder / "p0")
        place.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        changed = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        if number:
            own.seal(changed)
            own.save_pretrained(str(place))
            save_file(changed, place / WEIGHTS_NAME)
        if report is not None:
            (place / "report.json").write_text(json.dumps(report))
    assert (folder / "p0" / CONFIG_NAME).is_file()


# ---- whole answers and images by the library --------------------------------------------------------------------------


def answers(rounds: int) -> dict[str, float]:
    """Answers of 8 tokens by the library: all by the base, each by its own adapter, and one adapter after the other."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        own = smidgen.config("svfit", r=RANKS["svfit"], target_modules=TARGETS, task_type="CAUSAL_LM")
        write_people(folder, max(PEOPLE), smollm2(), own)
        with Library(folder, bases=["smollm2"], batch=max(PEOPLE), queue=2 * max(PEOPLE)) as library:
            for people in PEOPLE:
                names = [f"p{i}" for i in range(people)]
                asked = {
                    "base": [TextRequest("smollm2", PROMPT, 8) for _ in names],
                    "own": [TextRequest(name, PROMPT, 8) for name in names],
                }
                runs: dict[str, Callable[[], object]] = {
                    way: lambda some=some: library.generate_all(some) for way, some in asked.items()
                }
                if people <= 8:
                    runs["one_by_one"] = lambda some=asked["own"]: [library.generate(one).result() for one in some]
                times = interleaved(runs, rounds if people < 512 else 2)
                key = f"answers_{people}"
                figures[f"{key}_base_ms_a_token"] = 1e3 * statistics.median(times["base"]) / (8 * people)
                figures[f"{key}_own_of_base"] = ratio(times, "own", "base")
                if "one_by_one" in times:
                    figures[f"{key}_one_by_one_of_own"] = ratio(times, "one_by_one", "own")
                show(figures, key)
    return figures


def images(base_name: str, rounds: int) -> dict[str, float]:
    """Images by the library: by the base, each by its own adapter, and adapter by adapter with the base's own pipeline."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), load_base(base_name)
        own = smidgen.config("svfit", r=8, target_modules=set(base.targets))
        write_people(folder, 512, base.model, own, {"base": base_name})
        prompts, negative = base.encode_prompts([SCENE]), base.encode_prompts([""])
        smidgen.load(
            base.pipe, folder / "p0"
        )  # the others differ by their numbers alone: switching them is not counted
        with Library(folder, bases=[base_name], batch=64, queue=1024) as library:
            for people in PEOPLE:
                names, steps = [f"p{i}" for i in range(people)], STEPS if people <= 64 else 2
                asked = {
                    "base": [ImageRequest(base_name, SCENE, seed=i, steps=steps) for i in range(people)],
                    "own": [ImageRequest(name, SCENE, seed=i, steps=steps) for i, name in enumerate(names)],
                }
                runs: dict[str, Callable[[], object]] = {
                    way: lambda some=some: library.draw_all(some) for way, some in asked.items()
                }
                if people <= 8:
                    guidance = base.sampling.guidance
                    runs["one_by_one"] = lambda people=people, steps=steps, guidance=guidance: [
                        base.draw(prompts, [i], negative=negative, steps=steps, guidance=guidance)
                        for i in range(people)
                    ]
                times = interleaved(runs, rounds if people < 512 else 2)
                key = f"{base_name}_{people}"
                figures[f"{key}_base_ms_an_image"] = 1e3 * statistics.median(times["base"]) / people
                figures[f"{key}_own_of_base"] = ratio(times, "own", "base")
                if "one_by_one" in times:
                    figures[f"{key}_one_by_one_of_own"] = ratio(times, "one_by_one", "own")
                show(figures, key)
    return figures


# ---- from folders to memory ------------------------------------------------------------------------------------------


def used(process: psutil.Process) -> int:
    """Bytes of a process, without what its allocator keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(process.memory_info().rss)


def loading(count: int) -> dict[str, float]:
    """Milliseconds from a folder that nobody has seen to servable, and what ``count`` of them take in memory."""
    process = psutil.Process(os.getpid())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        own = smidgen.config("svfit", r=RANKS["svfit"], target_modules=TARGETS, task_type="CAUSAL_LM")
        write_people(folder, count, smollm2(), own)
        with Library(folder, bases=["smollm2"], budget_bytes=2**31) as library:
            library.load("p0")
            before, cpu, wall = used(process), [], []
            for number in range(1, count):
                start, begun = time.process_time(), time.perf_counter()
                library.load(f"p{number}")
                cpu.append(time.process_time() - start)
                wall.append(time.perf_counter() - begun)
            grown = used(process) - before
            stored = sum(info.bytes for info in (library.info(f"p{number}") for number in range(count)))
            (host,) = library._hosts.values()
            assert host.residents is not None and len(host.residents) == count
            figures = {
                "loading_adapters": count,
                "loading_cpu_ms": 1e3 * statistics.median(cpu),
                "loading_wall_ms": 1e3 * statistics.median(wall),
                "loading_slowest_hundredth_cpu_ms": 1e3 * sorted(cpu)[-max(1, len(cpu) // 100)],
                "resident_bytes_of_stored_parameters": host.residents.bytes / stored,
                "process_grew_mb": grown / 1e6,
                "stored_parameters_mb": stored / 1e6,
            }
            said = library.generate_all(
                [TextRequest(f"p{number}", PROMPT, 4) for number in range(0, count, count // 8)]
            )
            assert len({one.token_ids for one in said}) > 1
    show(figures, "")
    return figures


def show(figures: Mapping[str, float], key: str) -> None:
    print(*(f"{name} {value:.4g}" for name, value in figures.items() if name.startswith(key)), sep="\n", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "decode": lambda given: {k: v for method in given.method for k, v in decode(method, given.rounds).items()},
    "answers": lambda given: answers(given.rounds),
    "images": lambda given: images("embedded", given.rounds) | images("embedded-flow", given.rounds),
    "loading": lambda given: loading(given.adapters),
}


def main() -> None:
    global PEOPLE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--people", type=int, nargs="+", default=PEOPLE, help="how many adapters a batch has")
    parser.add_argument("--method", choices=RANKS, nargs="+", default=list(RANKS), help="of what decodes")
    parser.add_argument("--part", choices=PARTS, help="this part alone; the figures of the others stay")
    given = parser.parse_args()
    PEOPLE = tuple(given.people)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    file = RESULTS / "serving.json"
    figures = dict(json.loads(file.read_text())["figures"]) if given.part and file.is_file() else {}
    for part in [given.part] if given.part else PARTS:
        figures |= {name: round(value, 4) for name, value in PARTS[part](given).items()}
        write_result("serving", figures, " ".join(["python -m benchmarks.serving", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
