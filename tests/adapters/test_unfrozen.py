"""What is unfrozen by hand beside an adapter is saved or refused, by every route and by verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import smidgen
from smidgen import testing
from smidgen.errors import SmidgenError
from smidgen.training import engine

from .helpers import Net, inputs, trained


def save(model: nn.Module, folder: Path) -> None:
    smidgen.save(model, folder)


def save_by_peft(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)


ROUTES: dict[str, tuple[Callable[..., nn.Module], Callable[..., None]]] = {
    "smidgen": (smidgen.adapt, save),
    "peft": (get_peft_model, save_by_peft),
    "smidgen around peft's": (get_peft_model, save),
}


def head_of(model: nn.Module) -> nn.Linear:
    return next(m for n, m in model.named_modules() if n.endswith("head"))  # type: ignore[return-value]


@pytest.mark.parametrize("route", ROUTES)
def test_an_unfrozen_head_is_refused_then_saved_once_it_is_named(route: str, tmp_path: Path) -> None:
    put, write = ROUTES[route]
    model = put(Net(), smidgen.config("svfit", target_modules=["q_proj"]))
    testing.perturb(model)
    write(model, tmp_path / "before")
    head_of(model).requires_grad_(True)
    with torch.no_grad():
        head_of(model).weight += 0.5
    with pytest.raises(
        SmidgenError, match=r"2 tensors of the base were unfrozen by hand, of 'head'.*modules_to_save = \['head'\]"
    ):
        write(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    found = smidgen.verify(model, tmp_path / "before")
    assert not found.ok and "unfrozen by hand" in str(found)

    model.peft_config["default"].modules_to_save = ["head"]
    write(model, tmp_path / "adapter")
    assert smidgen.verify(model, tmp_path / "adapter").ok
    for loaded in (smidgen.load(Net(), tmp_path / "adapter"), PeftModel.from_pretrained(Net(), tmp_path / "adapter")):
        testing.close(loaded(inputs()), model(inputs()), "with the head")
    assert smidgen.verify(Net(), tmp_path / "adapter").ok


def test_a_head_that_is_frozen_again_is_no_matter(tmp_path: Path) -> None:
    model = trained()
    head_of(model).requires_grad_(True)
    head_of(model).requires_grad_(False)
    smidgen.save(model, tmp_path)
    assert smidgen.verify(model, tmp_path).ok


@pytest.mark.parametrize("part", ["norm", "layers.0.q_proj.base_layer", "layers.1"])
def test_other_parts_are_refused_by_name(part: str, tmp_path: Path) -> None:
    model = trained()
    model.get_submodule(part).requires_grad_(True)
    with pytest.raises(SmidgenError, match=part.removesuffix(".base_layer")):
        smidgen.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_of_pefts_own_too(tmp_path: Path) -> None:
    model = smidgen.adapt(Net(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    head_of(model).requires_grad_(True)
    with pytest.raises(SmidgenError, match="'head'"):
        smidgen.save(model, tmp_path)
    biased = smidgen.adapt(Net(), LoraConfig(target_modules=["q_proj"], bias="all"))
    smidgen.save(biased, tmp_path)  # peft's own option trains and saves biases


def test_a_second_adapter_a_bank_and_heads_of_adapters_are_no_hands_work(tmp_path: Path) -> None:
    model = trained("svfit", modules_to_save=["head"])
    smidgen.adapt(model, "lora", "other", target_modules=["v_proj"])
    bank = smidgen.Bank(model, model.peft_config["default"], ["a"])
    smidgen.save(model, tmp_path)
    assert bank.names == ["a"]
    engine.hold_statistics(model)
    smidgen.save(model, tmp_path / "other", "other")
