"""Weights that do not determine their factors: every machine, and a re-cast copy, rebuilds the same adapter."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from benchmarks.degenerate import REFUSED, disturbed, error, model, saved, weights
from smidgen.adapters.linalg.ties import TIE, follow_ties, svd_with_ties
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import BaseLockError, ConfigError

KINDS = weights(16)


@pytest.mark.parametrize("how", ["", "ulp", "bf16"])
@pytest.mark.parametrize("method", ["svfit", "loldu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_adapter_comes_back_or_is_refused(kind: str, method: str, how: str, tmp_path: Path) -> None:
    for r in (3, 8, "full"):
        wanted = saved(KINDS[kind], method, r, tmp_path / str(r))
        found = error(disturbed(KINDS[kind], how), tmp_path / str(r), wanted)
        tied = "ties" in json.loads((tmp_path / str(r) / "adapter_config.json").read_text())
        assert found <= (1e-2 if tied or how != "bf16" else 0.05) and (found != REFUSED or how == "bf16"), (r, found)


def turned(found: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
    """Singular vectors as another LAPACK may give them: turned within a run of equal values."""
    turn = torch.linalg.qr(torch.randn(stop - start, stop - start, dtype=torch.float64))[0]
    u, s, vh = (t.clone() for t in found)
    u[:, start:stop] = u[:, start:stop] @ turn
    vh[start:stop] = turn.mT @ vh[start:stop]
    return u, s, vh


@pytest.mark.parametrize("kind", ["orthogonal", "identity", "two values", "block-diagonal twins"])
@pytest.mark.parametrize("r", [5, 16])
def test_whatever_basis_lapack_gives(kind: str, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = KINDS[kind]
    ties = svd_with_ties(w, r)[3]
    assert len(ties)
    kept = follow_ties(w, r, ties)
    real = torch.linalg.svd(w.double(), full_matrices=False)
    s, start = real[1], 0
    while start < len(s):  # every run of equal values
        stop = start + 1 + int((s[start + 1 :] > s[start] - TIE * s[0]).sum())
        real, start = turned(tuple(real), start, stop), stop  # type: ignore[assignment]
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **k: real if torch.equal(a, w.double()) else svd(a, **k))
    for one, other in zip(kept, follow_ties(w, r, ties), strict=True):
        assert float((one - other).abs().max()) < 1e-5


def test_factors_along_ties_are_singular_vectors() -> None:
    for kind, w in KINDS.items():
        for r in (3, 8, min(w.shape)):
            u, s, vh, ties = svd_with_ties(w, r)
            if len(ties):
                u, s, vh = follow_ties(w, r, ties)
            rank = int((s > 0).sum())
            eye = torch.eye(rank)
            assert torch.allclose(u[:, :rank].mT @ u[:, :rank], eye, atol=1e-5), kind
            assert torch.allclose(vh[:rank] @ vh[:rank].mT, eye, atol=1e-5), kind
            assert torch.allclose(w @ vh[:rank].mT, u[:, :rank] * s[:rank], atol=1e-4 * float(s[0] or 1)), kind
            assert not u[:, rank:].any() and not vh[rank:].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_deficient_rank_beyond_the_kept_values_is_told(axis: int) -> None:
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    w = torch.cat([w, w.flip(0)], 0) if axis == 0 else torch.cat([w, w], 1)
    assert not len(svd_with_ties(w, 3)[3])  # as wide as its rank
    twice = torch.cat([w, w], 1) if axis == 0 else torch.cat([w, w], 0)
    u, s, vh, ties = svd_with_ties(twice, 3)
    assert ties.tolist() == [3]
    for one, other in zip((u, s, vh), follow_ties(twice, 3, ties), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    "ties", [[-1], [9], [2, 0, 1], [4, 0, 2, 1, 1], [4, 2, 1, 0], [4, 0, 9, 1, 2], [4, 0, 2, 1, 99], [4, 3]]
)
def test_ties_that_no_weight_has(ties: list[int]) -> None:
    with pytest.raises(ConfigError, match="no ties of a weight"):
        follow_ties(torch.eye(8), 4, torch.tensor(ties, dtype=torch.int32))


def test_an_ordinary_weight_has_none_and_its_file_is_as_ever(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(torch.randn(16, 16), "svfit", "full", tmp_path)
    assert "ties" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_file_of_before_there_were_ties(tmp_path: Path) -> None:
    """It has none to follow: right where LAPACK gives what it gave, refused where not."""
    wanted = saved(KINDS["orthogonal"], "svfit", 8, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("ties") and config.pop("checksum")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert error(KINDS["orthogonal"], tmp_path, wanted) == REFUSED  # this one was saved along ties
    with pytest.raises(BaseLockError, match=r"give deltas that differ by \d+.*store_factors=True"):
        smidgen.load(model(KINDS["orthogonal"]), tmp_path)


@pytest.mark.parametrize("change", ["!", "AAAA", ""])
def test_damaged_ties(change: str, tmp_path: Path) -> None:
    saved(KINDS["identity"], "svfit", 8, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["ties"]["0"] = change
    config.pop("checksum")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(smidgen.SmidgenError, match=r"ties of '0'.*damaged"):
        smidgen.load(model(KINDS["identity"]), tmp_path)


# ---- the base's weights after the adapter was put in -----------------------------------------------------------------


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def train(adapted: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapted(X) - 1).square().mean().backward()
        optimizer.step()


def put_weights(adapted: Any, seed: int, assign: bool = False) -> None:
    for at in ("0", "2"):
        layer = adapted.get_submodule(at)
        layer.base_layer.load_state_dict(net(seed).get_submodule(at).state_dict(), assign=assign)


@pytest.mark.parametrize("method", ["svfit", "loldu", "lora", "tlora(2,2)", "seeded"])
@pytest.mark.parametrize("when", ["before training", "assigned before training", "after training"])
def test_a_base_that_gets_its_weights_later(
    method: str, when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = smidgen.adapt(net(0), method, target_modules=["0", "2"])
    if when == "after training":
        train(adapted)
    put_weights(adapted, 1, assign=when.startswith("assigned"))
    if when == "before training":
        assert torch.equal(adapted(X), net(1)(X))
    train(adapted)
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.save(adapted, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text()).get("store_factors", False)
    assert stored is (method in ("svfit", "loldu") and when != "before training")
    assert ("its factors cannot be made of them again" in caplog.text) is stored
    loaded = smidgen.load(net(1), tmp_path)
    assert torch.allclose(loaded(X), adapted(X), atol=1e-2 if method == "seeded" else 1e-5)  # in halves
    for carrier in (adapted, loaded, net(1)):
        assert smidgen.verify(carrier, tmp_path).ok, smidgen.verify(carrier, tmp_path).reasons


def test_through_pefts_own_save(tmp_path: Path) -> None:
    import peft

    adapted: Any = peft.get_peft_model(net(0), smidgen.config("svfit", target_modules=["0", "2"]))
    train(adapted)
    put_weights(adapted.base_model.model, 1)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(1), tmp_path)
    assert torch.allclose(loaded(X), adapted(X), atol=1e-5)


@pytest.mark.parametrize("method", ["svfit", "loldu"])
def test_factors_are_there_as_soon_as_an_adapter_is(method: str, tmp_path: Path) -> None:
    import peft

    fresh: Any = peft.get_peft_model(net(0), smidgen.config(method, target_modules=["0"]))
    assert all(layer.smidgen_slots["default"].ready for layer in adapted_layers(fresh).values())
    fresh.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(0), tmp_path)
    assert all(layer.smidgen_slots["default"].ready for layer in adapted_layers(again).values())
    loaded = smidgen.load(net(0), tmp_path)
    parameters = {k: v.detach() for k, v in loaded.named_parameters()}
    grad = torch.func.grad(lambda p: torch.func.functional_call(loaded, p, (X,)).sum())(parameters)
    assert any(bool(g.any()) for n, g in grad.items() if "smidgen" in n)
    assert torch.allclose(
        torch.export.export(smidgen.load(net(0), tmp_path, "b"), (X,)).module()(X), loaded(X), atol=1e-5
    )


# ---- factors in the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svfit", "loldu", "lora"])
@pytest.mark.parametrize("share", [0.05, 0.5, 5.0])
def test_factors_stored_at_save_go_on_any_base_of_the_shapes(
    method: str, share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = smidgen.adapt(net(0), method, target_modules=["0", "2"])
    train(adapted)
    smidgen.save(adapted, tmp_path, store_factors=True)
    assert smidgen.verify(adapted, tmp_path).ok and not adapted.peft_config["default"].store_factors
    other = net(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(share * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape))
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.load(other, tmp_path)
    assert ("another base" in caplog.text) is (share > 0.2) and ("changed since" in caplog.text) is (share < 0.2)
    report = smidgen.verify(other, tmp_path)
    assert report.ok and report.canary_error == 0 and report.notes, report.reasons
    for one, two in zip(adapted_layers(adapted).values(), adapted_layers(other).values(), strict=True):
        assert torch.equal(one.delta_matrix("default"), two.delta_matrix("default"))
    with pytest.raises(smidgen.SmidgenError, match="shape"):
        smidgen.load(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)), tmp_path)


def test_verifys_advice_is_true(tmp_path: Path) -> None:
    adapted = smidgen.adapt(net(0), "svfit", r="full", target_modules=["0", "2"])
    train(adapted)
    other = net(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape))
    smidgen.save(adapted, tmp_path / "small")
    advice = "To move it here, save it with smidgen.save(..., store_factors=True)"
    assert advice in smidgen.verify(other, tmp_path / "small").reasons[0]
    with pytest.raises(BaseLockError, match="To move it here"):
        smidgen.load(other, tmp_path / "small")
    smidgen.save(adapted, tmp_path / "whole", store_factors=True)
    assert smidgen.verify(other, tmp_path / "whole").ok
    tlora = smidgen.adapt(net(0), "rotation+spectral", r=4, target_modules=["0", "2"])
    train(tlora)
    smidgen.save(tlora, tmp_path / "turned", store_factors=True)
    with pytest.raises(BaseLockError) as raised:  # a transform makes something else of other weights
        smidgen.load(net(5), tmp_path / "turned")
    assert "To move it here" not in str(raised.value)


def test_peft_methods_have_no_factors_to_store(tmp_path: Path) -> None:
    import peft

    adapted = smidgen.adapt(net(0), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(smidgen.SmidgenError, match="store_factors is for smidgen's methods"):
        smidgen.save(adapted, tmp_path / "a", store_factors=True)
    assert not (tmp_path / "a" / "adapter_config.json").exists()
