"""Cells and the whole course of a comparison with a stand-in for training: resume, failures, processes, report."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from smidgen.errors import CheckpointError, ConfigError, TrainingError
from smidgen.lab.compare import answers, report, schema
from smidgen.lab.compare.cells import Cells, make_cell
from smidgen.lab.compare.experiment import Claim
from smidgen.lab.compare.run import compare
from smidgen.lab.compare.search import choose, search_cells
from smidgen.lab.compare.table import gather, run_cells
from tests.training.compare_fakes import FakeTraining, experiment


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("[scr]*/*.json"))}


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    straight, killed = FakeTraining(), []
    compare(experiment(), tmp_path / "straight", work=straight)
    for dies_at in (0, 3, 1, 5, 2):
        fake = FakeTraining(dies_at=dies_at)
        with pytest.raises(KeyboardInterrupt):
            compare(experiment(), tmp_path / "killed", work=fake)
        killed += fake.done
    last = FakeTraining()
    compare(experiment(), tmp_path / "killed", work=last)
    assert sorted(killed + last.done) == sorted(straight.done)  # none lost, none twice
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "straight")
    again = FakeTraining()
    compare(experiment(), tmp_path / "killed", work=again)
    assert again.done == []


def test_seeds_come_outermost(tmp_path):
    fake = FakeTraining()
    compare(experiment(), tmp_path, work=fake)
    runs = [label for label in fake.done if label.startswith("run")]
    assert [label.rpartition("seed ")[2] for label in runs] == ["0", "0", "0", "1", "1", "1"]


def test_the_search_grows_until_the_best_lies_inside(tmp_path):
    compare(experiment(), tmp_path, stage="search", work=FakeTraining())
    cells, one = Cells(tmp_path), experiment()
    lora, svfit = (choose(one, one.method(name), cells) for name in ("LoRA", "svfit"))
    assert lora.grid == (1e-4, 1e-3, 1e-2, 1e-1) and lora.rate == 1e-3  # grown twice, to below 1e-3
    assert not lora.at_edge and svfit.grid == (1e-2, 1e-1, 1.0) and svfit.rate == 1e-1
    assert choose(one, one.method("linear probe"), cells) is None
    barred = replace(one, search=replace(one.search, extensions=0))
    assert choose(barred, one.method("LoRA"), cells).at_edge


def test_rates_are_not_chosen_before_the_search_is_done(tmp_path):
    with pytest.raises(ConfigError, match="search of 'svfit' is not complete"):
        run_cells(experiment(), Cells(tmp_path))
    with pytest.raises(ConfigError, match="nothing to report"):
        compare(experiment(), tmp_path, stage="report", work=FakeTraining())


def test_a_failed_cell_is_told_and_the_others_go_on(tmp_path):
    page = compare(experiment(), tmp_path, work=FakeTraining(fails=("LoRA",)))
    cells, one = Cells(tmp_path), experiment()
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "search").glob("lora-lr0.01-3steps-*.json")]
    assert record["status"] == "failed" and record["error"]["reason"] == "LoRA does not fit in memory"
    assert "RuntimeError" in record["error"]["trace"]
    results = gather(one, cells)
    assert results.of("svfit") and not results.of("LoRA")
    text = page.read_text()
    assert "LoRA does not fit in memory" in text and re.search(r"\| +failed \|", text)
    assert "Not checked: LoRA has no result" in text and "Ours win" not in text
    retried = FakeTraining()
    compare(one, tmp_path, work=retried)
    assert retried.done == []  # a failure is a result until its file is removed


def test_a_search_in_which_nothing_could_be_trained_is_an_error(tmp_path):
    one, fails = experiment(), FakeTraining(fails=tuple(m.name for m in experiment().methods if m.rates))
    for stage in ("search", None):
        with pytest.raises(TrainingError, match=r"No method could be trained at any rate.*does not fit in memory"):
            compare(replace(one, methods=tuple(m for m in one.methods if m.rates)), tmp_path, stage=stage, work=fails)


def test_a_broken_record_is_no_result(tmp_path):
    cells, cell = Cells(tmp_path), search_cells(experiment(), Cells(tmp_path))[0]
    cells.work([cell], FakeTraining())
    cells.path(cell).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        cells.read(cell)


def test_a_cell_is_known_by_what_decides_its_numbers(tmp_path):
    one = experiment()
    method = one.methods[0]
    keys = {make_cell(one, "run", method, 0.1, 0, 6).key, make_cell(one, "run", method, 0.1, 1, 6).key}
    keys |= {make_cell(one, "run", method, 0.2, 0, 6).key, make_cell(one, "search", method, 0.1, 0, 6).key}
    keys.add(make_cell(one, "run", replace(method, options={"r": 4}), 0.1, 0, 6).key)
    longer = replace(one, settings=one.settings | {"train": {"max_train_steps": 7}})
    keys.add(make_cell(longer, "run", method, 0.1, 0, 7).key)
    assert len(keys) == 6
    renamed = make_cell(one, "run", replace(method, name="new name"), 0.1, 0, 6)
    assert renamed.key in keys
    cells = Cells(tmp_path)
    cells.work([make_cell(one, "run", method, 0.1, 0, 6)], FakeTraining())
    assert cells.good(renamed) is not None and cells.missing([renamed]) == []


def test_two_processes_never_do_one_cell(tmp_path):
    cells, one = Cells(tmp_path), experiment()
    plan = search_cells(one, cells)
    locks = tmp_path / ".locks"
    locks.mkdir()
    with FileLock(locks / f"{plan[0].key}.lock"):  # another process is at it
        fake = FakeTraining()
        assert cells.work(plan, fake) == len(plan) - 1
        assert plan[0].label not in fake.done
        with pytest.raises(TrainingError, match="another process"):
            compare(replace(one, methods=one.methods[:1], claim=None), tmp_path, stage="search", work=FakeTraining())
    assert cells.work(plan, fake) == 1


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_process_lets_go_of_its_cell(tmp_path):
    cells = Cells(tmp_path)
    cell = search_cells(experiment(), cells)[0]
    (tmp_path / ".locks").mkdir()
    words = [sys.executable, "-c", HOLDER, str(tmp_path / ".locks" / f"{cell.key}.lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        assert cells.work([cell], FakeTraining()) == 0
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert cells.work([cell], FakeTraining()) == 1


def test_the_report_says_where_we_lose(tmp_path):
    page = compare(
        experiment(), tmp_path, work=FakeTraining(), command="smidgen compare fake", report=tmp_path / "docs"
    )
    assert page == tmp_path / "docs" / "fake.md"
    text = page.read_text()
    assert "**Ours lose at 20 kB**: svfit, fp16 against peft's LoRA, fp16: +0.1140" in text
    assert text.split("\n\n")[1] == "**Our best against peft's best, by bytes**: behind at 20 kB."
    assert "| 0.5 kB  | svfit, int4" in text and "| svfit, int4" in text and " 132 | " in text
    assert (
        "svfit **fails**: -0.0600 [" in text and "margin 0.01; 250 numbers instead of 4,000, 16.0 times fewer." in text
    )
    assert "linear probe **fails**" in text and "annot tell" not in text
    assert "    smidgen compare fake" in text and re.search(
        r"The 15 cells took 0 minutes .*search 0, run 0, cost 0", text
    )
    assert (tmp_path / "docs" / "fake.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "docs" / "fake.json").read_text())
    assert values["front"] == {"ours": ["svfit, int4", "svfit, fp16"], "peft": ["LoRA, int4", "LoRA, fp16"]}
    assert [entry["verdict"] for entry in values["budgets"]] == ["none", "none", "peft"]
    row = next(row for row in values["rows"] if row["method"] == "LoRA" and row["format"] == "int4")
    assert row["bytes"] == 4_000 and row["test"]["by_seed"]["0"]["accuracy"] == 0.9
    assert row["gain_over_head"]["mean"] == pytest.approx(0.3)


def test_the_report_says_what_fewer_bits_cost(tmp_path):
    def work(cell):
        found = FakeTraining()(cell)
        if cell.stage == "run" and cell.method.name == "LoRA":
            part = found["formats"]["int4"]
            right = answers.from_text(part["answers"]["scores"]).copy()
            right[:20] = False  # 20 of 2,000, all of which were right
            found["formats"]["int4"] = part | {"answers": part["answers"] | {"scores": answers.to_text(right)}}
        return found

    page = compare(experiment(), tmp_path, work=work)
    section = page.read_text().partition("## What int4 costs")[2].partition("## ")[0]
    assert "Above the bar of 0.003: LoRA." in section
    assert section.index("| LoRA") < section.index("| svfit") and "+0.0100" in section and "+0.0000" in section
    told = {one["method"]: one for one in json.loads((tmp_path / "fake.json").read_text())["rounding"]}
    assert told["LoRA"]["lost"]["mean"] == pytest.approx(0.01) and told["svfit"]["lost"]["mean"] == 0
    one = replace(experiment(), formats=("int4",))
    assert "## What int4 costs" not in compare(one, tmp_path / "one", work=FakeTraining()).read_text()


def test_a_claim_that_the_probe_meets_cannot_be_told(tmp_path):
    wide = replace(experiment(), claim=Claim(("svfit",), "LoRA", 16.0, margin=0.5))
    text = compare(wide, tmp_path, work=FakeTraining()).read_text()
    assert "**Cannot tell**: the head alone, without an adapter, does not fail the claim." in text
    assert "svfit **cannot tell**" in text and "**holds**" not in text


def test_a_claim_without_a_probe_cannot_be_told(tmp_path):
    one = replace(experiment(), claim=Claim(("svfit",), "LoRA", 16.0, margin=0.5))
    text = compare(replace(one, methods=one.methods[:2]), tmp_path, work=FakeTraining()).read_text()
    assert "**Cannot tell**: the experiment has no linear probe" in text and "**holds**" not in text


def test_a_claim_may_hold(tmp_path):
    close = replace(experiment(), claim=Claim(("svfit",), "LoRA", 16.0, margin=0.2))
    text = compare(close, tmp_path, work=FakeTraining()).read_text()
    assert "svfit **holds**" in text and "linear probe **fails**" in text


def test_what_is_no_better_than_the_head_alone_is_said_first(tmp_path, monkeypatch):
    from tests.training import compare_fakes

    monkeypatch.setitem(compare_fakes.RIGHT, "svfit", 0.5)
    text = compare(experiment(), tmp_path, work=FakeTraining()).read_text()
    assert text.split("\n\n")[1] == "**No better than the head alone**, by test loss: svfit, int4, svfit, fp16."


def test_a_report_on_half_an_experiment_decides_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compare(experiment(), tmp_path, work=FakeTraining(dies_at=9))  # 7 of the search, 2 trainings
    results = gather(experiment(), Cells(tmp_path))
    assert [row.name for row in results.rows if row.losses] == [
        "svfit, int4",
        "svfit, fp16",
        "LoRA, int4",
        "LoRA, fp16",
    ]
    text = report.markdown(results, "again")
    assert f"{len(results.missing)} cells are not done" in text and "nothing is decided yet" in text
    assert "By budget" not in text and "claim" not in text
    values = report.as_json(results)
    assert values["budgets"] == values["claims"] == []


# The keys of a result in PEFT's method_comparison (commit 5d602fdb): MetaMathQA/results/vera--llama-3.2-3B-default.json.
PEFT_KEYS = {
    "run_info": "created_at total_time experiment_name peft_branch train_config peft_config error_msg",
    "train_info": "accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th train_time "
    "file_size num_trainable_params num_total_params status metrics",
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
}
PEFT_TRAIN_CONFIG = (
    "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc query_template seed "
    "grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype generation_kwargs "
    "attn_implementation init_kv_cache_prefix"
)
PEFT_PACKAGES = (
    "transformers-version transformers-commit-hash peft-version peft-commit-hash datasets-version datasets-commit-hash "
    "bitsandbytes-version bitsandbytes-commit-hash torch-version torch-commit-hash"
)
PEFT_SYSTEM = "system release version machine processor accelerator"


def test_results_have_the_keys_of_pefts_own(tmp_path):
    compare(experiment(), tmp_path, work=FakeTraining())
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "peft").glob("*.json")}
    assert set(found) == {
        f"{name}--fake-seed{seed}.json" for name in ("svfit", "LoRA", "linear-probe") for seed in (0, 1)
    }
    for values in found.values():
        for section, keys in PEFT_KEYS.items():
            assert set(keys.split()) <= set(values[section])
        assert set(values["run_info"]["train_config"]) == set(PEFT_TRAIN_CONFIG.split())
        assert set(values["meta_info"]["package_info"]) == set(PEFT_PACKAGES.split())
        assert set(values["meta_info"]["system_info"]) == set(PEFT_SYSTEM.split())
    last = found["LoRA--fake-seed1.json"]["train_info"]
    assert {"step", "test accuracy", "test loss", "train loss", "train samples", "forgetting"} <= set(
        last["metrics"][-1]
    )
    assert last["file_size"] == 16_000 and last["num_trainable_params"] == 4_066 and last["status"] == "success"
    assert found["LoRA--fake-seed1.json"]["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert schema.package_info()["peft-version"]
