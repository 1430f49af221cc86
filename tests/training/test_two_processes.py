"""Two CPU processes under ``accelerate launch`` end as one process with batches twice as large."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smidgen.errors import CheckpointError
from smidgen.training.checkpoints import CheckpointStore
from smidgen.training.loop import LoopConfig
from smidgen.training.randomness import examples
from tests.training import two_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo and signals as Linux has them")
ROOT = Path(__file__).parents[2]


def launch(*words: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    options = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, options), *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch("tests/training/two_processes.py", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What each of the two processes found."""
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def numbers(outcome: dict) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(outcome["numbers"]), dtype=np.float32)


def assert_same(outcome: dict, reference: dict) -> None:
    assert outcome["steps"] == reference["steps"] and outcome["best_step"] == reference["best_step"]
    np.testing.assert_allclose(numbers(outcome), numbers(reference), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(outcome["losses"], reference["losses"], rtol=1e-5)
    mine, other = ([entry["error"] for entry in run["evaluations"]] for run in (outcome, reference))
    np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_a_batch_of_twice_the_size_is_two_batches():
    for number in range(30):  # 37 examples: batches straddle epochs
        assert examples(5, number, 8, 37) == examples(5, 2 * number, 4, 37) + examples(5, 2 * number + 1, 4, 37)


def test_two_processes_equal_one_with_twice_the_batch(found, tmp_path):
    reference = two_processes.outcome(*two_processes.fit(tmp_path, two_processes.Masked(8)))
    assert found[0]["processes"] == 2
    assert_same(found[0]["whole"], reference)
    assert 0 < reference["best_step"] < reference["steps"] < 40  # the early stop was decided, and alike
    unweighted = two_processes.Masked(8)
    unweighted.loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean()
    other = two_processes.outcome(*two_processes.fit(tmp_path / "unweighted", unweighted))
    assert not np.allclose(numbers(other)[:8], numbers(reference)[:8], rtol=1e-3)  # the weights matter


def test_both_processes_hold_the_same(found):
    assert found[0]["whole"] == found[1]["whole"]


def test_another_number_of_processes_cannot_go_on(found, folder):
    with pytest.raises(CheckpointError, match="num_processes: 2 then, 1 now"):
        two_processes.fit(folder / "whole", two_processes.Masked(8), resume="latest")


def test_accumulation_in_two_processes_equals_one_large_batch(found, tmp_path):
    config = LoopConfig(**{**vars(two_processes.CONFIG), "max_train_steps": 6, "early_stopping_patience": 0})
    reference = two_processes.outcome(*two_processes.fit(tmp_path, two_processes.Masked(8), config))
    assert_same(found[0]["accumulated"], reference)


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_to_the_bit(found):
    for rank in range(2):
        assert found[rank]["stopped"]["kind"] == "TrainingInterrupted"
        assert "SIGTERM after step 10" in found[rank]["stopped"]["text"]
        assert found[rank]["gone_on"] == found[0]["whole"]


def test_a_loss_that_is_not_finite_in_one_process_ends_both(found, folder):
    texts = [found[rank]["poisoned"]["text"] for rank in range(2)]
    assert all("loss of step 6 is nan" in text and "checkpoint-4" in text for text in texts)
    assert "came from row" in texts[1] and "came from another process" in texts[0]
    assert CheckpointStore(folder / "bad").latest().step == 4


@pytest.mark.parametrize("method", two_processes.METHODS)
def test_adapters_train_alike(folder, tmp_path, method):
    mine = load_file(folder / f"{method}.safetensors")
    for name, reference in two_processes.fit_adapter(tmp_path, method, 8).items():
        torch.testing.assert_close(mine[name], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", two_processes.METHODS)
def test_adapters_survive_wrapping_by_accelerate_and_sharding_by_torch(folder, method, kind):
    mine = load_file(folder / f"{method}.safetensors")
    reference = two_processes.gradients(method, lambda model: model, 0, 8)
    assert any(grad.norm() > 0 for grad in reference.values())
    for name, grad in reference.items():
        torch.testing.assert_close(mine[f"{kind}.{name}"], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_bit(found, tmp_path, rank):
    killed = launch("tests/training/two_processes.py", str(tmp_path), "kill", str(2 * 9 + rank))
    assert killed.returncode != 0 and CheckpointStore(tmp_path / "killed").latest().step == 9
    resumed = launch("tests/training/two_processes.py", str(tmp_path), "resume")
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert json.loads((tmp_path / "found-0.json").read_text()) == found[0]["whole"]
