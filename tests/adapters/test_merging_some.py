"""Merging some of the adapters, deleting and adding while merged, merging under a bank: right, or refused in words."""

import logging
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import SmidgenError

METHODS = ["svfit", "loldu", "tlora", "tlora_star", "oft", "lora", "seeded", "diagonal"]
X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def config(method):
    return smidgen.config(method, target_modules=["up", "down"], store_dtype="float32")


def noise(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if f".{name}." in key:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def carrying(method, names="abc", active="ab"):
    """A peft model with adapters of one method; what each set of active ones answers."""
    model = get_peft_model(Net(), config(method), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(method))
    for seed, name in enumerate(names):
        noise(model, name, seed)
    model.base_model.set_adapter(list(active))
    return model


def with_active(model, names):
    model.base_model.set_adapter(list(names))
    return model(X).detach()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_subset_of_the_active_ones_keeps_the_others_at_work(method):
    model = carrying(method, active="abc")
    wanted, base = with_active(model, "abc"), Net()(X)
    weight = model.base_model.model.up.get_base_layer().weight.clone()
    for some in (["a"], ["b", "c"], ["a", "b", "c"]):
        model.merge_adapter(adapter_names=some)
        close(model(X), wanted)
        assert not torch.equal(model.base_model.model.up.get_base_layer().weight, weight)
        rest = [n for n in "abc" if n not in some]
        if rest:
            model(X).sum().backward()
        for layer in adapted_layers(model).values():  # and they train
            for name in rest:
                assert any(p.grad is not None for p in layer.smidgen_slots[name].parameters())
        with model.disable_adapter():
            testing.same(model(X), base, "off")
        model.unmerge_adapter()
        close(model(X), wanted)
        testing.same(model.base_model.model.up.get_base_layer().weight, weight, "unmerged")


@pytest.mark.parametrize("method", METHODS)
def test_merging_one_after_the_other_adds(method):
    model = carrying(method, active="ab")
    wanted = with_active(model, "ab")
    for name in "ab":
        model.merge_adapter(adapter_names=[name])
        close(model(X), wanted)
    assert all(layer.merged_adapters == ["a", "b"] for layer in adapted_layers(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_an_inactive_one_merged_takes_the_place_of_the_active_and_that_is_said(method, caplog):
    model = carrying(method, active="a")
    wanted = with_active(model, "b")
    model.base_model.set_adapter(["a"])
    with caplog.at_level(logging.WARNING, "smidgen"):
        model.merge_adapter(adapter_names=["b"])
    assert "'b', which is not active: until unmerge_adapter() the active 'a' is without effect" in caplog.text
    close(model(X), wanted)
    both = carrying(method, active="a")
    for layer in adapted_layers(model).values():  # as diffusers activates: the layers alone, merged or not
        layer.set_adapter(["c"])
    close(model(X), with_active(both, "bc"))


def test_activating_while_merged_unmerges_and_says_so(caplog):
    model = smidgen.adapt(smidgen.adapt(Net(), config("svfit"), "a"), config("svfit"), "b")
    noise(noise(model, "a", 1), "b", 2)
    wanted = model(X)
    smidgen.set_active(model, "a")
    for layer in adapted_layers(model).values():
        layer.merge()
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.set_active(model, "b")
    assert "unmerged first" in caplog.text
    close(model(X), wanted)


def test_a_name_that_nobody_has_is_refused_before_anything():
    model = carrying("svfit")
    before = model(X)
    with pytest.raises(SmidgenError, match=r"no adapter 'bb'\. Did you mean 'b'"):
        model.merge_adapter(adapter_names=["a", "bb"])
    testing.same(model(X), before, "untouched")
    assert not any(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_deleting_while_merged(method):
    model, base = carrying(method, active="ab"), Net()(X)
    wanted = with_active(model, "ab")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("a")
    for layer in adapted_layers(model).values():  # as transformers and diffusers do it
        with pytest.raises(SmidgenError, match="'a' is merged; unmerge it before it is deleted"):
            layer.delete_adapter("a")
    close(model(X), wanted)
    model.delete_adapter("c")  # not merged: gone, and nothing else
    close(model(X), wanted)
    model.unmerge_adapter()
    model.delete_adapter("a")
    close(model(X), with_active(carrying(method), "b"))
    with model.disable_adapter():
        testing.same(model(X), base, "off")


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_load_leaves_the_merged_ones_merged(method, tmp_path):
    model = carrying(method, active="a")
    model.merge_adapter()
    before, names = model(X), smidgen.names(model)
    smidgen.save(
        noise(smidgen.adapt(nn.Sequential(nn.Linear(32, 32)), method, target_modules=["0"]), "default", 9), tmp_path
    )
    with pytest.raises(SmidgenError):
        smidgen.load(model, tmp_path, "other")
    with pytest.raises(SmidgenError):
        smidgen.adapt(model, method, "other", target_modules=["nothing"])
    testing.same(model(X), before, "untouched")
    assert smidgen.names(model) == names and all(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_adding_while_another_is_merged(method):
    fresh = noise(get_peft_model(Net(), config(method), "b"), "b", 5)
    for add in ("peft", "smidgen"):
        model = carrying(method, names="a", active="a")
        model.merge_adapter()
        if add == "peft":
            model.add_adapter("b", config(method))
            model.set_adapter("b")
        else:
            smidgen.adapt(model, config(method), "b")
        noise(model, "b", 5)
        close(model(X), fresh(X))
        model.base_model.set_adapter(["a"])
        close(model(X), carrying(method, names="a", active="a")(X))


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_on_a_base_merged_for_good(method, tmp_path):
    model, base = (smidgen.merge(carrying(method, names="a", active="a")) for _ in range(2))
    smidgen.adapt(model, config(method), "b")
    noise(model, "b", 7)
    smidgen.save(model, tmp_path, "b")
    close(smidgen.load(base, tmp_path)(X), model(X))
    assert smidgen.verify(base, tmp_path).ok
    with pytest.raises(SmidgenError, match="base"):
        smidgen.load(Net(), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_merge_for_good_names_what_it_would_lose(method, caplog):
    model = carrying(method, active="ab")
    before = model(X)
    with pytest.raises(SmidgenError, match="b is active too: merge all of"):
        smidgen.merge(model, ["a"])
    testing.same(model(X), before, "untouched")
    with caplog.at_level(logging.WARNING, "smidgen"):
        model = smidgen.merge(model, ["a", "b"])
    assert "takes c out of the model too" in caplog.text
    close(model(X), before)


@pytest.mark.parametrize("method", METHODS)
def test_merging_under_a_bank(method):
    model = smidgen.adapt(Net(), config(method), "a")
    noise(model, "a", 1)
    bank = smidgen.Bank(model, config(method), ["one", "two"])
    bank.put("one", model, "a")
    noise(model, "a", 2)
    bank.put("two", model, "a")
    with bank.rows(["one", "two"] * 4):
        wanted = model(X).detach()
    with pytest.raises(SmidgenError, match="bank is on this model"):
        smidgen.merge(model)
    with warnings.catch_warnings():
        for layer in adapted_layers(model).values():
            layer.merge()
    with bank.rows(["one", "two"] * 4):
        close(model(X), wanted)
    for layer in adapted_layers(model).values():
        layer.unmerge()
    del bank
    live = model(X)
    close(smidgen.merge(model)(X), live)
