"""Damaged adapter folders, and saves that are killed: is anything accepted that was not saved, does anything break?

    python -m benchmarks.fuzz                    # 10,000 folders by two routes, 50 kills: minutes on one core
    python -m benchmarks.fuzz --folders 300 --seed 7

Small adapters of every method, with heads and without, in both number formats, are saved; a copy of one is damaged in one
place; ``smidgen.load`` and ``PeftModel.from_pretrained`` are given the copy. What is refused must be a ``SmidgenError`` (or,
through peft, an error of peft's own reader, which reads the config before it asks whose it is), and ``smidgen.load`` must
leave the model as it was, to the bit. What is accepted must give the output of the adapter that was saved, to the bit.
A tenth of the folders has no checksum, as if saved before there was any: there, damage that keeps shapes is accepted by
design and counted apart.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen
from benchmarks._harness import write_result
from smidgen import testing
from smidgen.adapters import atomic
from smidgen.adapters.atomic import replace_file
from smidgen.errors import SmidgenError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHODS = ("svfit", "loldu", "tlora(2,2)", "tlora_star(1,4)", "lora", "oft", "seeded", "rotation+spectral")
SLOW = 5.0  # seconds after which a folder counts as a hang; an ordinary one takes 0.01


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(32, 32), nn.Conv2d(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        grown = self.v(torch.nn.functional.pad(x.reshape(-1, 8, 2, 2), (0, 1, 0, 1)))
        return x + torch.tanh(self.q(x)) * grown.reshape(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def trained(method: str, head: bool, seed: int, **options: Any) -> nn.Module:
    rank = {"r": 3} if method in ("svfit", "loldu", "lora", "seeded", "rotation+spectral") else {}
    rank |= {"block_size": 4} if method == "oft" else {"blocks": 4} if method.startswith("rotation") else {}
    heads = {"modules_to_save": ["head"]} if head else {}
    net = testing.perturb(smidgen.adapt(base(), method, target_modules=["q", "v"], **rank, **heads, **options), seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".modules_to_save." in name:
                p.add_(0.1 * seed)
    return net


def saved_adapters(root: Path, methods: Sequence[str] = METHODS) -> Iterator[tuple[Path, Path]]:
    """Folders of one config and two seeds each."""
    variants: list[dict[str, Any]] = [{"store_dtype": name} for name in ("float32", "float16", "int4")]
    variants.append({"store_factors": True})
    for method in methods:
        for head in (False, True):
            for number, options in enumerate(variants):
                if "store_factors" in options and method not in ("svfit", "loldu"):
                    continue
                both = [root / f"{method}-{head}-{number}-{seed}" for seed in (1, 2)]
                for seed, folder in enumerate(both, 1):
                    smidgen.save(trained(method, head, seed, **options), folder)
                yield both[0], both[1]


# ---- damage: each takes the folder, another save of the same config, and chance ----------------------------------------


def flip_bits(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def swap_blocks(raw: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 4, 16, 64))
    a, b = sorted(rng.randrange(max(1, len(raw) - size)) for _ in range(2))
    if b - a < size:
        return raw[:a] + bytes(size) + raw[a + size :]
    return raw[:a] + raw[b : b + size] + raw[a + size : b] + raw[a : a + size] + raw[b + size :]


def splice(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.choice((1, 8, 100))) + raw[at + rng.choice((0, 1, 8)) :]


BYTES = (flip_bits, flip_bits, flip_bits, cut, swap_blocks, splice)


def bytes_of_weights(folder: Path, other: Path, rng: random.Random) -> str:
    change = rng.choice(BYTES)
    replace_file(folder / WEIGHTS, change((folder / WEIGHTS).read_bytes(), rng))
    return f"weights: {change.__name__}"


def bytes_of_config(folder: Path, other: Path, rng: random.Random) -> str:
    change = rng.choice(BYTES)
    replace_file(folder / CONFIG, change((folder / CONFIG).read_bytes(), rng))
    return f"config: {change.__name__}"


def tensors(folder: Path, other: Path, rng: random.Random) -> str:
    held = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(held))
    value, rest = held[name], {n: v for n, v in held.items() if n != name}
    theirs = load_file(other / WEIGHTS)[name]
    second = rng.choice(sorted(held))
    changes: dict[str, Callable[[], dict[str, Tensor]]] = {
        "left out": lambda: rest,
        "renamed": lambda: rest | {rng.choice((name + "x", name[1:], f"base_model.model.{name}", "residual_a")): value},
        "swapped": lambda: held | {name: held[second].clone(), second: value.clone()},
        "scaled": lambda: held | {name: _scaled(value, rng)},
        "cast": lambda: held | {name: value.to(rng.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool)))},
        "turned": lambda: held | {name: torch.from_numpy(value.numpy()[::-1].copy())},
        "transposed": lambda: held | {name: value.mT.contiguous() if value.ndim > 1 else value[None]},
        "shorter": lambda: held | {name: value[:-1].clone()},
        "longer": lambda: held | {name: torch.cat([value, value[:1]])},
        "not finite": lambda: held | {name: value.float() * rng.choice((float("nan"), float("inf")))},
        "added": lambda: held | {rng.choice(("x", "residual_extra", "base_model.model.head.x")): torch.ones(3)},
        "of another save": lambda: held | {name: theirs},
        "zeros": lambda: held | {name: torch.zeros_like(value)},
        "one number": lambda: held | {name: _one(value, rng)},
    }
    kind = rng.choice(sorted(changes))
    save_file({n: v.clone() for n, v in changes[kind]().items()}, folder / "new")
    os.replace(folder / "new", folder / WEIGHTS)
    return f"tensor: {kind}"


def _scaled(value: Tensor, rng: random.Random) -> Tensor:
    if value.is_floating_point():
        return value * rng.choice((0, -1, 2, 1.001))
    return torch.from_numpy(value.numpy() + 1)


def _one(value: Tensor, rng: random.Random) -> Tensor:
    out = value.numpy().copy()
    out.flat[rng.randrange(out.size)] = 1
    return torch.from_numpy(out)


def header(folder: Path, other: Path, rng: random.Random) -> str:
    raw = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    data: dict[str, Any] = json.loads(raw[8 : 8 + size])
    name = rng.choice(sorted(n for n in data if n != "__metadata__"))
    entry = data[name]
    kind = rng.choice(("dtype", "shape", "offsets", "metadata", "name", "size"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F9", 3, None))
    elif kind == "shape":
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [0], [], [-1], [2**62], [2**31, 2**31], "x", [1.5], None)
        )
    elif kind == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(([first, last + 4], [last, first], [0, 2**62], [-4, last], [first], None))
    elif kind == "metadata":
        data["__metadata__"] = rng.choice(({"format": "tf"}, {"format": "pt", "x": "y"}, {}, {"a": 3}, [], "x"))
    elif kind == "name":
        data[rng.choice((name + "x", "", "a" * 5000, "base_model.model." + name))] = data.pop(name)
    text = json.dumps(data).encode()
    size = rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63)) if kind == "size" else len(text)
    replace_file(folder / WEIGHTS, size.to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :])
    return f"header: {kind}"


POOL: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**30, 0.0, 0.5, -1.5, 1e300, "", "x", "q", "full", "energy:0.5",
    "float16", "all-linear", "(a+)+$", ".*", "(.*)*x", "[", "\u2028", "a" * 3000, [], ["q"], ["q", "v"], ["v"], [1], [None],
    [[]], {}, {"q": 1}, {"q": 10**9}, {"(.*a){20}": 2}, {"alpha": 3.0}, {"atoms": "raw"}, {"rank": 10**7}, {"order": 10**9},
    {"mode_shape": [10**9, 10**9]}, {"sketch": ""}, {"targets": ""}, {"tensors": "x"}, "LORA", "SEQ_CLS",
    "spectral", "low_rank", "rotation", "diagonal", {"a": {"b": {"c": {"d": {"e": {}}}}}},
)  # fmt: skip
KEYS = (
    "method", "transform", "residual", "r", "transform_options", "residual_options", "rank_pattern", "seed", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "store_factors", "store_dtype", "base_lock",
    "canary", "checksum", "bias", "peft_type", "task_type", "inference_mode", "revision", "base_model_name_or_path",
    "peft_version", "auto_mapping", "runtime_config", "lora_alpha", "new_key",
)  # fmt: skip


def option(folder: Path, other: Path, rng: random.Random) -> str:
    """Any key gets any value."""
    data = json.loads((folder / CONFIG).read_text())
    key, value = rng.choice(KEYS), copy.deepcopy(rng.choice(POOL))
    inner = data.get(key)
    if isinstance(inner, dict) and inner and rng.random() < 0.5:
        deep = rng.choice(sorted(inner))
        inner[deep] = value
        key = f"{key}.{deep}"
    else:
        data[key] = value
    replace_file(folder / CONFIG, json.dumps(data))
    return f"option: {key}"


def number(folder: Path, other: Path, rng: random.Random) -> str:
    """A number or a text of the config is a little different."""
    data = json.loads((folder / CONFIG).read_text())
    key = rng.choice(sorted(data))
    value = data[key]
    if isinstance(value, dict) and value:
        inner = rng.choice(sorted(value))
        value[inner] = _near(value[inner], rng)
    else:
        data[key] = _near(value, rng)
    replace_file(folder / CONFIG, json.dumps(data))
    return f"near: {key}"


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return rng.choice(
            (value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :], value[:at], value + value, value.upper())
        )
    if isinstance(value, list) and value:
        return rng.choice((value[1:], value[::-1], value + value, value[0]))
    return [value]


def keys(folder: Path, other: Path, rng: random.Random) -> str:
    text = (folder / CONFIG).read_text()
    data = json.loads(text)
    key = rng.choice(sorted(data))
    kind = rng.choice(("left out", "renamed", "twice", "other's", "deep", "digits", "whole"))
    if kind == "left out":
        del data[key]
    elif kind == "renamed":
        data[key + "_"] = data.pop(key)
    elif kind == "other's":
        data[key] = json.loads((other / CONFIG).read_text()).get(key)
    text = json.dumps(data)
    if kind == "twice":
        text = text[:-1] + f', "{key}": {json.dumps(rng.choice(POOL))}}}'
    elif kind == "deep":
        text = text[:-1] + f', "{key}": {"[" * 10**5}'
    elif kind == "digits":
        text = text[:-1] + f', "seed": {"9" * 10**5}}}'
    elif kind == "whole":
        text = rng.choice(("", "[]", "null", "3", '"x"', "{}", text * 2, f"[{text}]", "NaN", "\x00"))
    replace_file(folder / CONFIG, text)
    return f"keys: {kind}"


def mixed(folder: Path, other: Path, rng: random.Random) -> str:
    """One file of this save, one of another; or half of a file."""
    name = rng.choice((WEIGHTS, CONFIG))
    theirs, ours = (other / name).read_bytes(), (folder / name).read_bytes()
    at = rng.choice((0, rng.randrange(len(ours))))
    replace_file(folder / name, ours[:at] + theirs[at:])
    return f"mixed: {name}"


DAMAGE = (
    bytes_of_weights, bytes_of_weights, bytes_of_config, bytes_of_config, tensors, tensors, header, option, option, number, keys,
    mixed,
)  # fmt: skip


# ---- what happens to it --------------------------------------------------------------------------------------------------


class Fuzz:
    """Gives damaged folders to both routes and counts."""

    def __init__(self, root: Path, seed: int, methods: Sequence[str] = METHODS) -> None:
        self.root, self.rng = root, random.Random(seed)
        self.pairs = list(saved_adapters(root / "saved", methods))
        self.x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        self.wanted = {(folder, route): self.run(route, folder) for folder, _ in self.pairs for route in ROUTES}
        self.untouched, self.before = base(), testing.snapshot(base())
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []

    def run(self, route: str, folder: Path) -> Tensor:
        with torch.no_grad():
            return ROUTES[route](base(), folder)(self.x)

    def folder(self, number: int) -> None:
        good, other = self.rng.choice(self.pairs)
        folder = self.root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        sealed = self.rng.random() < 0.9
        if not sealed:
            data = json.loads((folder / CONFIG).read_text())
            del data["checksum"]
            (folder / CONFIG).write_text(json.dumps(data))
        what = self.rng.choice(DAMAGE)(folder, other, self.rng)
        self.counts["folders"] += 1
        for route in ROUTES:
            self.give(route, folder, good, sealed, f"{number} {good.name} {what} sealed={sealed}")

    def give(self, route: str, folder: Path, good: Path, sealed: bool, what: str) -> None:
        started = time.monotonic()
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            model = ROUTES[route](self.untouched if route == "load" else base(), folder)
            with torch.no_grad():
                same = torch.equal(model(self.x), self.wanted[good, route])
            verdict = "accepted_same" if same else "accepted_changed" if sealed else "accepted_changed_without_checksum"
            if not same and route == "peft" and not smidgen_made(model):
                verdict = "accepted_changed_by_peft_as_another_method"
        except SmidgenError as error:
            verdict = "refused" if len(str(error)) > 20 else "crash"
        except Exception as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            ours = any("/smidgen/" in name for name in frames[1:])
            verdict = "crash" if ours or route == "load" else f"refused_by_peft_{type(error).__name__}"
            if verdict == "crash":
                what += f" {type(error).__name__}: {str(error)[:200]} {frames[-1]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() - started > SLOW:
            self.counts[f"{route}_hang"] += 1
            self.found.append(f"{route} hang: {what}")
        if route == "load":
            if verdict.startswith("accepted"):
                self.untouched = base()
            else:
                try:
                    testing.unchanged(self.before, self.untouched, what)
                except AssertionError as error:
                    self.counts["load_touched"] += 1
                    self.found.append(f"touched: {error}")
                    self.untouched = base()
        self.counts[f"{route}_{verdict}"] += 1
        if verdict in ("crash", "accepted_changed"):
            self.found.append(f"{route} {verdict}: {what}")


def smidgen_made(model: Any) -> bool:
    return all(isinstance(own, smidgen.SmidgenConfig) for own in model.peft_config.values())


ROUTES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "load": smidgen.load,
    "peft": PeftModel.from_pretrained,
}


# ---- kills ---------------------------------------------------------------------------------------------------------------


def lines_of_a_save(net: nn.Module, folder: Path, die_at: int | None = None) -> int:
    """Saves over a folder; dies at the given line of ours, or counts them."""
    count = 0
    watched = (atomic.__file__, smidgen.adapters.api.__file__)

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in watched:
            return None
        count += event == "line"
        if count == die_at:
            os._exit(9)
        return trace

    sys.settrace(trace)
    try:
        smidgen.save(net, folder)
    finally:
        sys.settrace(None)
    return count


def kills(root: Path, points: int) -> Counter[str]:
    """A save over an adapter is killed at ``points`` lines spread over it, and at each line of the moving."""
    olds, news = (trained("loldu", True, seed) for seed in (1, 2))
    smidgen.save(olds, root / "old")
    smidgen.save(news, root / "new")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    wanted = {}
    for name in ("old", "new"):
        with torch.no_grad():
            wanted[name] = smidgen.load(base(), root / name)(x)
    shutil.copytree(root / "old", root / "count")
    lines = lines_of_a_save(news, root / "count")
    counts: Counter[str] = Counter()
    for k in range(points):
        folder = root / f"killed-{k}"
        shutil.copytree(root / "old", folder)
        child = os.fork()
        if not child:
            lines_of_a_save(news, folder, die_at=1 + k * (lines - 1) // (points - 1))
            os._exit(0)
        counts["kills"] += os.waitpid(child, 0)[1] != 0
        through_peft = shutil.copytree(folder, root / f"peft-{k}")
        for route, where in (("load", folder), ("peft", through_peft)):
            with torch.no_grad():
                found = ROUTES[route](base(), where)(x)
            which = [name for name, output in wanted.items() if torch.allclose(found, output, atol=1e-6)]
            counts[f"kills_{route}_{which[0] if which else 'neither'}"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), given.seed)
        for number in range(given.folders):
            fuzz.folder(number)
            if number % 500 == 499:
                print(number + 1, dict(sorted(fuzz.counts.items())), flush=True)
        for line in fuzz.found[:200]:
            print(line)
        counts = fuzz.counts + kills(Path(folder), given.kills)
    zero = ("crash", "hang", "accepted_changed")
    figures = dict.fromkeys([f"{route}_{what}" for route in ROUTES for what in zero] + ["load_touched"], 0)
    figures |= dict(sorted(counts.items())) | {"adapters": len(fuzz.pairs), "seconds": round(time.time() - started)}
    print(figures)
    write_result("fuzz", figures, "python -m benchmarks.fuzz " + " ".join(sys.argv[1:]))
    if any(figures[name] for name in figures if name.endswith(zero) or name in ("load_touched", "kills_load_neither")):
        raise SystemExit("Something broke, hung or was accepted that was not saved.")


if __name__ == "__main__":
    main()
