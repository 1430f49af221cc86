"""The table of docs/coverage.md: its checks hold for every architecture, and a check that fails shows."""

from __future__ import annotations

import pytest

import smidgen
from benchmarks import coverage, tiny_models

SOME = ("T5", "ModernBERT", "Mamba", "LLaVA", "GPT-2", "ResNet", "SD3", "FLUX.2", "HiDream")


def examined(name: str, targets: list[str] | None = None) -> coverage.Row:
    row = coverage.examine(name, targets)
    if row.error.startswith(("AttributeError: module", "ImportError")):
        pytest.skip(f"this release has no {name}")
    return row


@pytest.mark.parametrize("name", SOME)
def test_some(name: str) -> None:
    row = examined(name)
    assert row.fine, (row.held, row.error)


def test_experts_by_name() -> None:
    rows = coverage.examine_experts(["Mixtral", "BERT"])
    assert all(row.name == "Mixtral" and row.fine and row.reach.share > 0.8 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tiny_models.TRANSFORMERS, *tiny_models.DIFFUSERS])
def test_every_architecture(name: str) -> None:
    row = examined(name)
    assert row.fine, (row.held, row.error)


def test_a_failure_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smidgen, "load", lambda model, folder: model)  # loads nothing
    wrong = coverage.examine("BERT")
    assert not wrong.fine and wrong.held == {"start": True, "effect": True, "file": False, "merge": True}
    unknown = coverage.examine("GPT-2", ["nonsense"])
    assert unknown.error.startswith("TargetError: target_modules: no module is named 'nonsense'.")
    page = coverage.page({"Transformers": [wrong, unknown], "Diffusers": [], "Experts, by name": []})
    assert "0 of 2 hold every" in page and "* BERT: file" in page and "* GPT-2: TargetError" in page
    assert "| BERT | `query`, `value` | 8 of 25 | 15% | 4/4 | yes | yes | **no** | yes |" in page
    figures = coverage.figures({"Transformers": [wrong, unknown]})
    assert figures["transformers.fine"] == 0 and figures["transformers.BERT.checks"] == 3


def test_the_page_is_of_the_models_there_are() -> None:
    page = coverage.PAGE.read_text()
    named = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")} - {"model"}
    assert named == tiny_models.TRANSFORMERS.keys() | tiny_models.DIFFUSERS.keys()
