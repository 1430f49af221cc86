"""Small layouts and zoos without any training."""

from dataclasses import replace

import torch
from torch import nn

import smidgen
from smidgen.difflora.weightspace.layout import Layout, layout_of
from smidgen.difflora.zoo.records import Record, pack_group
from smidgen.difflora.zoo.store import Zoo


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"to_q": nn.Linear(12, 16), "to_k": nn.Linear(12, 10)})


def layout(method: str = "lora", seed: int = 0, **options) -> Layout:
    options = options or {"r": 2}
    model = smidgen.adapt(net(seed), method, target_modules=["to_q", "to_k"], **options)
    return layout_of(model, model.peft_config["default"])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(name: str, **changes) -> Record:
    plain = Record(name, 0, 0, "train", 10, True, "kept", "", 0.1, 0.2, 0.9, 0.1, "")
    return replace(plain, **changes)


def zoo(folder, groups: int = 3, size: int = 2, order=None, own: Layout | None = None) -> Zoo:
    """A zoo of ``groups`` groups of ``size`` adapters, written in any order."""
    own = own or layout()
    made = Zoo.create(folder, own)
    for group in order or range(groups):
        rows = numbers(size, own.size, seed=group)
        made.commit(pack_group(own, group, rows, [record(f"p{group}{i}") for i in range(size)]))
    return made
