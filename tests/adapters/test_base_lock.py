"""The base lock: what it measures, what it costs, and what it says when it is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint import base_lock
from smidgen.errors import AdapterFileError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def weights(layers: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"encoder.layer.{i}.{name}": torch.randn(rows, cols, generator=generator) * (1 + i) / cols
        for i in range(layers)
        for name, rows, cols in (("query", 32, 48), ("value", 64, 48))
    }


def moved(base: dict[str, Tensor], share: float, seed: int = 1) -> dict[str, Tensor]:
    """The same weights, each moved by ``share`` of its norm in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(w.shape, generator=generator) for n, w in base.items()}
    return {n: w + share * w.norm() / noise[n].norm() * noise[n] for n, w in base.items()}


@pytest.mark.parametrize("share", [1e-4, 3e-3, 0.02, 0.1, 0.5])
def test_the_difference_is_measured(share: float) -> None:
    base = weights()
    lock = base_lock.make_lock(base)
    found = [base_lock.check_lock(lock, moved(base, share, seed)).difference for seed in range(8)]
    assert all(0.4 * share < d < 1.9 * share for d in found), found
    assert sum(found) / len(found) == pytest.approx(share, rel=0.25)


def test_states() -> None:
    base = weights()
    lock = base_lock.make_lock(base)
    assert base_lock.check_lock(lock, base).state == "same"
    assert base_lock.check_lock(lock, base).difference == 0
    halves = {n: w.bfloat16().float() for n, w in base.items()}
    assert base_lock.check_lock(lock, halves).state == "cast"
    for other in (weights(seed=3), {n: -w for n, w in base.items()}, {n: 1.5 * w for n, w in base.items()}):
        report = base_lock.check_lock(lock, other)
        assert report.state == "other" and "another base model" in report.problems[0]
    assert base_lock.check_lock(None, base).state == "unlocked"


def test_quantised_in_four_bits_is_tolerated() -> None:
    """A tenth of the weight is what rounding to four bits costs."""
    base = weights()
    lock = base_lock.make_lock(base)
    assert all(base_lock.check_lock(lock, moved(base, 0.1, seed)).state == "cast" for seed in range(30))


def test_the_worst_target_is_named() -> None:
    base = weights()
    lock = base_lock.make_lock(base)
    name = "encoder.layer.11.value"
    report = base_lock.check_lock(lock, base | {name: -base[name]})
    assert report.worst[0] == name and name in report.problems[0]


def test_names_and_shapes_are_read_back() -> None:
    base = weights() | {"a name with blanks": torch.ones(2, 3)}
    found = base_lock.read_lock(base_lock.make_lock(base))
    assert found.targets == sorted(base)
    assert found.shapes == [tuple(base[n].shape) for n in sorted(base)]
    blank, lock = base_lock.blank_lock(base), base_lock.make_lock(base)
    assert {k: len(v) for k, v in blank.items()} == {k: len(v) for k, v in lock.items()}


def test_weights_of_any_size() -> None:
    for scale in (1e-12, 1e12):
        base = {n: w * scale for n, w in weights(2).items()}
        lock = base_lock.make_lock(base)
        assert base_lock.check_lock(lock, base).state == "same"
        assert base_lock.check_lock(lock, moved(base, 0.05)).state == "cast"
    zero = {"a": torch.zeros(3, 3)}
    assert base_lock.check_lock(base_lock.make_lock(zero), zero).state == "same"
    assert base_lock.check_lock(base_lock.make_lock(zero), {"a": torch.ones(3, 3)}).state == "other"


@pytest.mark.parametrize(
    "change",
    [
        {"targets": "!"},
        {"targets": ""},
        {"targets": None},
        {"targets": "AAAA"},
        {"sketch": ""},
        {"sketch": 3},
        {"own": "AAA="},
        {"own": ["x"]},
    ],
)
def test_a_damaged_lock(change: dict[str, Any]) -> None:
    lock = base_lock.make_lock(weights(1)) | change
    with pytest.raises(AdapterFileError, match=r"base_lock.*damaged"):
        base_lock.read_lock(lock)


def test_a_list_of_names_that_unfolds_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_lock, "_MAX_NAMES", 1000)
    lock = base_lock.make_lock(weights(1)) | {"targets": base_lock._deflate("a 1 1\n" * 5000)}
    with pytest.raises(AdapterFileError, match="endless"):
        base_lock.read_lock(lock)


def sized(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    root = nn.Module()
    for name, (rows, cols) in shapes.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.add_module(last, nn.Linear(cols, rows))
    return root


def encoder(layers: int, names: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"bert.encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in names.items()}


ALL = {f"attention.self.{n}": (8, 8) for n in ("query", "key", "value")}
ALL |= {"attention.output.dense": (8, 8), "intermediate.dense": (32, 8), "output.dense": (8, 32)}
BLOCKS = {"down_blocks.0": 2, "down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1}
BLOCKS |= {"up_blocks.1": 3, "up_blocks.2": 3, "up_blocks.3": 3}
UNET = {
    f"{block}.attentions.{i}.transformer_blocks.0.{attention}.{name}": (8, 8)
    for block, count in BLOCKS.items()
    for i in range(count)
    for attention in ("attn1", "attn2")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
}


@pytest.mark.parametrize(
    ("shapes", "ends", "most"),
    [
        (encoder(6, {k: v for k, v in ALL.items() if "query" in k or "value" in k}), ["query", "value"], 900),
        (encoder(6, ALL), ["query", "key", "value", "dense"], 1060),
        (encoder(12, ALL), ["query", "key", "value", "dense"], 1280),
        (UNET, ["to_q", "to_k", "to_v", "to_out.0"], 1700),
    ],
    ids=["minilm q,v", "minilm all", "vit all", "sd15"],
)
def test_what_is_not_numbers_costs_little(
    shapes: dict[str, tuple[int, int]], ends: list[str], most: int, tmp_path: Path
) -> None:
    model = testing.perturb(smidgen.adapt(sized(shapes), "seeded", r=10, target_modules=ends))
    folder = smidgen.save(model, tmp_path)
    assert smidgen.trained_numbers(model) == 10 * len(shapes)
    over = (folder / WEIGHTS).stat().st_size + (folder / CONFIG).stat().st_size - 2 * 10 * len(shapes)
    assert 0 < over <= most, f"{over} bytes besides the numbers of {len(shapes)} targets"
