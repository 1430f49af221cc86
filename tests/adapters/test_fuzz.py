"""A sample of `make bench NAME=fuzz`: damaged folders are refused, or give what was saved, and nothing breaks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from benchmarks import fuzz


def test_a_sample_of_damaged_folders(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = fuzz.Fuzz(tmp_path, seed=11, methods=("loldu", "tlora(2,2)", "seeded"))
        for number in range(150):
            sample.folder(number)
    assert not sample.found, "\n".join(sample.found)
    for route in fuzz.ROUTES:
        assert sample.counts[f"{route}_refused"] > 80 and sample.counts[f"{route}_accepted_same"] > 3
    assert not sample.counts["load_touched"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")
def test_a_sample_of_kills(tmp_path: Path) -> None:
    counts = fuzz.kills(tmp_path, 8)
    assert (
        counts["kills_load_old"] + counts["kills_load_new"] == 8 == counts["kills_peft_old"] + counts["kills_peft_new"]
    )
    assert counts["kills_load_old"] and counts["kills_load_new"] and counts["kills"] >= 7
