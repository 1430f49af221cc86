"""The seeded residual: directions that are the same everywhere, more than the matrix has rows, exact on any base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.api import adapted_layers
from smidgen.adapters.member import stable_signs
from smidgen.adapters.residuals.seeded import Seeded

from .helpers import Net, trained

GOLDEN = "--+-++-+--+++-++--++---+---+----"


def test_signs_are_the_same_on_every_machine() -> None:
    """These bits must never change: files hold coefficients of the directions they make."""
    found = stable_signs("0/layer/residual/up", (2, 16))
    assert "".join("+" if s > 0 else "-" for s in found.flatten().tolist()) == GOLDEN
    assert torch.equal(stable_signs("0/layer/residual/up", (32,)).reshape(2, 16), found)
    assert abs(float(stable_signs("x", (512, 64)).mean())) < 0.02


def test_against_a_sum_of_outer_products() -> None:
    member = Seeded(6, 5, r=9, alpha=3.0, scaling="plain")
    constants = member.constants("seed")
    delta = torch.randn(9, generator=torch.Generator().manual_seed(0))
    triples = zip(delta, constants["up"].T, constants["down"], strict=True)
    wanted = torch.stack([3 / 9 * d * torch.outer(u, v) for d, u, v in triples]).sum(dim=0)
    found = member.factors({"delta": delta, **constants}).dense()
    testing.close(found, wanted, "D")
    norms = [float(torch.outer(u, v).norm()) for u, v in zip(constants["up"].T, constants["down"], strict=True)]
    assert norms == pytest.approx([1.0] * 9, rel=1e-5)


def test_as_many_directions_as_numbers_span_every_matrix() -> None:
    member = Seeded(4, 5, r=60, alpha=None)
    c = member.constants("seed")
    atoms = torch.einsum("ok,ki->koi", c["up"], c["down"]).flatten(1)
    assert int(torch.linalg.matrix_rank(atoms)) == 20
    wanted = torch.randn(20, generator=torch.Generator().manual_seed(0))
    delta = torch.linalg.lstsq(atoms.T, wanted[:, None], driver="gelsd").solution[:, 0]
    testing.close(member.factors({"delta": delta, **c}).dense().flatten(), wanted, "a matrix of full rank", factor=50)


def test_targets_and_seeds_have_their_own_directions() -> None:
    net = trained("seeded", r=4)
    ups = [layer.smidgen_slots["default"].residual_up for layer in adapted_layers(net).values()]
    assert all(not torch.equal(ups[0], up) for up in ups[1:])
    other = adapted_layers(smidgen.adapt(Net(), "seeded", r=4, seed=1))
    assert not torch.equal(next(iter(other.values())).smidgen_slots["default"].residual_up, ups[0])


def test_the_update_is_the_same_on_a_recast_and_on_another_number_of_threads(tmp_path: Path) -> None:
    net = trained("seeded", r=40, store_dtype="float32")
    folder = smidgen.save(net, tmp_path)
    half = smidgen.load(Net().bfloat16().float(), folder)
    for name, layer in adapted_layers(net).items():
        testing.same(adapted_layers(half)[name].delta_matrix("default"), layer.delta_matrix("default"), name)


def test_halves_hold_half_the_bytes(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float16", "float32"):
        folder = smidgen.save(trained("seeded", r=1000, store_dtype=dtype), tmp_path / dtype)
        sizes[dtype] = (folder / "adapter_model.safetensors").stat().st_size
        assert smidgen.verify(Net(), folder).ok
    assert sizes["float32"] - sizes["float16"] == 4 * 1000 * 2


def test_a_number_that_halves_cannot_hold(tmp_path: Path) -> None:
    net = trained("seeded", r=4)
    with torch.no_grad():
        next(p for p in net.parameters() if p.requires_grad).fill_(1e5)
    with pytest.raises(smidgen.AdapterFileError, match=r"more than float16 can.*float32"):
        smidgen.save(net, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(smidgen.ConfigError, match="store_dtype must be one of float32, float16, int8, int4"):
        smidgen.config("seeded", store_dtype="int2")


@pytest.mark.parametrize("r", [0, -1, 1.5, "all"])
def test_what_is_no_number_of_directions(r: object) -> None:
    assert Seeded(4, 6, r="full").r == 4
    with pytest.raises(smidgen.ConfigError, match=r"at least 1|whole number"):
        smidgen.adapt(nn.Sequential(nn.Linear(3, 3)), "seeded", r=r, target_modules=["0"])
