"""verify: a report that an adapter is on, for the right reasons, and that says why when it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import rewrite
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.methods import METHODS
from smidgen.adapters.tuner.kinds import LinearKind

from .helpers import Net, trained


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_on(method: str, tmp_path: Path) -> None:
    net = trained(method, "mine")
    smidgen.save(net, tmp_path, "mine")
    plain = Net()
    before = testing.snapshot(plain)
    for model in (net, plain, smidgen.load(Net(), tmp_path, "other")):
        report = smidgen.verify(model, tmp_path)
        assert report.ok, report.reasons
        assert report.layers == report.targets == 4 and report.base == "same"
        assert "adapter is ON" in str(report)
    testing.unchanged(before, plain, "a verified base")


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv2d_dilated", "conv2d_groups", "depthwise", "rough"])
@pytest.mark.parametrize("method", ["tlora(2,2)", "svfit", "loldu"])
def test_every_layer_kind(kind: str, method: str, tmp_path: Path) -> None:
    model, _ = testing.adapted(smidgen.config(method), kind)
    smidgen.save(model, tmp_path)
    report = smidgen.verify(testing.base(kind)[0], tmp_path)
    assert report.ok, report.reasons


def switched_off(net: nn.Module) -> None:
    for layer in smidgen.adapters.tuner.carried.adapted_layers(net).values():
        layer.enable_adapters(False)


def another_active(net: nn.Module) -> None:
    smidgen.adapt(net, "lora", "second", target_modules=["q_proj", "v_proj"])


def moved_on(net: nn.Module) -> None:
    testing.perturb(net, 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: smidgen.set_strength(net, 0.0), "strength 0 at 4 of 4"),
        (switched_off, "switched off at 4 of 4"),
        (another_active, "not active at 4 of 4"),
        (moved_on, "None of the model's adapters"),
        (lambda net: net.layers[0].q_proj.base_layer.weight.data.neg_(), "another base model"),
    ],
)
def test_an_adapter_that_is_not_on(change: Callable[[nn.Module], object], reason: str, tmp_path: Path) -> None:
    net = trained("svfit")
    smidgen.save(net, tmp_path)
    change(net)
    report = smidgen.verify(net, tmp_path)
    assert not report.ok and "adapter is OFF" in str(report)
    assert any(reason in r for r in report.reasons), report.reasons


@pytest.mark.parametrize("net", [Net(seed=1), Net(layers=1), Net(layers=3)])
def test_another_base(net: nn.Module, tmp_path: Path) -> None:
    smidgen.save(trained("loldu"), tmp_path)
    before = testing.snapshot(net)
    report = smidgen.verify(net, tmp_path)
    assert not report.ok and report.reasons
    testing.unchanged(before, net, "a base that does not fit")


def test_an_adapter_that_was_never_trained(tmp_path: Path) -> None:
    smidgen.save(smidgen.adapt(Net(), "svfit", target_modules=["q_proj"]), tmp_path)
    report = smidgen.verify(Net(), tmp_path)
    assert any("does nothing" in r for r in report.reasons)


def test_damaged_files_are_reasons_not_errors(tmp_path: Path) -> None:
    folder = smidgen.save(trained("lora"), tmp_path)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    rewrite(folder / "adapter_model.safetensors", whole[:-3])
    report = smidgen.verify(Net(), folder)
    assert not report.ok and "truncated" in report.reasons[0]
    assert not smidgen.verify(Net(), tmp_path / "nowhere").ok


def test_factors_that_were_rebuilt_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smidgen.adapters.residuals.spectral import Spectral

    smidgen.save(trained("svfit", r=4), tmp_path)
    right = Spectral.decompose

    def shuffled(self, weight, pins):  # type: ignore[no-untyped-def]
        factors, found = right(self, weight, pins)
        return factors | {"up": factors["up"].flip(1)}, found

    monkeypatch.setattr(Spectral, "decompose", shuffled)
    report = smidgen.verify(Net(), tmp_path)
    assert not report.ok and any("differ by" in r for r in report.reasons), report.reasons


def test_a_layer_that_does_not_apply_its_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smidgen.save(trained("lora"), tmp_path)
    monkeypatch.setattr(LinearKind, "output_shift", lambda self, factors, x, layer: x.new_zeros(*x.shape[:-1], 16))
    monkeypatch.setattr(LinearKind, "add_output_shift", lambda self, y, factors, x, layer: y)
    report = smidgen.verify(Net(), tmp_path)
    assert not report.ok and any("does not apply its delta" in r for r in report.reasons), report.reasons


def test_on_a_base_in_16_bits(tmp_path: Path) -> None:
    smidgen.save(trained("loldu"), tmp_path)
    report = smidgen.verify(Net().to(torch.bfloat16), tmp_path)
    assert report.base == "cast" and 0 < report.base_difference < 0.01
    assert report.canary_error is not None and report.canary_error < 0.05
