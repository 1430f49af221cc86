"""Another rank for a file: what is cut off is told, what is added changes nothing."""

import pytest
import torch

import smidgen
from smidgen.adapters.resize import resize
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import SmidgenError
from tests.adapters.helpers import Net, trained


def saved(folder, method, **options):
    model = trained(method, **options)
    return smidgen.save(model, folder), deltas(model)


def deltas(model):
    return {n: layer.delta_matrix("default").detach() for n, layer in adapted_layers(model).items()}


def error(folder, wanted):
    model = smidgen.load(Net(), folder)
    assert smidgen.verify(model, folder, lambda m: m(torch.randn(2, 16))).ok
    found = deltas(model)
    off = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return (off / sum(float(d.square().sum()) for d in wanted.values())) ** 0.5


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 4, "alpha": 8}, {"r": 4, "scaling": "rslora", "alpha": 2.0}])
def test_a_lora_keeps_its_leading_directions(options, tmp_path):
    folder, wanted = saved(tmp_path / "a", "lora", **options)
    found = resize(folder, out=tmp_path / "b", rank=2)
    assert set(found.after.values()) == {2} and 0 < found.error < 1
    assert error(tmp_path / "b", wanted) == pytest.approx(found.error, rel=1e-3)
    best = sum(float(torch.linalg.svdvals(d)[2:].square().sum()) for d in wanted.values())
    assert found.error == pytest.approx((best / sum(float(d.square().sum()) for d in wanted.values())) ** 0.5, rel=1e-4)
    grown = resize(folder, out=tmp_path / "c", rank=9)
    assert grown.error == 0 and error(tmp_path / "c", wanted) < 1e-5
    back = resize(tmp_path / "c", out=tmp_path / "d", energy=1.0)
    assert set(back.after.values()) == {4} and error(tmp_path / "d", wanted) < 1e-5


def test_a_diagonal_is_cut_at_its_end(tmp_path):
    for method in ("svfit", "loldu"):
        folder, wanted = saved(tmp_path / method, method, r=8, alpha=4.0)
        found = resize(folder, out=tmp_path / f"{method} 3", rank=3)
        got = error(tmp_path / f"{method} 3", wanted)
        assert 0 < got < 1 and (method == "loldu" or got == pytest.approx(found.error, rel=1e-3))
    grown = resize(tmp_path / "svfit", out=tmp_path / "more", rank=64)
    assert set(grown.after.values()) == {16} and grown.error == 0
    assert error(tmp_path / "more", saved(tmp_path / "again", "svfit", r=8, alpha=4.0)[1]) < 1e-5
    some = resize(tmp_path / "svfit", out=tmp_path / "most", energy=0.9)
    assert min(some.after.values()) >= 1 and some.error <= 0.1**0.5 + 1e-6


def test_what_has_no_rank_is_said_and_nothing_is_written(tmp_path):
    oft, _ = saved(tmp_path / "oft", "oft", block_size=4)
    loldu, _ = saved(tmp_path / "loldu", "loldu", r=4)
    for folder, options, words in [
        (oft, {"rank": 2}, "no rank to change"),
        (loldu, {"rank": 9}, "cannot grow beyond rank 4"),
        (loldu, {}, "either a rank or an energy"),
        (loldu, {"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        (loldu, {"rank": 0}, "whole number of at least 1"),
        (loldu, {"energy": 1.5}, "energy"),
    ]:
        with pytest.raises(SmidgenError, match=words):
            resize(folder, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
