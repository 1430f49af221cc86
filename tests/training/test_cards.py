"""One writer for tables, cards and reports."""

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import yaml
from torch import nn

import smidgen
from smidgen.adapters.tuner.coverage import coverage
from smidgen.tasks import cards


def test_a_table_lines_up():
    shown = cards.table(["", "bytes"], [["ours", 12], ["a longer name", "1,234"]])
    assert shown.splitlines() == [
        "|               | bytes |",
        "| ------------- | ----: |",
        "| ours          |    12 |",
        "| a longer name | 1,234 |",
    ]
    with pytest.raises(ValueError):
        cards.table(["one", "two"], [["only one"]])


def test_a_page_leaves_out_what_is_empty():
    found = cards.page("Title", "Words.", "", ("Data", cards.bullets(["a", "b"])), ("Nothing", ""), ("Limits", "None."))
    assert found == "# Title\n\nWords.\n\n## Data\n\n- a\n- b\n\n## Limits\n\nNone.\n"


@pytest.mark.parametrize("base", ["owner/name", "yes", "a: b", "#1"])
def test_the_head_of_a_card_is_yaml(base, tmp_path):
    text = cards.model_card(
        cards.adapter_head(base, "text-to-image", "svfit"), "Title", cards.licence(base, "pictures")
    )
    _, head, body = text.split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["base_model"] == base and found["license_name"] == "same-as-base-model"
    assert found["tags"] == ["smidgen", "svfit", "text-to-image", "diffusers"]
    assert f"licence of its base model `{base}`; whoever shares it" in body
    assert yaml.safe_load(cards.model_card(cards.adapter_head(str(tmp_path), "x"), "T").split("---\n")[1])[
        "base_model"
    ] == (tmp_path.name)


def test_a_report_tells_no_local_path(tmp_path):
    @dataclass
    class Report:
        base: str
        adapter: Path
        score: float
        names: set[str]

    cards.write_report(tmp_path, Report(str(tmp_path), tmp_path, 0.5, {"b", "a"}), "# Card\n")
    found = {"base": tmp_path.name, "score": 0.5, "names": ["a", "b"]}
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert (tmp_path / "README.md").read_text() == "# Card\n"


@pytest.mark.parametrize("own", [True, False])
def test_coverage_of_any_adapter(own):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    if own:
        smidgen.adapt(model, "lora", r=2, target_modules=["0"])
    else:
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    heading, text = cards.covered(coverage(model, "default"))
    assert heading == "What it covers" and "| 1 of 1 layers |" in text and "50.0%" in text and "not adapted" in text
    assert cards.covered(None)[1] == cards.covered(coverage(nn.Sequential(nn.Linear(2, 2)), "default"))[1] == ""
