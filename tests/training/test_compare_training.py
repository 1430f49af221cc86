"""Comparisons that really train, on tiny random models: the whole course, resume, sizes, memory, peft's odd methods."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from smidgen.errors import ConfigError
from smidgen.lab.compare.cells import Cells
from smidgen.lab.compare.cost import measure, measure_apart
from smidgen.lab.compare.experiment import Method, load_experiment
from smidgen.lab.compare.recipes import prepare
from smidgen.lab.compare.run import compare
from smidgen.lab.compare.setups import make_rates, make_setup
from smidgen.lab.compare.sizes import disk_bytes
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
    one = replace(load_experiment("debug"), cost_steps=0, search=replace(load_experiment("debug").search, extensions=0))
    one = one.only(["svfit", "peft LoRA"])
    page = compare(one, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        compare(one, tmp_path / "killed", work=Killed(one))
    early = {path: path.read_bytes() for path in (tmp_path / "killed").glob("[scr]*/*.json")}
    assert len(early) == 4
    compare(one, tmp_path / "killed")
    assert all(path.read_bytes() == content for path, content in early.items())  # not done again
    assert records(tmp_path / "killed") == records(tmp_path / "straight")
    results = gather(one, Cells(tmp_path / "straight"))
    svfit, lora = results.row("svfit"), results.row("peft LoRA")
    assert set(svfit.test) == set(lora.test) == {0, 1} and 0 <= min(svfit.test.values()) <= 1
    assert (svfit.numbers, lora.numbers) == (128, 512) and svfit.head_numbers == lora.head_numbers == 66
    assert 4 * 512 < lora.file_bytes < 4 * 512 + 2048 < 6000 and svfit.bytes < lora.bytes
    assert set(svfit.forgetting) == {0, 1}
    assert "2 for each method" in page.read_text() and not results.missing


def test_sizes_leave_the_head_out(tmp_path):
    one = load_experiment("debug")
    prepared = prepare(one.recipe, one.config())
    found = {}
    for method in one.methods:
        model = prepared.fresh()
        setup = make_setup(one, method, 0, model, prepared.task)
        engine.adapt(model, setup, prepared.heads)
        engine.save(model, setup, tmp_path / method.name, prepared.heads)
        found[method.name] = disk_bytes(tmp_path / method.name, prepared.heads)
    assert found["linear probe"]["adapter"] == 0 and found["linear probe"]["head"] > 4 * 66
    lora, folder = found["peft LoRA"], tmp_path / "peft LoRA"
    whole = (folder / "adapter_model.safetensors").stat().st_size
    assert lora["file"] + lora["head"] == whole and lora["head"] >= 4 * 66
    assert lora["adapter"] == lora["file"] + (folder / "adapter_config.json").stat().st_size


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
    probe, lora = Method("p", "linear probe", (0.1,)), Method("l", "peft.LoraConfig", (0.1,))
    assert make_rates(probe, 0.1, 0.5).head == 0.1
    assert (make_rates(lora, 0.1, 0.5).residual, make_rates(lora, 0.1, 0.5).head) == (0.1, 0.5)


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
