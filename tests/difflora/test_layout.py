"""The layout: pack and unpack, adapters from rows, and what does not belong together."""

from dataclasses import replace

import pytest
import torch

import smidgen
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.difflora.weightspace.layout import Layout, check_model, write_adapter
from smidgen.errors import AdapterFileError, BaseLockError, DataError

from .helpers import layout, net, numbers

FAMILIES = {
    "lora": {"r": 2}, "svfit": {"r": 4}, "loldu": {"r": 4}, "tlora": {}, "tlora_star": {"residual_rank": 1},
}  # fmt: skip


@pytest.mark.parametrize("method", FAMILIES)
def test_a_row_becomes_the_adapter_it_was(method, tmp_path):
    own = layout(method, **FAMILIES[method])
    row = numbers(own.size) * 0.3
    write_adapter(own, row, net(), tmp_path)
    model = smidgen.load(net(), tmp_path)
    found = own.pack({key: layer.slot("default").trained() for key, layer in adapted_layers(model).items()})
    assert torch.equal(found, row)
    assert own.size == smidgen.trained_numbers(model)
    base = net()
    write_adapter(own, row, base, tmp_path / "again")
    assert not adapted_layers(base), "the base is left as it was"


def test_pack_and_unpack_keep_leading_axes_and_gradients():
    own = layout()
    rows = numbers(3, 5, own.size).requires_grad_(True)
    tensors = own.unpack(rows)
    assert tensors["to_q"]["residual_a"].shape == (3, 5, 2, 12)
    assert torch.equal(own.pack(tensors), rows)
    own.pack(tensors).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_json_keeps_everything_and_notices_damage():
    own = layout(alpha=4.0, r=2)
    assert own.entries[0].scale == 2.0
    again = Layout.from_json(own.to_json())
    assert again == own and again.digest == own.digest
    for damaged in (own.to_json()[:-3], "{}", own.to_json().replace('"float32"', '"float8"')):
        with pytest.raises(DataError, match="damaged"):
            Layout.from_json(damaged)
    shifted = replace(own, entries=tuple(reversed(own.entries)))
    with pytest.raises(DataError, match="offsets"):
        Layout.from_json(shifted.to_json())


def test_what_pack_refuses():
    own = layout()
    tensors = own.unpack(numbers(own.size))
    missing = {key: dict(value) for key, value in tensors.items()}
    del missing["to_q"]["residual_b"]
    with pytest.raises(AdapterFileError, match="lacks 'residual_b' of 'to_q'"):
        own.pack(missing)
    with pytest.raises(AdapterFileError, match=r"no tensor 'residual_a' of 'to_qq'\. Did you mean 'to_q'"):
        own.pack(tensors | {"to_qq": {"residual_a": torch.zeros(2)}})
    with pytest.raises(AdapterFileError, match="share rank and targets"):
        own.pack(tensors | {"to_q": {"residual_a": torch.zeros(3, 12), "residual_b": torch.zeros(16, 3)}})
    with pytest.raises(DataError, match="have 5 numbers"):
        own.unpack(torch.zeros(5))


def test_another_base_family_or_rank_does_not_belong():
    own = layout()
    own.check_same(layout())
    with pytest.raises(BaseLockError, match="another base"):
        own.check_same(layout(seed=1))
    with pytest.raises(DataError, match="mixed ranks"):
        own.check_same(layout(r=3))
    with pytest.raises(DataError, match="'spectral', here it is 'low_rank'"):
        own.check_same(layout("svfit", r=2))
    with pytest.raises(DataError, match="scale"):
        own.check_same(layout(r=2, alpha=4.0))
    check_model(own, net())
    with pytest.raises(BaseLockError, match="another base model"):
        check_model(own, net(seed=1))
    with pytest.raises(BaseLockError, match="no module 'to_k'"):
        check_model(own, torch.nn.ModuleDict({"to_q": torch.nn.Linear(12, 16)}))
