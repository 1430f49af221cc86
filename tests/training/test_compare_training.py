"""Comparisons that really train, on tiny random models: the whole course, resume, sizes, memory, peft's odd methods."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from smidgen.errors import ConfigError
from smidgen.lab.compare.cells import Cells, make_cell
from smidgen.lab.compare.cost import measure, measure_apart
from smidgen.lab.compare.experiment import Method, load_experiment
from smidgen.lab.compare.recipes import prepare
from smidgen.lab.compare.run import compare
from smidgen.lab.compare.setups import make_rates, make_setup
from smidgen.lab.compare.table import gather
from smidgen.lab.compare.trainer import Trainer
from smidgen.training import engine

CLOCKS = ("created_at", "total_seconds", "cpu_seconds", "train_seconds")


class Killed(Trainer):
    """Trains, and is stopped before its last cell."""

    left = 4

    def __call__(self, cell):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__call__(cell)


def records(folder: Path) -> dict[str, dict]:
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("[scr]*/*.json"))}
    return {name: {key: value for key, value in record.items() if key not in CLOCKS} for name, record in found.items()}


def test_the_debug_experiment_whole_and_killed(tmp_path):
    one = load_experiment("debug")
    one = replace(one, cost_steps=0, search=replace(one.search, extensions=0))
    page = compare(one, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        compare(one, tmp_path / "killed", work=Killed(one))
    early = {path: path.read_bytes() for path in (tmp_path / "killed").glob("[scr]*/*.json")}
    assert len(early) == 4
    compare(one, tmp_path / "killed")
    assert all(path.read_bytes() == content for path, content in early.items())  # not done again
    assert records(tmp_path / "killed") == records(tmp_path / "straight")
    results = gather(one, Cells(tmp_path / "straight"))
    assert {(row.method.name, row.format) for row in results.rows} == {
        ("linear probe", "float32"), *((name, each) for name in ("svfit", "peft LoRA") for each in one.formats)
    }  # fmt: skip
    svfit, lora, probe = results.of("svfit"), results.of("peft LoRA"), results.probe
    assert set(svfit.losses) == set(lora.losses) == set(probe.losses) == {0, 1} and len(lora.scores[0]) == 8
    assert (svfit.numbers, lora.numbers, probe.numbers) == (128, 256, 0) and svfit.head_numbers == 66
    assert svfit.head_bytes == probe.head_bytes == 132 and probe.bytes == 0
    assert 2 * 256 < lora.file_bytes < 2 * 256 + 250 and svfit.bytes < lora.bytes
    four = next(row for row in results.rows if row.method == svfit.method and row.format == "int4")
    assert four.bytes < svfit.bytes
    assert set(svfit.forgetting) == {0, 1} and (probe.losses[0] == probe.losses[1]).all()
    text = page.read_text()
    assert "2 for 2 steps, then 1 for 4 steps, on seed 100" in text and not results.missing
    assert "The papers' claim" in text and "linear probe **" in text


def test_every_method_starts_from_one_head_and_is_measured_as_it_is_stored():
    one = load_experiment("debug")
    trainer, seen = Trainer(one), {}
    for name in ("linear probe", "svfit", "peft LoRA"):
        rate = 0.0 if name == "linear probe" else 1e-12  # nothing moves
        steps = 6 if rate else 0
        still = replace(one, settings=one.settings | {"adapter": {"head_learning_rate": 1e-12}})
        trainer.experiment = still
        seen[name] = trainer(make_cell(still, "run", one.method(name), rate, 0, steps))
    losses = [found["test"]["loss"] for record in seen.values() for found in record["formats"].values()]
    assert len(losses) == 5 and losses == pytest.approx([losses[0]] * 5, rel=2e-3)
    assert trainer._known["svfit"] and all("residual_delta" in name for name in trainer._known["svfit"])
    assert {name.split(".")[-3] for name in trainer._known["peft LoRA"]} == {"lora_B"}  # A starts at random


def test_the_cost_of_a_step(monkeypatch):
    one = replace(load_experiment("debug").only(["peft LoRA"]), claim=None)
    found = measure(one, 1e-3, 0)
    assert found["peak_memory"] > 50e6 and found["step_ratio"] > 0
    assert found["step_ratio"] != 1.0 and found["base_step_seconds"] > 0


@pytest.mark.slow
def test_the_cost_is_measured_in_a_fresh_process():
    one = load_experiment("debug")
    found = measure_apart(one, one.method("svfit"), 1e-2, 0)
    assert found["peak_memory"] > 50e6 and found["step_ratio"] > 0


@pytest.mark.slow
def test_two_workers_share_a_folder(tmp_path):
    one = load_experiment("debug")
    compare(one, tmp_path / "two", workers=2)
    compare(one, tmp_path / "one")
    assert {k: v for k, v in records(tmp_path / "two").items() if v["stage"] != "cost"} == {
        k: v for k, v in records(tmp_path / "one").items() if v["stage"] != "cost"
    }


def test_a_rate_is_the_adapters_own():
    found = make_rates(0.1, 0.5)
    assert (found.residual, found.head) == (0.1, 0.5) and found.transform == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("a", "peft.LoraConfg", (0.1,)), "peft has no 'LoraConfg'.*LoraConfig"),
        (Method("a", "peft.LoraConfig", (0.1,), {"rank": 3}), "refuses its options.*rank"),
        (Method("a", "svfti", (0.1,)), "svfit"),
        (Method("a", "svfit", (0.1,), {"q": 3}), "q"),
        (Method("a", "pair", (0.1,), {"residual": "low_rank", "output": "scal"}), "output transform 'scal'.*'scale'"),
    ],
)
def test_a_method_that_does_not_exist(method, message):
    with pytest.raises(ConfigError, match=message):
        make_setup(load_experiment("debug"), method, 0, None, None)


def test_a_pair_may_have_an_output_transform():
    method = Method("a", "pair", (0.1,), {"residual": "low_rank", "r": 2, "output": "magnitude"})
    assert make_setup(load_experiment("debug"), method, 0, None, None).members == {
        "transform": None, "residual": "low_rank", "output": "magnitude",
    }  # fmt: skip


SHARED = {
    "VeRA": peft.VeraConfig(r=8, save_projection=False, target_modules=["query", "value"]),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["query", "value"]),
    "TinyLoRA": peft.TinyLoraConfig(r=2, u=4, save_projection=False, target_modules=["query", "value"]),
    "UniLoRA": peft.UniLoraConfig(r=2, theta_d_length=32, target_modules=["query", "value"]),
}


@pytest.mark.parametrize("name", SHARED)
def test_methods_that_share_numbers_between_layers_come_back(name, tmp_path):
    one = load_experiment("debug")
    prepared = prepare(one.recipe, one.config())
    batch, model, config = prepared.task.batch(0), prepared.fresh(), SHARED[name]
    engine.adapt(model, config, prepared.heads)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        prepared.task.loss(model, batch).backward()
        optimizer.step()
    engine.save(model, config, tmp_path, prepared.heads)
    again = prepared.fresh()
    engine.load(again, tmp_path)
    losses = [float(prepared.task.loss(each.eval(), batch).detach()) for each in (model, again, prepared.fresh())]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0] - losses[2]) > 1e-3
