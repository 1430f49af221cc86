"""Byte budgets: the saved folder keeps to them, the gradient decides, and nothing of the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters import api, budget
from smidgen.errors import ConfigError, TargetError

from .helpers import Net, inputs


def bytes_of(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))


def loss_of(weight: float = 1.0) -> Any:
    def loss(model: nn.Module) -> Tensor:
        return weight * model(inputs()).square().sum()

    return loss


class Blind(Net):
    """A net whose first layer alone reaches the output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers[0](x)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("20kB", 20_000), ("1.5MB", 1_500_000), (" 64 KiB ", 65_536), (700, 700), ("700", 700), ("2kb", 2000), ("3b", 3)],
)
def test_bytes_as_people_write_them(text: int | str, wanted: int) -> None:
    assert budget.parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "kB", "-3kB", "20 kg", "1e3", "ten", "0", "0.2", True, None, 2.5e9 + 0.5j])
def test_what_is_no_number_of_bytes(text: Any) -> None:
    with pytest.raises(ConfigError, match="A budget is a number of bytes"):
        budget.parse_bytes(text)


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("limit", [1000, 1500, 20_000])
@pytest.mark.parametrize("told", [False, True], ids=["by place", "by gradient"])
def test_the_folder_keeps_to_the_budget_and_uses_it(layers: int, limit: int, told: bool, tmp_path: Path) -> None:
    own = budget.allocate(Net(layers, 24), limit, [lambda m: m(inputs(24)).square().sum()] if told else None)
    net = testing.perturb(smidgen.adapt(Net(layers, 24), own))
    size = bytes_of(smidgen.save(net, tmp_path))
    assert size <= limit
    layers_found = len(api.adapted_layers(net))
    spare = limit - size - layers_found  # a number more for each, of four bits
    assert size <= limit and spare <= 40, f"{spare} bytes of {limit} are left"
    through_peft = testing.perturb(get_peft_model(Net(layers, 24), own))
    through_peft.save_pretrained(tmp_path / "peft")
    assert bytes_of(tmp_path / "peft") <= limit + 160
    testing.close(smidgen.load(Net(layers, 24), tmp_path)(inputs(24)), net(inputs(24)), "loaded", "int4")


def test_what_a_head_adds_besides_its_numbers_is_in_the_budget(tmp_path: Path) -> None:
    for limit in (1500, 3000):
        net = Net(12, 24)
        own = budget.allocate(net, limit, modules_to_save=["head"], labels=["bad", "good"], task_type="SEQ_CLS")
        net = testing.perturb(smidgen.adapt(net, own))
        folder = smidgen.save(net, tmp_path / str(limit))
        heads = [value for name, value in load_file(folder / "adapter_model.safetensors").items() if "head" in name]
        size = bytes_of(folder) - sum(value.nbytes for value in heads)
        assert heads and limit - 120 <= size <= limit


def test_file_bytes_is_what_a_save_takes(tmp_path: Path) -> None:
    for i, own in enumerate(
        (
            smidgen.config("svfit", r=5, target_modules=["q_proj"]),
            smidgen.config("loldu", r=3, target_modules=["q_proj", "v_proj"], store_dtype="float16"),
            smidgen.config("tlora(2,2)", target_modules=["v_proj"], task_type="SEQ_CLS"),
        )
    ):
        said = budget.file_bytes(Net(), own)
        found = bytes_of(smidgen.save(testing.perturb(smidgen.adapt(Net(), own)), tmp_path / str(i)))
        assert said == found, own.label()


def test_the_folder_of_the_base_counts_by_its_name_alone(tmp_path: Path) -> None:
    net, long = Net(), "/" + "x" * 300 + "/base-1"
    net.name_or_path = long  # type: ignore[assignment]
    own = budget.allocate(net, 900)
    own.base_model_name_or_path = long
    folder = smidgen.save(smidgen.adapt(Net(), own), tmp_path)
    assert 860 < bytes_of(folder) <= 900
    assert api.read_smidgen_config(folder).base_model_name_or_path == "base-1"


def test_too_small_says_the_least_that_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give at least") as found:
        budget.allocate(Net(), "100B")
    least = int(str(found.value).rpartition("at least ")[2].rstrip(".").replace(",", ""))
    own = budget.allocate(Net(), least)
    net = smidgen.adapt(Net(), own)
    assert smidgen.trained_numbers(net) == 2  # one byte of the file
    with pytest.raises(ConfigError, match="too small"):
        budget.allocate(Net(), least - 1)


def test_the_gradient_decides() -> None:
    blind, loss = Blind(2, 128), lambda m: m(inputs(128)).square().sum()
    place = budget.allocate(blind, 900, target_modules=["q_proj", "v_proj"], store_dtype="float16")
    told = budget.allocate(blind, 900, [loss], target_modules=["q_proj", "v_proj"], store_dtype="float16")
    assert set(api.adapted_layers(smidgen.adapt(Blind(2, 128), place))) == {"layers.1.v_proj"}
    chosen = set(api.adapted_layers(smidgen.adapt(Blind(2, 128), told)))
    assert chosen and all(name.startswith("layers.0.") for name in chosen)


def test_batches_with_a_loss_are_the_same_as_callables() -> None:
    batches = [inputs(rows=r) for r in (2, 3)]
    pair = budget.allocate(Net(), 900, (lambda m, x: m(x).square().sum(), batches))
    callables = budget.allocate(Net(), 900, [lambda m, x=x: m(x).square().sum() for x in batches])
    assert pair.to_dict() == callables.to_dict()


def test_the_model_is_left_as_it_was() -> None:
    net = Net()
    net.head.requires_grad_(False)
    net.norm.weight.grad = torch.ones_like(net.norm.weight)
    before, grads = testing.snapshot(net), [p.grad for p in net.parameters()]
    budget.allocate(net, 900, [loss_of()])
    testing.unchanged(before, net, "allocating")
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))

    def broken(model: nn.Module) -> Tensor:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        budget.allocate(net, 900, [loss_of(), broken])
    testing.unchanged(before, net, "a loss that fails")
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_the_place_decides(weight: float, caplog: pytest.LogCaptureFixture) -> None:
    own = budget.allocate(Net(), 900, [loss_of(weight)])
    assert own.to_dict() == budget.allocate(Net(), 900).to_dict()
    assert "no finite gradient" in caplog.text


def test_numbers_are_kept_in_4_bits_unless_told(tmp_path: Path) -> None:
    told = {torch.float16: {"store_dtype": "float16"}, torch.float32: {"store_dtype": "float32"}}
    for dtype, options in {torch.uint8: {}, **told}.items():
        net = testing.perturb(smidgen.adapt(Net(), budget.allocate(Net(), 1000, **options)))
        folder = smidgen.save(net, tmp_path / str(dtype))
        assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {dtype}
        assert bytes_of(folder) <= 1000
        assert smidgen.verify(Net(), folder).ok and smidgen.verify(net, folder).ok


def test_nothing_to_choose_from() -> None:
    with pytest.raises(TargetError, match="no module is named"):
        budget.allocate(Net(), 1000, target_modules=["k_proj"])


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"a.0.q", "a.1.q"}, ["q"]),
        ({"a.0.q"}, "a.0.q"),
        ({"a.0.q", "a.0.v"}, "a.0.(q|v)"),
        ({"a.1.q", "a.10.q", "a.1.v", "a.10.v"}, "a.(1|10).(q|v)"),
    ],
)
def test_targets_in_few_bytes(wanted: set[str], pattern: Any) -> None:
    names = [f"a.{i}.{end}" for i in range(11 if len(wanted) == 4 else 2) for end in "qv"] + ["head"]
    assert budget._pattern(sorted(wanted), names) == pattern
