"""``smidgen train`` as people use it: flags, files, presets, a SIGKILL in the middle, two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smidgen.cli.table import summaries
from smidgen.tasks.text_classification import recipe
from tests.training.test_cli import call
from tests.training.test_two_processes import launch

ROOT = Path(__file__).parents[2]
TASKS = ("text-classification", "image-classification", "instruction")
FEW = ["--preset", "debug", "--eval-steps", "0"]


def test_overview_and_help(capsys):
    for words in (["train"], ["train", "--help"]):
        status, out, _ = call(capsys, *words)
        assert status == 0 and all(task in out for task in summaries("train"))
    for task in TASKS:
        status, out, _ = call(capsys, "train", task, "--help")
        assert status == 0 and f"smidgen train {task}" in out and "--max-train-steps" in out


@pytest.mark.parametrize("task", TASKS)
def test_a_debug_run_and_its_own_config_again(capsys, tmp_path, task):
    words = ["train", task, *FEW, "--method", "lora", "--rank", 2, "--max_train_steps", 2, "--lr-warmup-steps", 0]
    status, out, _ = call(capsys, *words, "--output_dir", tmp_path / "a")
    assert status == 0 and "| lora" in out and f"{tmp_path / 'a'}/" in out and "numbers trained" in out
    status, _, _ = call(capsys, "train", task, "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    assert status == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    status, _, err = call(capsys, *words, "--out", tmp_path / "a")
    assert status == 2 and "already holds checkpoint-2" in err
    (shown,) = [call(capsys, "config", "show", tmp_path / "a" / "config.yaml", "--recipe", task)[1]]
    assert shown == (tmp_path / "a" / "config.yaml").read_text()


def test_data_of_your_own_and_flags_over_the_config(capsys, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("data: {path: a.csv, text_column: words}\nadapter: {target_modules: [query]}\ntrain: {seed: 5}\n")
    seen = []

    def stop(config):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "text_classification", stop)
    assert call(capsys, "train", "text-classification", "--config", path, "--max-steps", 7)[0] == 130
    call(capsys, "train", "text-classification", "b.csv", "--config", path, "--model-name-or-path", "x", "--seed", 6)
    call(capsys, "train", "text-classification", "c.csv", "--target-modules", "query", "value", "--no-load-best")
    first, second, third = seen
    assert (first.data.path, first.data.text_column, first.train.max_train_steps) == ("a.csv", "words", 7)
    assert first.adapter.target_modules == ("query",) and first.train.seed == 5
    assert (second.data.path, second.model, second.train.seed) == ("b.csv", "x", 6)
    assert third.adapter.target_modules == ("query", "value") and third.train.load_best is False


@pytest.mark.parametrize("words, message", [
    (["train", "text-clasification"], "There is no command 'train text-clasification'. Did you mean 'text-classification'"),
    (["train", "text-classification"], "Which data?"),
    (["train", "text-classification", "nothing.csv", "--model", "debug-text"], "There is no data at nothing.csv"),
    (["train", "instruction", "x", "--preset", "debugg"], "Did you mean 'debug'?"),
    (["config", "show", "--recipe", "instructions"], "Did you mean 'instruction'?"),
])  # fmt: skip
def test_user_errors_are_one_line_and_status_2(capsys, tmp_path, words, message):
    extra = ["--model", "debug-text"] if words[1:] == ["text-classification"] else []
    status, out, err = call(capsys, *words, *extra)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1 and out == ""


def test_unknown_keys_and_flags_name_the_nearest(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {text_colum: words}\n")
    status, _, err = call(capsys, "config", "validate", path, "--recipe", "text-classification")
    assert status == 2 and "Unknown key 'data.text_colum'" in err and "text_column" in err
    status, _, err = call(capsys, "train", "instruction", "x", "--max-lenght", "3")
    assert status == 2 and "--max-length" in err


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_run_goes_on_to_the_same_bits(capsys, tmp_path):
    words = ["train", "text-classification", *FEW, "--method", "tlora", "--checkpointing-steps", "2"]
    assert call(capsys, *words, "--max-train-steps", 4, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    code = (  # the third step never ends, so that the kill falls where it should
        "import sys, time\n"
        "from smidgen.tasks.text_classification.task import TextClassificationTask as T\n"
        "from smidgen import cli\n"
        "batch = T.batch\n"
        "T.batch = lambda self, index: time.sleep(600) if index == 2 else batch(self, index)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *words, "--max-train-steps", "4", "--out", str(out)]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-2" / "state.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (out / "adapter_model.safetensors").exists()
    status, _, _ = call(capsys, *words, "--max-train-steps", 4, "--out", out, "--resume-from-checkpoint", "latest")
    assert status == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-4/trained.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo as Linux has it")
@pytest.mark.parametrize("task", ["text-classification", "instruction"])
def test_two_processes_equal_one_with_twice_the_batch(capsys, tmp_path, task):
    words = ["train", task, "--preset", "debug", "--dropout", "0.0", "--method", "tlora", "--no-load-best"]
    one = [*words, "--train-batch-size", "8", "--out", tmp_path / "one"]
    assert call(capsys, *one)[0] == 0
    two = [*words, "--train-batch-size", "4", "--out", str(tmp_path / "two")]
    done = launch("-m", "smidgen.cli", *two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("numbers trained") == 1  # one process reports
    first, second = (load_file(tmp_path / name / "checkpoint-4" / "trained.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=2e-4, atol=2e-6)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["scores"]["test"] == pytest.approx(reports[1]["scores"]["test"], rel=1e-3)
