"""A method is one file and one row of a table: a residual and a transform that are not shipped reach everything."""

import re
import sys
from pathlib import Path

import pytest
import torch

import smidgen
from smidgen import testing
from smidgen.adapters import residuals
from smidgen.adapters.member import Factors
from smidgen.adapters.methods import KINDS, METHODS, known_methods, learning_rates
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.cli import telling
from tests.adapters.exercise import vera
from tests.adapters.exercise.monarch import Monarch
from tests.adapters.exercise.vera import Vera
from tests.adapters.helpers import Net, inputs, trained
from tests.adapters.test_methods import reach_every_command
from tests.docs.blocks import blocks_of
from tests.laws.test_laws import ONLY_ON

NEW = ("vera", "monarch")


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The one row of each."""
    monkeypatch.setitem(RESIDUALS, Vera.name, Vera)
    monkeypatch.setitem(TRANSFORMS, Monarch.name, Monarch)


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("method", [*NEW, "monarch+vera"])
def test_laws(method, law):
    kinds = [k for k in ONLY_ON.get(law, testing.LAYER_KINDS) if k not in testing.NOT_ON.get(law, ())]
    own = {"r": 6} if "vera" in method else {}
    assert testing.check(smidgen.config(method, **own), kinds, [law]) == len(kinds)


@pytest.mark.parametrize("method", [*NEW, "monarch+low_rank", "rotation+vera", "monarch+vera"])
def test_a_row_is_enough_for_every_command(method):
    reach_every_command(method)


def test_each_has_a_rate_in_every_kind_of_task():
    for kind in KINDS:
        assert learning_rates("vera", kind) == learning_rates("svfit", kind)  # rates_like
        assert learning_rates("monarch", kind) == learning_rates("oft", kind)  # as transforms have


def test_the_list_of_methods_has_them_and_the_command_line_tells(capsys):
    telling.methods()
    said = capsys.readouterr().out
    assert re.search(r"vera +\| - +\| vera +\| - +\| r \+ rows", said)
    assert re.search(r"monarch +\| monarch +\| - +\| - +\| width \(b \+ blocks\)", said)
    assert [m.name for m in known_methods()] == [*METHODS, "diagonal", "monarch", "vera", "magnitude"]


def test_counts():
    both = {"target_modules": ["q_proj", "v_proj"]}  # 4 layers of 16 x 16
    assert smidgen.trained_numbers(smidgen.adapt(Net(), "vera", r=100, **both)) == 4 * (100 + 16)
    assert smidgen.trained_numbers(smidgen.adapt(Net(), "monarch", **both)) == 4 * 16 * (4 + 4)
    layers = 24 * 2  # query and value
    assert smidgen.count("roberta-large", smidgen.config("vera", r=256)) == layers * (256 + 1024)  # as the paper counts
    assert smidgen.count("roberta-large", smidgen.config("monarch")) == layers * 1024 * (32 + 32)


@pytest.mark.parametrize("method", NEW)
def test_a_file_brings_it_back_and_verify_proves_it(method, tmp_path):
    model, x = trained(method), inputs()
    folder = smidgen.save(model, tmp_path / "adapter")
    fresh = smidgen.load(Net(), folder, "other")
    assert torch.equal(fresh(x), model(x)) and not torch.equal(fresh(x), Net()(x))
    assert smidgen.verify(fresh, folder, (x,)).ok
    merged = smidgen.merge(fresh)
    torch.testing.assert_close(merged(x), model(x))


def test_frozen_matrices_are_shared_and_in_no_file(tmp_path):
    model = trained("vera", r=200)
    held = [layer.smidgen_slots["default"].residual_A for layer in model.modules() if hasattr(layer, "smidgen_slots")]
    assert len(held) == 4 and len({t.data_ptr() for t in held}) == 1
    folder = smidgen.save(model, tmp_path)
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4 * 4 * (200 + 16) + 3000  # A and B alone are 25 kB


def test_a_residual_that_wrongly_says_it_stacks_is_named(monkeypatch):
    monkeypatch.setattr(Vera, "stacks", True)
    monkeypatch.setattr(Vera, "factors", lambda _, t: Factors(t["b"][..., None] * t["B"], t["d"], t["A"]))
    with pytest.raises(smidgen.ConfigError, match="'vera' says that it stacks, but its up has 3 axes and its down 2"):
        testing.check(smidgen.config("vera", r=6), ["linear"], ["bank"])


def test_training_uses_all_of_monarch():
    """From the identity to a matrix that no block-diagonal one is near: both factors learn."""
    torch.manual_seed(0)
    wanted, x = torch.eye(16) + 0.1 * torch.randn(16, 16), torch.randn(64, 16)
    transform = Monarch(16)
    numbers = {k: v.requires_grad_() for k, v in transform.start("any").items()}
    optimizer = torch.optim.Adam(numbers.values(), lr=1e-2)
    start = None
    for _ in range(200):
        loss = (transform.apply(x, numbers) - x @ wanted.T).square().mean()
        start = start or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * start
    assert all(bool(v.detach().any()) for v in numbers.values())
    assert int((transform.matrix(numbers).abs() > 1e-6).sum()) == 16 * 16  # every output sees every input


@pytest.mark.parametrize("method, options, message", [
    ("vera", {"r": 0}, "r of a vera residual must be a whole number of at least 1, got 0"),
    ("monarch", {"blocks": 5}, r"blocks must divide the width 16, got 5; one of \[1, 2, 4, 8, 16\]"),
    ("vera", {"blocks": 5}, "Option blocks=5 has no meaning"),
    ("vira", {}, "Unknown method 'vira'.*Did you mean 'vera'"),
    ("tensor_ring", {}, "Unknown method 'tensor_ring'"),  # a transform or a residual?
])  # fmt: skip
def test_mistakes_are_named(method, options, message):
    with pytest.raises(smidgen.ConfigError, match=message):
        smidgen.adapt(Net(), method, target_modules=["q_proj"], **options)


def test_the_recipe_in_the_docs_is_this_exercise_and_runs(monkeypatch):
    file, row, proof = (block.text for block in blocks_of("docs/new_method.md"))
    assert file == (Path(__file__).parent / "exercise" / "vera.py").read_text()
    monkeypatch.setitem(sys.modules, "smidgen.adapters.residuals.vera", vera)
    names = dict(vars(residuals))
    exec(row, names)
    assert names["RESIDUALS"] == RESIDUALS  # which the test's fixture has added it to
    exec(proof, {})
