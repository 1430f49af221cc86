"""Singular values at zero, alpha beside a large r, odd ranks: as the released code has it, or refused in words."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters import methods
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import ConfigError, SmidgenError


class Net(nn.Module):
    """A square layer, and one with room for few directions, as in grouped query attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(16, 16, bias=False), nn.Linear(16, 6, bias=False)

    def forward(self, x):
        return torch.cat([self.q(x), self.v(x)], dim=-1)


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def filled(model, delta, name="default"):
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and f".{name}." in n:
                p.copy_(torch.as_tensor(delta).expand_as(p))
    return model


# ---- nonneg: relu(S + s delta), as in svdiff-pytorch's layers -------------------------------------------------------------


@pytest.mark.parametrize("delta", [-100.0, torch.linspace(-2, 2, 6)], ids=["all", "some"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("alpha", [None, 12, 3])
def test_nonneg_clamps_what_alpha_and_strength_scaled(alpha, strength, relative, delta):
    base = Net()
    u, s, vh = torch.linalg.svd(base.v.weight.detach(), full_matrices=False)
    scale = strength * (1 if alpha is None else alpha / 6) * (s if relative else 1)
    wanted = (u * torch.relu(s + scale * delta)) @ vh
    model = smidgen.adapt(Net(), "svfit", r=6, nonneg=True, alpha=alpha, relative=relative, target_modules=["v"])
    filled(model, delta)
    smidgen.set_strength(model, strength)
    torch.testing.assert_close(model.v(X), X @ wanted.T, rtol=1e-5, atol=1e-4)
    smidgen.merge(model)
    torch.testing.assert_close(model.v.weight, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 6, bias=False), nn.Conv2d(4, 6, 2, bias=False)], ids=["linear", "conv"]
)
def test_nonneg_in_a_bank_at_any_weight(layer, weight):
    model = smidgen.adapt(nn.Sequential(layer), "svfit", r=6, nonneg=True, alpha=12, target_modules=["0"])
    filled(model, torch.linspace(-2, 2, 6))
    x = X if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    smidgen.set_strength(model, weight)
    wanted = model(x).detach()
    bank = smidgen.Bank(model, model.peft_config["default"], ["a"])
    bank.put("a", model)
    with bank.rows(["a"] * len(x)):
        testing.close(model(x), wanted, "a row of a bank")


def test_two_nonneg_adapters_are_each_clamped_and_their_sum_is_not():
    base = Net()
    s = torch.linalg.svdvals(base.q.weight.detach())
    model = smidgen.adapt(Net(), "svfit", "a", r=16, nonneg=True, target_modules=["q"])
    smidgen.adapt(model, "svfit", "b", r=16, nonneg=True, target_modules=["q"])
    for name in ("a", "b"):
        smidgen.set_active(model, name)
        filled(model, -100.0, name)
    smidgen.set_active(model, ["a", "b"])
    testing.close(model.q(X), -(X @ base.q.weight.T), "S - S - S along every pair")
    assert float(s.min()) > 0


# ---- alpha over the r that was asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling, s", [("plain", 0.5), ("rslora", 4.0)])
@pytest.mark.parametrize("method", ["svfit", "loldu", "lora", "seeded"])
def test_alpha_is_divided_by_the_r_that_was_asked_for(method, scaling, s):
    model = smidgen.adapt(Net(), method, r=64, alpha=32, scaling=scaling, target_modules=["q", "v"])
    for layer in adapted_layers(model).values():
        assert layer.slot("default").residual.scale == s
    full = smidgen.adapt(Net(), method, r=6, alpha=3, scaling="plain", target_modules=["v"])
    assert adapted_layers(full)["v"].slot("default").residual.scale == 0.5


@pytest.mark.parametrize("r, nonneg, accepted", [(64, False, False), (6, False, True), (6, True, False)])
def test_a_file_from_before_is_refused_where_its_effect_would_change(r, nonneg, accepted, tmp_path):
    model = filled(smidgen.adapt(Net(), "svfit", r=r, alpha=32, nonneg=nonneg, target_modules=["v"]), 0.1)
    smidgen.save(model, tmp_path)
    wanted = model(X).detach()
    testing.close(smidgen.load(Net(), tmp_path)(X), wanted, "with a checksum")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["checksum"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if accepted:
        testing.close(smidgen.load(Net(), tmp_path)(X), wanted, "of an earlier version")
        return
    base = Net()
    with pytest.raises(SmidgenError, match="saved when alpha was divided by"):
        smidgen.load(base, tmp_path)
    assert not smidgen.names(base)


# ---- ranks and alphas that are none ---------------------------------------------------------------------------------------

RANKED = [name for name, row in methods.METHODS.items() if row.residual]


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "8", "half", "energy:0", "energy:2", "energy:x", float("nan"), [4]])
@pytest.mark.parametrize("method", RANKED)
def test_ranks_that_are_none_are_refused_by_every_method_alike(method, r):
    option = "residual_rank" if method == "tlora" else "r"
    for options in ({option: r}, {"rank_pattern": {"v": r}}):
        model = Net()
        with pytest.raises(
            ConfigError, match=r"whole number|takes a share|is no number that|needs singular values|ranks by module"
        ):
            smidgen.adapt(model, method, target_modules=["v"], **options)
        assert not smidgen.names(model) and type(model.v) is nn.Linear


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "full"])
def test_ring_ranks_of_transforms_too(rank):
    with pytest.raises(ConfigError, match=r"transform_rank must be a whole number of at least 1, got"):
        smidgen.adapt(Net(), "tlora", transform_rank=rank, target_modules=["v"])


@pytest.mark.parametrize("alpha", [0, float("nan"), float("inf"), "16", True])
@pytest.mark.parametrize("method", RANKED)
def test_alphas_that_are_none(method, alpha):
    with pytest.raises(ConfigError, match=r"alpha must be a finite number other than 0|is no number that an option"):
        smidgen.adapt(Net(), method, alpha=alpha, target_modules=["v"])


@pytest.mark.parametrize("method, r, found", [("svfit", "full", 6), ("loldu", "full", 6), ("seeded", "full", 6), ("svfit", "energy:1.0", 6), ("lora", np.int64(3), 3), ("svfit", np.int32(3), 3)])  # fmt: skip
def test_ranks_that_mean_something(method, r, found, tmp_path):
    model = smidgen.adapt(Net(), method, r=r, target_modules=["v"])
    assert adapted_layers(model)["v"].slot("default").residual.r == found
    smidgen.save(model, tmp_path)
    assert smidgen.names(smidgen.load(Net(), tmp_path)) == ["default"]
