"""A change that a family made comes back to rounding, under its own name; of any other change every share is told."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint.lazy import LazyTensors
from smidgen.adapters.extract import extract, skeleton
from smidgen.adapters.fit import fit
from smidgen.adapters.methods import METHODS
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import ConfigError, SmidgenError
from smidgen.testing import samples
from tests.adapters.helpers import Net, inputs

SINGLES = {**{t: {"transform": t} for t in TRANSFORMS}, **{f"{d} residual": {"residual": d} for d in RESIDUALS}}
SINGLES |= {s: {"output": s} for s in OUTPUTS}
SINGLES |= {"spectral+scale": {"residual": "spectral", "output": "scale"}}
NAMED = [name for name in METHODS if name != "dora"]


def merged(method, dtype=torch.float32, size=0.1, **options):
    """(a base, the base with a perturbed adapter merged into it)."""
    base = Net(1, width=32).to(dtype)
    model = smidgen.adapt(copy.deepcopy(base), method, **{"target_modules": ["q_proj", "v_proj"], **options})
    return base, smidgen.merge(testing.perturb(model, 1, size))


def off(base, tuned, folder):
    """|W + delta - W'| / |W' - W| of a file on a base, over all its layers."""
    model = smidgen.load(copy.deepcopy(base), folder)
    assert smidgen.verify(model, folder, lambda m: m(inputs(32).to(next(m.parameters()).dtype))).ok
    wrong, size = 0.0, 0.0
    model.requires_grad_(False)
    for name, layer in adapted_layers(model).items():
        change = tuned.get_submodule(name).weight.double() - layer.base_layer.weight.double()
        wrong += float((layer.delta_weight("default").double() - change).square().sum())
        size += float(change.square().sum())
    return (wrong / size) ** 0.5


@pytest.mark.parametrize("method", NAMED)
def test_a_change_that_a_method_made_is_recovered_and_named(method, tmp_path):
    base, tuned = merged(method)
    found = extract(base, tuned, tmp_path / "out")
    assert found.chosen is not None and found.chosen.recovered
    assert {side: name for side, name in found.chosen.config.members.items() if name} == METHODS[method].members
    assert off(base, tuned, tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("method", NAMED)
def test_a_change_merged_in_bf16_is_recovered_to_its_rounding(method):
    base, tuned = merged(method, torch.bfloat16, size=0.5)
    found = extract(base, tuned)
    assert found.chosen is not None and found.chosen.recovered and found.rounding < 0.05
    assert {side: name for side, name in found.chosen.config.members.items() if name} == METHODS[method].members
    assert 1 - found.chosen.explained < 1.6 * found.rounding


def test_dora_is_recovered_where_it_is_asked_for(tmp_path):
    base, tuned = merged("dora")
    found = extract(base, tuned, tmp_path / "out", methods=["lora", "dora:8"])
    assert found.chosen.config.method == "dora" and found.chosen.recovered
    assert off(base, tuned, tmp_path / "out") <= 1e-5
    model, _ = testing.adapted(smidgen.config("low_rank+output_rotation", r=2, block_size=4), "linear")
    layer = adapted_layers(model)["layer"]
    with pytest.raises(ConfigError, match="has a fit alone, not beside other members"):
        fit(layer, "default", layer.delta_matrix("default").detach())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv2d_groups"])
@pytest.mark.parametrize("single", SINGLES)
def test_every_member_fits_what_it_made(single, kind):
    options = {k: v for name in SINGLES[single].values() for k, v in samples._SMALL.get(name, {}).items()}
    own = smidgen.config(**SINGLES[single], **options)
    model, _ = testing.adapted(own, kind)
    layer = adapted_layers(model)["layer"]
    change = layer.delta_matrix("default").detach().clone()
    layer.slot("default").reset_parameters()
    rest = fit(layer, "default", change)
    assert (rest / float(change.square().sum())) ** 0.5 <= 1e-5


@pytest.mark.parametrize("method, r", [("svfit", 5), ("loldu", 7), ("lora", 3)])
def test_the_rank_that_it_was_made_with_is_found(method, r):
    base, tuned = merged(method, r=r)
    found = extract(base, tuned)
    assert found.chosen.config.method == method and found.chosen.config.r == r


def test_a_change_that_no_small_family_made_is_told_and_not_written(tmp_path):
    base = Net(width=32)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    found = extract(base, tuned, tmp_path / "out", methods=["svfit", "lora:4", "oft"])
    assert found.chosen is None and not (tmp_path / "out").exists()
    assert all(0 <= one.explained < 0.5 and not one.recovered for one in found.fits)
    assert [one.bytes for one in found.fits] == sorted(one.bytes for one in found.fits)
    assert found.left["norms and biases"][0] == 7 and 0.9 < found.carried < 1
    some = extract(base, tuned, tmp_path / "out", methods=["lora:4", "lora:24"], least=0.5)
    assert some.chosen.config.r == 24 and 0.5 < some.chosen.explained < 1
    assert abs(off(base, tuned, tmp_path / "out") ** 2 - (1 - some.chosen.explained)) < 1e-4


def test_files_are_read_layer_by_layer_and_give_the_same(tmp_path):
    base, tuned = merged("svfit", r=4)
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    lazy = [LazyTensors([tmp_path / f"{name}.safetensors"]) for name in ("base", "tuned")]
    found = extract(*lazy, tmp_path / "out", methods=["svfit"])
    assert found.chosen.config.r == 4 and off(base, tuned, tmp_path / "out") <= 1e-5


def test_a_new_head_is_kept_and_what_is_not_carried_is_counted(tmp_path):
    base, tuned = merged("lora", r=2)
    with torch.no_grad():
        tuned.head.weight += 1.0
        tuned.norm.bias += 1.0
    before = {name: value for name, value in base.state_dict().items() if not name.startswith("head.")}
    found = extract(before, tuned, tmp_path / "out", methods=["lora"])
    assert found.new == ["head"] and found.left == {
        "norms and biases": (1, pytest.approx(found.left["norms and biases"][1]))
    }
    model = smidgen.load(copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(model.head.modules_to_save["default"].weight, tuned.head.weight)


def test_the_same_checkpoint_and_another_model_are_said():
    base = Net()
    found = extract(base, copy.deepcopy(base))
    assert found.layers == [] and found.chosen is None and found.same == 5
    with pytest.raises(SmidgenError, match="no layers in common"):
        extract(base, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match=r"Unknown method 'svfti'\. Did you mean 'svfit'"):
        extract(base, Net(seed=1), methods=["svfti"])
    with pytest.raises(SmidgenError, match="merge them first"):
        extract(base, smidgen.adapt(Net(), "svfit", target_modules=["q_proj"]))


def test_a_skeleton_has_the_layers_of_a_file():
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "c.0.weight": (4, 3, 3, 3), "embed_tokens.weight": (9, 2), "x": (5,)}
    found = skeleton(shapes)
    assert {n: tuple(p.shape) for n, p in found.named_parameters()} == shapes
    assert isinstance(skeleton({"a.bias": (3,), "a.weight": (3, 2)}).a, nn.Linear)
    assert isinstance(found.a, nn.Linear) and isinstance(found.c.get_submodule("0"), nn.Conv2d)
    assert not isinstance(found.embed_tokens, nn.Linear)
